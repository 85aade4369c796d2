"""The alignment report as a page: one file that loads nothing and runs nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from align.report.report_sums import BIN_BPB
from align.report.view_page import tile
from launch.visible import visible
from launch.work import some_shards
from store_schema.config import RunConfig
from store_schema.disk.location import open_location

REPORT_FOLDER = "report"
JSON_FILE = "align.json"
PAGE_FILE = "align.html"

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title – logitfuse alignment report</title>
<style>
$css
</style>
</head>
<body>
<main class="report">
<header>
<p class="kind">logitfuse alignment report</p>
<h1>$title</h1>
</header>
<p>What alignment keeps of each source, and what it costs: a source's labels in the target's tokens
against the same source's own tokens, on the bytes that both know. Lower bits per byte are better;
an excess of 0 over a domain means that nothing was lost; between origins it only moves.</p>
$sections
<footer>Stored: mean probability in the source's entries where the target's tokens begin. Kept: in
the aligned entries. Spans are the bytes between two places where tokens of both sides end; one that
holds a token which starts inside a source token counts as inside. Own: the source on all bytes that
it covers. Figures for programs: align.json beside this page.</footer>
</main>
</body>
</html>
""")

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
"""Keys of a row's figures and what stands over them."""
LEAST_EXCESS = 5e-5
"""Nats per byte; less is shown as 0."""


def write_report(run: RunConfig, report: Mapping[str, Any], view: str) -> str:
    """Write align.json and align.html into the run's report folder.

    Args:
        run: The run file.
        report: From `build_report`.
        view: The command that shows a segment, up to its options.

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
    """The whole page.

    Args:
        report: From `build_report`.
        view: The command that shows a segment, up to its options.
    """
    sections = [_section(source, figures, view) for source, figures in report["sources"].items()]
    return _PAGE.substitute(
        title=escape(visible(report["name"])),
        css=files("align.report").joinpath("view.css").read_text(encoding="utf-8"),
        sections="".join(sections),
    )


def number(key: str, value: Any) -> str:
    """A figure of a table as people read it."""
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
    """Which shards are not aligned yet; "" where all are."""
    missing, total = figures["missing_shards"], figures["shards"]
    if not missing:
        return ""
    return f"not aligned yet: {len(missing)} of {total} shards ({some_shards(missing)})"


def costly(worst: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Segments whose excess is not 0 to the digits that are shown."""
    return [item for item in worst if item["excess_nats_per_byte"] >= LEAST_EXCESS]


def view_command(view: str, source: str, worst: Mapping[str, Any]) -> str:
    """The command that shows a segment, by its row where its id cannot be pasted."""
    name = worst["segment_id"]
    wanted = shlex.quote(name) if name.isprintable() and name else str(worst["row"])
    return f"{view} --segment {wanted} --source {source}"


def _section(source: str, figures: Mapping[str, Any], view: str) -> str:
    missing = missing_line(figures)
    made = f", method {escape(figures['method'])}" if figures["method"] else ""
    parts = [f"<section><h2>{escape(source)}{made}</h2>"]
    if missing:
        parts.append(f'<p class="missing">{escape(missing)}</p>')
    every, domains = figures["all"], figures["domains"]
    if not domains:
        return "".join([*parts, "</section>"])
    if not figures["has_source_store"]:
        parts.append('<p class="missing">The source store is not there: no masses as stored.</p>')
    parts += [_tiles(every), _domain_table(source, every, domains)]
    coverage = [(name, item["coverage"] or 0.0) for name, item in domains.items()]
    excess = [(n, i["excess_bpb"]) for n, i in domains.items() if i["excess_bpb"] is not None]
    parts.append('<div class="charts">')
    parts.append(_bars("Coverage by domain", coverage, "share"))
    if excess:
        parts.append(_bars("Excess bits per byte by domain", excess, "excess"))
    parts.append(_histogram(figures["histogram"]["segments"]))
    parts += ["</div>", _worst_table(source, figures["worst"], view), "</section>"]
    return "".join(parts)


def _tiles(every: Mapping[str, Any]) -> str:
    shown = [
        ("positions", every["positions"], "positions"),
        ("covered", every["coverage"], "coverage"),
        ("mass stored", every["mass_stored"], "mass"),
        ("mass kept", every["mass_kept"], "mass"),
        ("aligned bits per byte", every["aligned_bpb"], "bpb"),
        ("source, same bytes", every["source_bpb"], "bpb"),
        ("excess bits per byte", every["excess_bpb"], "excess"),
    ]
    tiles = "".join(tile(label, number(key, value)) for label, value, key in shown)
    return f'<dl class="tiles">{tiles}</dl>'


def _domain_table(source: str, every: Mapping[str, Any], domains: Mapping[str, Any]) -> str:
    rows = []
    named = list(domains.items())
    if len(named) > 1:
        named.append(("all domains", every))
    for name, item in named:
        kind = "all" if item is every and len(domains) > 1 else ""
        rows.append(_row(name, item | {"share": item["coverage"]}, kind))
        rows += [_row(origin, part, "part") for origin, part in item["origins"].items()]
    caption = (
        "Positions by domain and origin; share: of a domain what is covered, of an origin its part"
    )
    return _table(f"{source}: {caption}", ["", *(title for _, title in COLUMNS)], rows)


def _row(name: str, figures: Mapping[str, Any], kind: str) -> str:
    cells = "".join(f"<td>{number(key, figures.get(key))}</td>" for key, _ in COLUMNS)
    label = escape(visible(name))
    return f'<tr class="{kind}"><th scope="row" title="{label}">{label}</th>{cells}</tr>'


