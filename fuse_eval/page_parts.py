"""Parts of the report page: sections of text, tables of figures and panels of charts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from fuse_eval.findings import mean_of, title_of
from launch.pages.charts import percent, significant
from launch.pages.parts import Cell, Row, Table, head_of

Panels = list[tuple[str, Markup]]


@dataclass(frozen=True, slots=True)
class Section:
    """A section: heading, texts, tables and charts.

    The other tables and the charts of `beside` are shown beside the first table.
    """

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    beside: Panels = field(default_factory=list)
    panels: Panels = field(default_factory=list)
    missing: bool = False


def figure_table(
    caption: str,
    first: str,
    rows: Mapping[str, Mapping[str, float]],
    *,
    own: str | None = None,
    against: str | None = None,
    sources: Collection[str] = (),
) -> Table:
    """Models or selectors as rows, domains and their mean as columns, the best of each marked.

    Args:
        caption: Over the table.
        first: Heading of the row names.
        rows: {name: {domain: bits per byte}}.
        own: Row that is highlighted.
        against: Row that the small figures compare with.
        sources: Rows that are sources; domains often have the same names.
    """
    domains = sorted({domain for values in rows.values() for domain in values})
    filled = {name: {**values, "": mean_of(values)} for name, values in rows.items() if values}
    best = {
        domain: min(values.get(domain, math.inf) for values in filled.values())
        for domain in [*domains, ""]
        if filled
    }
    base = filled.get(against or "", {})
    shown = []
    for name, values in filled.items():
        cells = []
        for domain in [*domains, ""]:
            value = values.get(domain)
            text = "–" if value is None else significant(value, 4)
            note = ""
            if value is not None and base.get(domain) and name != against:
                note = percent(value / base[domain] - 1)
            is_best = value is not None and value == best[domain]
            cells.append(Cell(text, note, is_best, "" if domain else "mean"))
        label = f"{name} (source)" if name in sources else title_of(name)
        shown.append(Row(label, cells, "own" if name == own else ""))
    return Table(caption, head_of([first, *domains, "mean"]), shown)
