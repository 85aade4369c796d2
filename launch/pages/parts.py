"""What pages are made of: figures on top, and tables; `kit.html` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure on top of a page, with a small note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a table; `kind` is its class: "mean", "words", "code" or none."""

    text: str
    note: str = ""
    best: bool = False
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its name and its cells; `kind` sets it off: "own", "part", "all" or not."""

    label: str
    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: what stands over it, the title and class of each column, the rows."""

    caption: str
    head: Sequence[tuple[str, str]]
    rows: Sequence[Row]


def head_of(titles: Sequence[str]) -> list[tuple[str, str]]:
    """Titles of columns with their classes: the mean's is set off."""
    return [(title, "mean" if title == "mean" else "") for title in titles]
