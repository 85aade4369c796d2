"""Commands of this room: `corpus build`, `extract plan`, `extract run`, `store tune`."""

from __future__ import annotations

import click

from launch.command import StageGroup, run_options, timed_stage
from store_schema.config import RunConfig


@click.group(cls=StageGroup)
def corpus() -> None:
    """Turn text into documents."""


@click.group(cls=StageGroup)
def extract() -> None:
    """Plan segments and score them with each source."""


@corpus.command("build")
@run_options
def build(run: RunConfig) -> None:
    """Read the inputs, check every document and write the corpus."""
    from extract.corpus import build_corpus
    from extract.tables import corpus_report

    with timed_stage(run, "corpus") as figures:
        record, changed = build_corpus(run)
        figures |= {"documents": record.num_documents, "dropped": sum(record.dropped.values())}
    if not changed:
        click.echo("corpus complete, nothing to do")
        return
    click.echo(corpus_report(record))


@extract.command("plan")
@run_options
def plan(run: RunConfig) -> None:
    """Cut documents for all tokenizers, deal them into shards, and tell what scoring will cost."""
    from extract.config import ExtractSection, PlanSection
    from extract.planning import make_plan
    from extract.tables import plan_report

    with timed_stage(run, "plan") as figures:
        made, changed = make_plan(run)
        figures |= {"segments": made.record.num_segments, "shards": len(made.shards)}
    if not changed:
        click.echo("plan complete, nothing to do")
        return
    section = run.section("extract", ExtractSection)
    speed = run.section("plan", PlanSection).assumed_tokens_per_s
    click.echo(plan_report(made.record, entries=section.max_entries, tokens_per_s=speed))


@extract.command("run")
@click.option("--source", "sources", multiple=True, metavar="NAME", help="Only this source.")
@click.option("--worker", "worker_text", metavar="I/N", help="Only part I (from 0) of N.")
@run_options
def run_all(run: RunConfig, sources: tuple[str, ...], worker_text: str | None) -> None:
    """Score each source's pending shards, one source after the other."""
    from extract.run import run_extract
    from extract.tables import SourceFigures, source_report
    from launch.work import parse_worker

    worker = parse_worker(worker_text)
    with timed_stage(run, "extract") as figures:
        todo = run_extract(run, sources, worker)
        if todo:
            found = [SourceFigures.read(run, name) for name in todo]
            figures["tokens_per_s"] = {source.name: source.tokens_per_s for source in found}
    for name in sources or run.sources:
        if todo and name not in todo:
            click.echo(f"extract {name} complete, nothing to do")
    if not todo:
        click.echo("extract complete, nothing to do")
        return
    click.echo(source_report(found))


@extract.command("run-source", hidden=True)
@click.option("--source", required=True)
@click.option("--worker", "worker_text")
@click.option("--leash", type=int, default=None, help="Pipe whose closing asks to stop.")
@run_options
def run_one(run: RunConfig, source: str, worker_text: str | None, leash: int | None) -> None:
    """What `run` starts for each source: the same work in this very process."""
    from extract.run import run_source
    from launch.work import parse_worker

    run_source(run, source, parse_worker(worker_text), leash)


@click.command("tune")
@click.option("--source", required=True, metavar="NAME", help="Whose distributions to look at.")
@click.option(
    "--positions",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Size of the sample.",
)
@click.option(
    "--tolerance",
    default=0.01,
    show_default=True,
    help="Total variation that a smaller store may lose.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
@run_options
def tune(run: RunConfig, source: str, positions: int, tolerance: float, as_json: bool) -> None:
    """Try every encoding on a sample of the plan and recommend one, before extraction."""
    from extract.tune import recommended, tune_json, tune_table
    from extract.tune import tune as try_all

    found = try_all(run, source, num_positions=positions)
    chosen = recommended(found, tolerance)
    click.echo(tune_json(found, chosen) if as_json else tune_table(found, chosen))
