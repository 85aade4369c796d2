"""The alignment report as an HTML page: one file, which loads no other file and runs no script."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.report.report_sums import BIN_BPB
from launch.pages.charts import WIDTH, row_label, svg_chart, svg_rule, svg_text
from launch.pages.page import render
from launch.pages.parts import Cell, Row, Table, Tile
from launch.visible import visible
from launch.work import some_shards
from store_schema.config import RunConfig
from store_schema.disk.location import open_location

REPORT_FOLDER = "report"
JSON_FILE = "align.json"
PAGE_FILE = "align.html"

COLUMNS = (
    ("positions", "positions"),
    ("share", "share"),
    ("mass_stored", "stored"),
    ("mass_kept", "kept"),
    ("spans", "spans"),
    ("common_bytes", "bytes in common"),
    ("aligned_bpb", "aligned bpb"),
    ("source_bpb", "source bpb"),
    ("excess_nats_per_span", "excess nats/span"),
    ("own_bpb", "own bpb"),
)
"""Keys of a row's figures, and their column heads."""
LEAST_EXCESS = 5e-5
"""Nats per byte; a smaller excess is shown as 0."""


def write_report(run: RunConfig, report: Mapping[str, Any], view: str) -> str:
    """Write align.json and align.html into the run's report folder.

    Args:
        run: The run file.
        report: From `build_report`.
        view: The command `logitfuse align view` with the run file, without further options.

    Returns:
        URL of the page.

    Raises:
        StorageError: The disk refused.
    """
    location = open_location(run.folder).child(REPORT_FOLDER)
    text = json.dumps(report, indent=1, allow_nan=False)
    location.write_atomic(JSON_FILE, text.encode() + b"\n")
    location.write_atomic(PAGE_FILE, report_page(report, view).encode())
    return f"{location.url}/{PAGE_FILE}"


def report_page(report: Mapping[str, Any], view: str) -> str:
    """The page as HTML; see `write_report`."""
    sections = [_section(source, figures, view) for source, figures in report["sources"].items()]
    return render("align.report", "report", title=visible(report["name"]), sections=sections)


def number(key: str, value: Any) -> str:
    """A figure of a table as text; its key says how many digits it has."""
    if value is None:
        return "–"
    if key in ("share", "coverage"):
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    digits = 4 if key == "excess_nats_per_byte" else 3
    shown = f"{value:{'+' if key.startswith('excess') else ''}.{digits}f}"
    return shown.lstrip("+-") if float(shown) == 0 else shown


def missing_line(figures: Mapping[str, Any]) -> str:
    """A line on the shards that are not aligned yet; "" where all are."""
    missing, total = figures["missing_shards"], figures["shards"]
    if not missing:
        return ""
    return f"not aligned yet: {len(missing)} of {total} shards ({some_shards(missing)})"


