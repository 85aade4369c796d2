"""`python -m store_tools`: the `logitfuse store` commands alone."""

from __future__ import annotations

from store_tools.cli import store

if __name__ == "__main__":
    store(prog_name="python -m store_tools")