def _table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    words = ("domain", "look")
    columns = "".join(
        f'<th scope="col" class="{"words" if title in words else ""}">{escape(title)}</th>'
        for title in head
    )
    caption = escape(caption)
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _worst_table(source: str, worst: Sequence[Mapping[str, Any]], view: str) -> str:
    if not costly(worst):
        return "<p>No segment costs more than its source spends on it.</p>"
    rows = []
    for item in costly(worst):
        name = escape(visible(item["segment_id"]))
        keys = ("common_bytes", "excess_nats_per_byte", "aligned_bpb", "source_bpb")
        cells = "".join(f"<td>{number(key, item[key])}</td>" for key in keys)
        command = escape(visible(view_command(view, source, item)))
        rows.append(
            f'<tr><th scope="row" title="{name}">{name}</th>'
            f'<td class="words">{escape(visible(item["domain"]))}</td>{cells}'
            f'<td class="words"><code>{command}</code></td></tr>'
        )
    if not rows:
        return ""
    head = ["segment", "domain", "bytes", "excess nats/byte", "aligned bpb", "source bpb", "look"]
    return _table(f"{source}: segments of most excess per byte", head, rows)


# ------------------------------------------------------------------------------- charts
# Two shapes that fuse_eval.charts does not have or cannot lend: it stands above this room.

_WIDTH = 340
_LEFT = 110
_ROW = 22
_LEAST_SPAN = 0.005
"""Of an axis, so that rounding does not look like a difference."""


def _chart(title: str, height: float, body: Sequence[str]) -> str:
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3><svg viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )


def _label(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
    )


def _line(x: float, y: float, length: float, *, down: bool) -> str:
    x2, y2 = (x, y + length) if down else (x + length, y)
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="axis"/>'


def _bars(title: str, rows: Sequence[tuple[str, float]], key: str) -> str:
    """Horizontal bars from zero, below zero to the left, each with its value beside it."""
    low = min([0.0, *(value for _, value in rows)])
    high = max([0.0, *(value for _, value in rows)], default=0.0)
    room, span = _WIDTH - _LEFT - 56 - (48 if low < 0 else 0), max(high - low, _LEAST_SPAN)
    zero = _LEFT + (48 if low < 0 else 0) + room * -low / span
    body = []
    for i, (name, value) in enumerate(rows):
        y, length = _ROW * i + 4, room * abs(value) / span
        x = zero if value >= 0 else zero - length
        kind = "fill worse" if key == "excess" and value > 0 else "fill"
        shown = visible(name)
        short = shown if len(shown) <= 16 else shown[:15] + "…"
        end = (zero + length + 5, "start") if value >= 0 else (zero - length - 5, "end")
        body += [
            f"<g><title>{escape(shown)}: {number(key, value)}</title>",
            _label(_LEFT - 8, y + 11, short, "end", "name"),
            f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="14" rx="2" class="{kind}"/>',
            _label(end[0], y + 11, number(key, value), end[1], "value"),
            "</g>",
        ]
    body.append(_line(zero, 0, _ROW * len(rows) + 4, down=True))
    return _chart(title, _ROW * len(rows) + 8, body)


def histogram_bars(segments: Mapping[str, int], most: int = 30) -> tuple[float, list[int], int]:
    """Bins of the report, those around 0 too, put together to at most `most` wide ones.

    Args:
        segments: Segments by bin, as in the report.
        most: Bins that are wanted, at most.

    Returns:
        Bits per byte at the left edge, segments of each wide bin, and how many bins one holds.
    """
    bins = {int(i): count for i, count in segments.items()}
    low, high = min(-4, *bins), max(4, *bins)
    size = -(-(high - low + 1) // most)
    counts = [0] * (-(-(high - low + 1) // size))
    for i, count in bins.items():
        counts[(i - low) // size] += count
    return (low - 0.5) * BIN_BPB, counts, size


def _histogram(segments: Mapping[str, int]) -> str:
    """Segments by their excess."""
    title = "Segments by excess bits per byte"
    if not segments:
        return ""
    left, counts, size = histogram_bars(segments)
    wide, top, height = size * BIN_BPB, max(counts), 130.0
    margin = 34.0
    step = (_WIDTH - margin - 12) / len(counts)
    body = [_label(margin - 5, 18, f"{top:,}", "end"), _label(margin - 5, 10 + height, "0", "end")]
    for i, count in enumerate(counts):
        begin = left + i * wide
        tall, middle = height * count / top, begin + wide / 2
        kind = "fill worse" if middle > BIN_BPB / 2 else "fill"
        body.append(
            f'<rect x="{margin + i * step:.1f}" y="{10 + height - tall:.1f}" '
            f'width="{max(step - 1, 1):.1f}" height="{tall:.1f}" class="{kind}">'
            f"<title>{begin:+.3f} to {begin + wide:+.3f}: {count:,} segments</title></rect>"
        )
    body.append(_line(margin, 10 + height, step * len(counts), down=False))
    for i in sorted({0, len(counts) // 2, len(counts)}):
        anchor = "start" if i == 0 else "end" if i == len(counts) else "middle"
        x = margin + i * step
        body.append(_label(x, 25 + height, f"{left + i * wide:+.3f}", anchor))
    body.append(_label(margin + step * len(counts) / 2, 41 + height, "bits per byte", "middle"))
    return _chart(title, height + 46, body)
