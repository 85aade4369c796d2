"""Command blocks of the README and of docs/; `python -m tests.docs_blocks` counts those a test runs.

A block counts if it is YAML or Python, or if a line of it is a command. One that cannot be run here has
a comment before it that a reader of the page does not see: `<!-- needs: a Ray cluster -->`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
PROGRAMS = ("logitfuse", "make", "python", "pip", "torchrun", "accelerate")
"""What a command begins with."""

FENCE = re.compile(r"^(`{3,})(.*)$")
NEEDS = re.compile(r"^<!-- needs: (.+) -->$")
COMMAND = re.compile(rf"^(?:\$ )?(?:{'|'.join(PROGRAMS)})(?: |$)")
MORE = re.compile(r"--?\w|run(?: |$)|[A-Z]{2,}|(?:runs|examples)/|\w+\.yaml(?: |$)")
"""How words begin that belong to a command, though they stand in a column of their own."""
INLINE = re.compile(r"`(logitfuse (?:[a-z]+ )+[^`]*)`")

ELSEWHERE = {
    "extending.md": "test_docs_extending.py",
    "cluster.md": "test_launch_slurm.py",
    "store.md": "test_docs_store.py",
}
"""Pages of which another test takes Python or shell scripts, and that test."""


@dataclass(frozen=True)
class Block:
    """A command block.

    Args:
        page: Path of its page in the repository.
        line: Line of its text, from 1.
        kind: "yaml", "python", "bash" or "commands".
        text: What is in it.
        needs: What it needs that a test does not have; None if it is run.
    """

    page: str
    line: int
    kind: str
    text: str
    needs: str | None

    @property
    def title(self) -> str:
        """Where it is."""
        return f"{self.page}:{self.line}"

    @property
    def elsewhere(self) -> str | None:
        """The test that runs it, if it is another one than test_docs_blocks.py."""
        page = Path(self.page).name
        taken = {
            "extending.md": self.kind == "python",
            "cluster.md": self.kind == "bash",
            "store.md": "ids_by_rank.npy" in self.text,
        }
        return ELSEWHERE[page] if taken.get(page) else None


def blocks() -> list[Block]:
    """All command blocks, page by page."""
    return [block for page in PAGES for block in _blocks_of(page)]


def _blocks_of(path: Path) -> Iterator[Block]:
    page = path.relative_to(REPOSITORY).as_posix()
    lines = path.read_text(encoding="utf-8").split("\n")
    i, needs = 0, None
    while i < len(lines):
        fence, first = FENCE.match(lines[i]), i + 1
        if fence:
            language, stop = fence[2].split(" ")[0], lines.index(fence[1], i + 1)
            body, i = lines[first:stop], stop
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            language, first = "", i
            while i + 1 < len(lines) and (lines[i + 1].startswith("    ") or not lines[i + 1]):
                i += 1
            body = [line[4:] for line in lines[first : i + 1]]
        else:
            marked = NEEDS.match(lines[i])
            needs = marked[1] if marked else needs if not lines[i] else None
            i += 1
            continue
        kind = language if language in ("yaml", "python", "bash") else "commands"
        if kind != "commands" or any(map(COMMAND.match, body)):
            yield Block(page, first + 1, kind, "\n".join(body).rstrip() + "\n", needs)
        needs, i = None, i + 1


def commands(block: Block) -> list[list[str]]:
    """Words of each command of a block, without what is said of it beside it."""
    text = re.sub(r"\\\n\s*", "", block.text)
    lines = [line for line in text.splitlines() if COMMAND.match(line)]
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [shlex.split(part) for line in lines for part in _command(line).split("; ")]


def _command(line: str) -> str:
    """A line without its comment or the description in the column behind it."""
    first, *columns = re.split(r"\s{2,}", re.sub(r"\s#\s.*", "", line))
    return " ".join([first, *takewhile(MORE.match, columns)])


def inline_commands() -> list[tuple[str, list[str]]]:
    """Page and words of each command of logitfuse inside a sentence that is whole enough to be read."""
    found = []
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for command in INLINE.findall(text.replace("\n", " ")):
            found.append((path.name, shlex.split(command)))
    return found


def share() -> dict[str, object]:
    """How many blocks there are, how many a test runs, and what the others need."""
    every = blocks()
    needs = Counter(block.needs for block in every if block.needs)
    return {
        "docs_blocks": len(every),
        "docs_blocks_run": round(1 - needs.total() / len(every), 4),
        "not_run": dict(needs),
    }


if __name__ == "__main__":
    print(json.dumps(share()))
