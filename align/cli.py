"""`logitfuse align ...`: run, view, report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import click

from align.report.report import build_report
from align.report.report_page import costly, missing_line, number, view_command, write_report
from align.report.view import Token, ViewedSegment, read_view, require_position
from align.report.view_page import figures, page, shown
from align.run import AlignSummary, align_source
from align.run import dry_run as try_out
from launch.command import (
    SOURCE_OPTION,
    StageGroup,
    echo_json,
    echo_next_of,
    json_option,
    run_options,
    run_words,
    timed_stage,
    work_options,
)
from launch.pages.page import write_page
from launch.quantities import share_text
from launch.signals import stop_on_signals
from launch.visible import cut, quoted, table, visible
from launch.work import Part, chosen_sources
from store_schema.config import RunConfig
from store_schema.errors import ConfigError
from store_schema.layout import Origin
from store_schema.store.segment_rows import ORIGINS, Row

_NAME_COLUMNS = 22


@click.group(cls=StageGroup)
def align() -> None:
    """Convert distributions to the target's tokens."""


@align.command("run")
@run_options
@work_options
@json_option
def run_command(
    run: RunConfig, sources: tuple[str, ...], part: Part, dry_run: bool, as_json: bool
) -> None:
    """Align every source store of the run; resumes where it was stopped."""
    if dry_run:
        lines = [try_out(run, source, part) for source in sources]
        if as_json:
            echo_json({"stage": "align", "dry_run": lines})
        else:
            click.echo("\n".join(lines))
        return
    summaries = []
    with timed_stage(run, "align") as figures, stop_on_signals() as stop:
        for source in sources:
            summaries.append(align_source(run, source, part, stop))
        figures["shards"] = sum(summary.done for summary in summaries)
        figures["coverage"] = {s.source: round(s.coverage, 6) for s in summaries}
    if as_json:
        echo_json(
            {
                "stage": "align",
                "sources": {s.source: summary_figures(s) for s in summaries if s.done},
                "complete": [s.source for s in summaries if not s.done],
            }
        )
        return
    click.echo(summary_table(summaries))
    if not any(summary.done for summary in summaries):
        click.echo("align: complete, nothing to do")
    echo_next_of(run, sources, part, "eval pool")


def summary_figures(summary: AlignSummary) -> dict[str, Any]:
    """Coverage, mass and speed of one source, for JSON."""
    positions = max(summary.total("positions"), 1.0)
    covered = max(positions - summary.total("origin_none"), 1.0)
    stored = max(summary.total("source_positions"), 1.0)
    return {
        "positions": int(summary.total("positions")),
        "coverage": summary.coverage,
        "boundary": summary.total("origin_boundary") / positions,
        "inside": summary.total("origin_inside") / positions,
        "mass_in": summary.total("mass_in") / stored,
        "mass_out": summary.total("mass_out") / covered,
        "tokens_per_s": summary.tokens_per_s,
    }


def summary_table(summaries: list[AlignSummary]) -> str:
    """Coverage, mass and speed per source, for people."""
    head = ("source", "positions", "coverage", "boundary", "inside", "mass in", "mass out", "tok/s")
    rows = []
    for summary in summaries:
        of = summary_figures(summary)
        speed = of["tokens_per_s"]
        row = (
            summary.source,
            max(of["positions"], 1),
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


# ------------------------------------------------------------------------------- view


@align.command("view")
@click.option("--segment", required=True, metavar="ID", help="Segment id, or its row in the plan.")
@click.option(
    "--position",
    type=click.IntRange(0),
    metavar="N",
    help="Open the page at the segment's target token N (from 0), and print its distributions.",
)
@click.option(
    "--top",
    type=click.IntRange(1, 1000),
    default=12,
    show_default=True,
    metavar="N",
    help="Most probable tokens shown of each distribution.",
)
@click.option(
    "--out",
    metavar="PATH",
    help="HTML file to write. Default: report/view-ROW.html in the run's folder.",
)
@json_option
@SOURCE_OPTION
@run_options
def view_segment(
    run: RunConfig,
    names: tuple[str, ...],
    segment: str,
    position: int | None,
    top: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Write an HTML page of one segment: both tokenisations, with each source's distributions before
    and after alignment.

    It shows all sources of the run, or those named by --source.
    """
    if out is not None and not out.rpartition("/")[2]:
        raise ConfigError(
            "the path names no file", where="--out", expected="like page.html", got=repr(out)
        )
    view = read_view(run, chosen_sources(run, names), segment, top=top)
    if position is not None:
        require_position(view, position)
    path = out or f"{run.folder}/report/view-{view.segment.index}.html"
    write_page(path, page(view, position or 0))
    if as_json:
        echo_json(view_object(view, position) | {"page": path})
        return
    click.echo(summary(view))
    if position is not None:
        click.echo(f"\n{position_text(view, position)}\n")
    click.echo(f"written to {path}")


def summary(view: ViewedSegment) -> str:
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


# ------------------------------------------------------------------------------- report


@align.command("report")
@click.option(
    "--worst",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    metavar="N",
    help="How many of the segments with the largest excess NLL are listed.",
)
@SOURCE_OPTION
@json_option
@run_options
def report_command(run: RunConfig, names: tuple[str, ...], worst: int, as_json: bool) -> None:
    """Show how much probability alignment keeps, by source, domain and origin, and the NLL it adds.

    Reads what is aligned so far; writes align.json and align.html into the run's report folder.
    """
    report = build_report(run, chosen_sources(run, names), num_worst=worst)
    view = f"logitfuse align view {run_words()}"
    url = write_report(run, report, view)
    if as_json:
        echo_json(report | {"page": url})
        return
    for source, item in report["sources"].items():
        click.echo(report_text(source, item, view) + "\n")
    click.echo(f"written to {url}")


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
