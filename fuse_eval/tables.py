"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fuse_eval.findings import VERDICTS, mean_of
from launch.pages.charts import percent, significant
from launch.visible import table


def bpb_table(
    title: str, rows: Mapping[str, Mapping[str, float]], *, against: str | None = None
) -> str:
    """Rows by domain and mean; the best of each column has a star, the last column compares means.

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
    lines = []
    for name, values in filled.items():
        shown = {c: significant(values[c], 4) if c in values else "-" for c in columns}
        cells = [text + " *"[values.get(c) == best[c]] for c, text in shown.items()]
        if against in filled and name != against:
            cells.append(plain(percent(values["mean"] / filled[against]["mean"] - 1, 2)))
        lines.append([name, *cells, *[""] * (len(columns) - len(cells) + 1)])
    head = ["", *(f"{column} " for column in columns), f"mean against {against}" if against else ""]
    return "\n".join([title, *table(head, lines)])


def document_table(worst: Sequence[Mapping[str, Any]]) -> str:
    """Table of the documents with the largest interference.

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
    title = "worst documents (bits per byte; nats more than the control)"
    return "\n".join([title, *table(heads, rows, left=(4, 5))])


def plain(text: str) -> str:
    """Text for terminals and logs: no narrow spaces, ASCII minus."""
    return text.replace("\u202f", " ").replace("−", "-").replace("–", "-")