def costly(worst: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Segments whose excess is not 0 to the digits that are shown."""
    return [item for item in worst if item["excess_nats_per_byte"] >= LEAST_EXCESS]


def view_command(view: str, source: str, worst: Mapping[str, Any]) -> str:
    """The command that shows a segment; by row where its id has characters that cannot be pasted."""
    name = worst["segment_id"]
    wanted = shlex.quote(name) if name.isprintable() and name else str(worst["row"])
    return f"{view} --segment {wanted} --source {source}"


def _section(source: str, figures: Mapping[str, Any], view: str) -> dict[str, Any]:
    """What the template needs of a source."""
    every, domains = figures["all"], figures["domains"]
    missing = [missing_line(figures)] if figures["missing_shards"] else []
    title = f"{source}, method {figures['method']}" if figures["method"] else source
    if not domains:
        return {"title": title, "missing": missing, "figures": ()}
    if not figures["has_source_store"]:
        missing.append("The source store is not there, so the mass it stored is not known.")
    coverage = [(name, item["coverage"] or 0.0) for name, item in domains.items()]
    excess = [(n, i["excess_bpb"]) for n, i in domains.items() if i["excess_bpb"] is not None]
    panels = [_bars("Coverage by domain", coverage, "share")]
    if excess:
        panels.append(_bars("Excess bits per byte by domain", excess, "excess"))
    if figures["histogram"]["segments"]:
        panels.append(_histogram(figures["histogram"]["segments"]))
    return {
        "title": title,
        "missing": missing,
        "figures": _tiles(every),
        "domains": _domain_table(source, every, domains),
        "panels": panels,
        "worst": _worst_table(source, figures["worst"], view),
    }


def _tiles(every: Mapping[str, Any]) -> list[Tile]:
    shown = [
        ("positions", every["positions"], "positions"),
        ("covered", every["coverage"], "coverage"),
        ("mass stored", every["mass_stored"], "mass"),
        ("mass kept", every["mass_kept"], "mass"),
        ("aligned bits per byte", every["aligned_bpb"], "bpb"),
        ("source, same bytes", every["source_bpb"], "bpb"),
        ("excess bits per byte", every["excess_bpb"], "excess"),
    ]
    return [Tile(label, number(key, value)) for label, value, key in shown]


def _domain_table(source: str, every: Mapping[str, Any], domains: Mapping[str, Any]) -> Table:
    rows = []
    named = list(domains.items())
    if len(named) > 1:
        named.append(("all domains", every))
    for name, item in named:
        kind = "all" if item is every and len(domains) > 1 else ""
        rows.append(_row(name, item | {"share": item["coverage"]}, kind))
        rows += [_row(origin, part, "part") for origin, part in item["origins"].items()]
    caption = "Positions by domain and origin; share: positions covered, or of an origin"
    head = [("", ""), *((title, "") for _, title in COLUMNS)]
    return Table(f"{source}: {caption}", head, rows)


def _row(name: str, figures: Mapping[str, Any], kind: str) -> Row:
    return Row(visible(name), [Cell(number(key, figures.get(key))) for key, _ in COLUMNS], kind)


def _worst_table(source: str, worst: Sequence[Mapping[str, Any]], view: str) -> Table:
    keys = ("common_bytes", "excess_nats_per_byte", "aligned_bpb", "source_bpb")
    rows = [
        Row(
            visible(item["segment_id"]),
            [
                Cell(visible(item["domain"]), kind="words"),
                *(Cell(number(key, item[key])) for key in keys),
                Cell(visible(view_command(view, source, item)), kind="words code"),
            ],
        )
        for item in costly(worst)
    ]
    titles = [
        "segment",
        "domain",
        "bytes",
        "excess nats/byte",
        "aligned bpb",
        "source bpb",
        "command",
    ]
    head = [(title, "words" if title in ("domain", "command") else "") for title in titles]
    return Table(f"{source}: segments of most excess per byte", head, rows)


# ------------------------------------------------------------------------------- charts

_LEFT = 110
_ROW = 22
_LEAST_SPAN = 0.005
"""Least range of an axis, so that rounding does not look like a difference."""


def _bars(title: str, rows: Sequence[tuple[str, float]], key: str) -> tuple[str, Markup]:
    """Horizontal bars from zero, below zero to the left, each with its value beside it."""
    low = min([0.0, *(value for _, value in rows)])
    high = max([0.0, *(value for _, value in rows)], default=0.0)
    room, span = WIDTH - _LEFT - 56 - (48 if low < 0 else 0), max(high - low, _LEAST_SPAN)
    zero = _LEFT + (48 if low < 0 else 0) + room * -low / span
    body = []
    for i, (name, value) in enumerate(rows):
        y, length = _ROW * i + 4, room * abs(value) / span
        end = (zero + length + 5, "start") if value >= 0 else (zero - length - 5, "end")
        shown = number(key, value)
        mark = Markup(
            '<g><title>{}: {}</title>{}<rect x="{:.1f}" y="{}" width="{:.1f}" height="14" rx="2" '
            'class="fill {}"/>{}</g>'
        )
        body.append(
            mark.format(
                visible(name),
                shown,
                row_label(visible(name), _LEFT - 8, y + 11),
                zero if value >= 0 else zero - length,
                y,
                length,
                "c1" if key == "excess" and value > 0 else "c0",
                svg_text(end[0], y + 11, shown, end[1], "value"),
            )
        )
    body.append(svg_rule(zero, 0, zero, _ROW * len(rows) + 4, "axis"))
    return title, svg_chart(_ROW * len(rows) + 8, title, body)


def histogram_bars(segments: Mapping[str, int], most: int = 30) -> tuple[float, list[int], int]:
    """Merge the report's bins, and always those around 0, into at most `most` bars of equal width.

    Args:
        segments: Number of segments by bin, as in the report.
        most: Bars, at most.

    Returns:
        Bits per byte at the left edge, number of segments of each bar, and bins per bar.
    """
    bins = {int(i): count for i, count in segments.items()}
    low, high = min(-4, *bins), max(4, *bins)
    size = -(-(high - low + 1) // most)
    counts = [0] * (-(-(high - low + 1) // size))
    for i, count in bins.items():
        counts[(i - low) // size] += count
    return (low - 0.5) * BIN_BPB, counts, size


def _histogram(segments: Mapping[str, int]) -> tuple[str, Markup]:
    """Segments by their excess."""
    title = "Segments by excess bits per byte"
    left, counts, size = histogram_bars(segments)
    wide, top, height = size * BIN_BPB, max(counts), 130.0
    margin = 34.0
    step = (WIDTH - margin - 12) / len(counts)
    body = [
        svg_text(margin - 5, 18, f"{top:,}", "end", "tick"),
        svg_text(margin - 5, 10 + height, "0", "end", "tick"),
    ]
    for i, count in enumerate(counts):
        begin = left + i * wide
        tall, middle = height * count / top, begin + wide / 2
        mark = Markup(
            '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="fill {}">'
            "<title>{:+.3f} to {:+.3f}: {:,} segments</title></rect>"
        )
        place = (margin + i * step, 10 + height - tall, max(step - 1, 1), tall)
        colour = "c1" if middle > BIN_BPB / 2 else "c0"
        body.append(mark.format(*place, colour, begin, begin + wide, count))
    end = margin + step * len(counts)
    body.append(svg_rule(margin, 10 + height, end, 10 + height, "axis"))
    for i in sorted({0, len(counts) // 2, len(counts)}):
        anchor = "start" if i == 0 else "end" if i == len(counts) else "middle"
        text = f"{left + i * wide:+.3f}"
        body.append(svg_text(margin + i * step, 25 + height, text, anchor, "tick"))
    body.append(svg_text((margin + end) / 2, 41 + height, "bits per byte", "middle", "unit"))
    return title, svg_chart(height + 46, title, body)
