"""What `align run`, `align view` and `align report` print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from align.report.report_page import costly, missing_line, number, view_command
from align.report.view import Token, ViewedSegment
from align.report.view_page import figures, shown
from launch.quantities import share_text
from launch.visible import cut, quoted, table, visible
from store_schema.layout import Origin
from store_schema.store.segment_rows import ORIGINS, Row

_NAME_COLUMNS = 22


def summary_table(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Coverage, mass and speed of each source (`align.run.AlignSummary.figures`)."""
    head = ("source", "positions", "coverage", "boundary", "inside", "mass in", "mass out", "tok/s")
    rows = []
    for source, of in sources.items():
        speed = of["tokens_per_s"]
        row = (
            source,
            of["positions"],
            *(f"{of[name]:.2%}" for name in ("coverage", "boundary", "inside")),
            *(f"{of[name]:.3f}" for name in ("mass_in", "mass_out")),
            "-" if speed is None else f"{speed:,.0f}",
        )
        rows.append(row)
    foot = (
        "coverage: share of target tokens with a distribution; mass: mean probability in entries, "
        "as stored and as aligned; tok/s: of all shards of this run but the first, which waits for "
        "code to be compiled"
    )
    return "\n".join([*table(head, rows), foot])


# ---- view


def view_text(view: ViewedSegment) -> str:
    """Figures of the page as text: a line for the segment and one for each source."""
    segment = view.segment
    lines = [
        f"segment {visible(segment.segment_id)} (row {segment.index}, shard {view.shard}, "
        f"domain {visible(segment.domain)}, split {visible(segment.split)}): "
        f"{len(segment.text.encode()):,} bytes"
    ]
    return "\n".join(lines + [f"{source.name}: {figures(source)}" for source in view.sources])


def position_text(view: ViewedSegment, position: int) -> str:
    """The distributions at one target position, as text: each source's own and the aligned one."""
    text = view.segment.text.encode()
    blocks = []
    for source in view.sources:
        row, span = source.positions[position], source.spans[source.span_of[position]]
        covering = source.covering(row.start)
        theirs = None if covering is None else source.tokens[covering]
        head = (
            f"{source.name}: position {position}, {shown(source.target_names[row.token_id])}, "
            f"bytes {row.start} to {row.end}, {ORIGINS[source.origins[position]]}"
        )
        left = ["source: no token"]
        if theirs is not None:
            left = _column(f"source token {covering}", theirs, source.source_names)
        right = _column(f"target position {position}", row, source.target_names)
        titles, *rows = zip_longest(left, right, fillvalue="")
        lines = [f"  {line}" for line in table(titles, rows, left=(0, 1))]
        excess = "not known" if span.excess_nats is None else f"{span.excess_nats:+.3f} nats"
        foot = (
            f"  span {source.span_of[position]}, {cut(quoted(text[span.start : span.end]), 40)}: "
            f"source {_nats(span.source_nats)}, aligned {_nats(span.aligned_nats)}, "
            f"excess {excess}"
        )
        blocks.append("\n".join([head, *lines, foot]))
    return "\n\n".join(blocks)


def view_object(view: ViewedSegment, position: int | None) -> dict[str, Any]:
    """The figures of the page for JSON, with the aligned distributions at `position` if it is given."""
    segment = view.segment
    sources = {}
    for source in view.sources:
        aligned, own = source.bpb or (None, None)
        sources[source.name] = {
            "source_tokens": len(source.tokens),
            "target_positions": len(source.positions),
            "origins": {origin.name.lower(): source.count(origin) for origin in Origin},
            "spans": len(source.spans),
            "common_bytes": source.common_bytes,
            "aligned_bpb": aligned,
            "source_bpb": own,
        }
        if position is not None:
            sources[source.name]["position"] = asdict(source.positions[position])
    place = {"row": segment.index, "shard": view.shard, "domain": segment.domain}
    return {"segment": segment.segment_id, **place, "split": segment.split, "sources": sources}


def _column(title: str, row: Row, names: Mapping[int, Token]) -> list[str]:
    """One distribution: a line for each entry, with * at the token that the text has."""
    entries = list(row.entries)
    if row.logprob is not None and row.token_id not in dict(entries):
        entries.append((row.token_id, row.logprob))
    lines = [
        ("*" if token == row.token_id else " ", shown(names[token]), math.exp(logprob))
        for token, logprob in entries
    ]
    if row.left_out:
        lines.append((" ", f"{row.left_out} more", row.left_out_mass))
    lines.append((" ", "tail", row.tail_mass))
    first, *rows = ((mark + cut(name, _NAME_COLUMNS), share_text(p)) for mark, name, p in lines)
    return [f"{title}: {_nats(row.logprob)}", *table(first, rows)]


def _nats(nats: float | None) -> str:
    return "not known" if nats is None else f"{abs(nats):.3f} nats"


# ---- report


REPORT_COLUMNS = {
    "positions": "positions",
    "share": "share",
    "mass_stored": "stored",
    "mass_kept": "kept",
    "common_bytes": "bytes",
    "aligned_bpb": "aligned",
    "source_bpb": "source",
    "excess_nats_per_span": "nats/span",
}


def report_text(source: str, item: Mapping[str, Any], view: str) -> str:
    """One source's tables for a terminal."""
    lines = [f"{source}: {missing_line(item)}"] if item["missing_shards"] else []
    if not item["domains"]:
        return "\n".join(lines)
    if not item["has_source_store"]:
        lines.append(f"{source}: no source store, so the mass it stored is not known")
    if item["method"]:
        lines.append(f"{source}: aligned by method {item['method']}")
    parts = dict(item["domains"])
    if len(parts) > 1:
        parts["all domains"] = item["all"]
    rows = []
    for name, part in parts.items():
        rows.append(_report_row(visible(name), part | {"share": part["coverage"]}))
        rows += [_report_row(f"  {origin}", of) for origin, of in part["origins"].items()]
    lines += [
        *table([source, *REPORT_COLUMNS.values()], rows),
        "share: of a domain's positions, those covered, or of an origin; stored, kept: mean mass in",
        "entries; aligned, source: bits per byte on the same bytes; nats/span: NLL that alignment adds",
    ]
    if costly(item["worst"]):
        lines.append("most excess, nats per byte:")
    for worst in costly(item["worst"]):
        command = visible(view_command(view, source, worst))
        lines.append(f"{worst['excess_nats_per_byte']:>+9.4f}  {command}")
    return "\n".join(lines)


def _report_row(name: str, item: Mapping[str, Any]) -> list[str]:
    return [name, *(number(key, item.get(key)).replace("–", "-") for key in REPORT_COLUMNS)]
