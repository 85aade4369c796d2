"""What the report page is put together from: sections, tables, rows, cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

Panels = list[tuple[str, Markup]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a table."""

    text: str
    note: str = ""
    best: bool = False
    mean: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its name and its cells; `own` sets it off."""

    label: str
    cells: Sequence[Cell]
    own: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page."""

    caption: str
    head: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it.

    The first table has the other tables and the charts of `beside` at its side.
    """

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    beside: Panels = field(default_factory=list)
    panels: Panels = field(default_factory=list)
    missing: bool = False


def table_head(first: str, names: Sequence[str], *, mean: bool = True) -> list[dict[str, Any]]:
    """Headings of a table's columns.

    Args:
        first: Over the row names.
        names: Over the cells.
        mean: Whether a column of means stands last.
    """
    head: list[dict[str, Any]] = [{"text": first, "mean": False}]
    head += [{"text": name, "mean": False} for name in names]
    return [*head, {"text": "mean", "mean": True}] if mean else head
