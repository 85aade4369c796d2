"""`logitfuse align run`."""

from __future__ import annotations

import click

from align.run import AlignSummary, align_source
from align.run import dry_run as try_out
from launch.command import StageGroup, run_options, timed_stage, work_options
from launch.signals import stop_on_signals
from launch.work import Part
from store_schema.config import RunConfig


@click.group(cls=StageGroup)
def align() -> None:
    """Carry distributions into the target's tokens."""


@align.command("run")
@run_options
@work_options
def run_command(run: RunConfig, sources: tuple[str, ...], part: Part, dry_run: bool) -> None:
    """Align every source store of the run; goes on where it was stopped."""
    if dry_run:
        for source in sources:
            click.echo(try_out(run, source, part))
        return
    summaries = []
    with timed_stage(run, "align") as figures, stop_on_signals() as stop:
        for source in sources:
            summaries.append(align_source(run, source, part, stop))
        figures["shards"] = sum(summary.done for summary in summaries)
        figures["coverage"] = {s.source: round(s.coverage, 6) for s in summaries}
    click.echo(table(summaries))
    if not any(summary.done for summary in summaries):
        click.echo("align: complete, nothing to do")


def table(summaries: list[AlignSummary]) -> str:
    """Coverage, mass and speed per source, for people."""
    head = (
        f"{'source':<14}{'positions':>11}{'coverage':>10}{'boundary':>10}{'inside':>8}"
        f"{'mass in':>9}{'mass out':>10}{'tok/s':>10}"
    )
    lines = [head]
    for summary in summaries:
        positions = max(summary.total("positions"), 1.0)
        covered = max(positions - summary.total("origin_none"), 1.0)
        aligned = positions * summary.done / max(len(summary.commits), 1)
        rate = f"{aligned / summary.seconds:,.0f}" if summary.done else "-"
        lines.append(
            f"{summary.source:<14}{positions:>11,.0f}{summary.coverage:>10.2%}"
            f"{summary.total('origin_boundary') / positions:>10.2%}"
            f"{summary.total('origin_inside') / positions:>8.2%}"
            f"{summary.total('mass_in') / max(summary.total('source_positions'), 1.0):>9.3f}"
            f"{summary.total('mass_out') / covered:>10.3f}{rate:>10}"
        )
    lines.append(
        "coverage: share of target tokens with a distribution; mass: mean probability in entries, "
        "as stored and as aligned"
    )
    return "\n".join(lines)
