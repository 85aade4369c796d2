"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fuse_eval.charts import percent, significant
from fuse_eval.findings import VERDICTS, mean_of


def bpb_table(
    title: str, rows: Mapping[str, Mapping[str, float]], *, against: str | None = None
) -> str:
    """Rows by domain and mean; the best of each column starred, the change of the mean behind.

    Args:
        title: First line.
        rows: {name: {domain: bits per byte}}.
        against: Row that the last column compares with.
    """
    filled = {name: {**values, "mean": mean_of(values)} for name, values in rows.items() if values}
    columns = list(
        dict.fromkeys(key for values in filled.values() for key in values if key != "mean")
    )
    columns = [*sorted(columns), "mean"]
    best = {
        c: min(values[c] for values in filled.values() if c in values) for c in columns if filled
    }
    width = max([len(name) for name in filled] + [12])
    sizes = [max(len(column), 8) for column in columns]
    head = " ".join(f"{c:>{size + 1}}" for c, size in zip(columns, sizes, strict=True))
    lines = [title, f"{'':<{width}} {head}" + (f"  mean against {against}" if against else "")]
    for name, values in filled.items():
        cells = []
        for column, size in zip(columns, sizes, strict=True):
            value = values.get(column)
            shown = "-" if value is None else significant(value, 4)
            cells.append(f"{shown:>{size}}" + ("*" if value == best[column] else " "))
        change = ""
        if against in filled and name != against:
            change = "  " + plain(percent(values["mean"] / filled[against]["mean"] - 1, 2))
        lines.append(f"{name:<{width}} {' '.join(cells)}{change}".rstrip())
    return "\n".join(lines)


def document_table(worst: Sequence[Mapping[str, Any]]) -> str:
    """The documents that fusing makes worst, one a line.

    Args:
        worst: `worst_documents` of an interference record.
    """
    heads = ("control", "fused", "change", "nats", "verdict", "document")
    rows = [
        (
            significant(item["against_bpb"], 4),
            significant(item["bpb"], 4),
            "-" if item["change"] is None else plain(percent(item["change"])),
            plain(f"+{significant(item['excess_nats'])}"),
            VERDICTS[item["verdict"]],
            f"{item['domain']}: {item['document_id']}",
        )
        for item in worst
    ]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        figures = [f"{cell:>{width}}" for cell, width in zip(row[:4], widths, strict=False)]
        lines.append("  ".join([*figures, f"{row[4]:<{widths[4]}}", row[5]]))
    return "\n".join(["worst documents (bits per byte; nats more than the control)", *lines])


def plain(text: str) -> str:
    """Text for terminals and logs: no narrow spaces, ASCII minus."""
    return text.replace("\u202f", " ").replace("−", "-").replace("–", "-")
