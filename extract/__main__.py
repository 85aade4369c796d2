"""`python -m extract`: the stage without the other ones."""

from __future__ import annotations

from extract.cli import corpus, extract

extract.add_command(corpus)

if __name__ == "__main__":
    extract(prog_name="python -m extract")
