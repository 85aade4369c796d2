"""`logitfuse align ...`: run, view, report."""

from __future__ import annotations

import click

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
from launch.signals import stop_on_signals
from launch.work import Part, chosen_sources
from store_schema.config import RunConfig
from store_schema.errors import ConfigError


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
    from align.report.text import summary_table
    from align.run import align_source
    from align.run import dry_run as try_out

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
    worked = {summary.source: summary.figures() for summary in summaries}
    if as_json:
        complete = [summary.source for summary in summaries if not summary.done]
        echo_json({"stage": "align", "sources": worked, "complete": complete})
        return
    click.echo(summary_table(worked))
    if not any(summary.done for summary in summaries):
        click.echo("align: complete, nothing to do")
    echo_next_of(run, sources, part, "eval pool")


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
    from align.report.text import position_text, view_object, view_text
    from align.report.view import read_view, require_position
    from align.report.view_page import page
    from launch.pages.page import write_page

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
    click.echo(view_text(view))
    if position is not None:
        click.echo(f"\n{position_text(view, position)}\n")
    click.echo(f"written to {path}")


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
    from align.report.report import build_report
    from align.report.report_page import write_report
    from align.report.text import report_text

    report = build_report(run, chosen_sources(run, names), num_worst=worst)
    view = f"logitfuse align view {run_words()}"
    url = write_report(run, report, view)
    if as_json:
        echo_json(report | {"page": url})
        return
    for source, item in report["sources"].items():
        click.echo(report_text(source, item, view) + "\n")
    click.echo(f"written to {url}")
