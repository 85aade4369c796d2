"""`python -m extract`: the commands of this stage alone."""

from __future__ import annotations

from extract.cli import corpus, extract

extract.add_command(corpus)

if __name__ == "__main__":
    extract(prog_name="python -m extract")
