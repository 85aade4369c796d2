"""Elements of pages: figures on top, and tables, as `kit.html` renders them."""

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
    """A row: its name and its cells; `kind` is its CSS class: "own", "part", "all" or none."""

    label: str
    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: caption, title and CSS class of each column, rows."""

    caption: str
    head: Sequence[tuple[str, str]]
    rows: Sequence[Row]


def head_of(titles: Sequence[str]) -> list[tuple[str, str]]:
    """Titles of columns with their CSS classes: "mean" for the column of that name."""
    return [(title, "mean" if title == "mean" else "") for title in titles]
