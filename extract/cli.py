"""The commands `corpus build`, `corpus show`, `extract ...` and `store tune`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from launch.command import (
    SOURCE_OPTION,
    StageGroup,
    echo_json,
    echo_next,
    echo_next_of,
    echo_pages,
    json_option,
    run_options,
    timed_stage,
    work_options,
)
from launch.work import Part, chosen_sources
from store_schema.config import RunConfig
from store_schema.errors import ConfigError


@click.group(cls=StageGroup)
def corpus() -> None:
    """Turn text into documents."""


@click.group(cls=StageGroup)
def extract() -> None:
    """Plan segments and score them with each source."""


def child_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that a parent process gives its child: see `extract.scoring.children`."""
    halvings = click.option(
        "--halvings", type=int, default=0, help="How often vLLM's step size is halved."
    )
    stop_fd = click.option("--stop-fd", type=int, help="Pipe; the child stops when it is closed.")
    return stop_fd(halvings(function))


@corpus.command("build")
@run_options
@json_option
def build(run: RunConfig, as_json: bool) -> None:
    """Read the inputs, check every document and write the corpus."""
    from extract.corpus.corpus import build_corpus, later_splits, plan_lines
    from extract.report.tables import corpus_report

    with timed_stage(run, "corpus") as figures:
        record, changed = build_corpus(run)
        figures |= {"documents": record.num_documents, "dropped": sum(record.dropped.values())}
    warnings = [*later_splits(run, record), *plan_lines(run, record)]
    if as_json:
        content = record.model_dump(mode="json", exclude={"schema_version"})
        echo_json(content | {"fresh": changed, "warnings": warnings})
        return
    click.echo(corpus_report(record) if changed else "corpus complete, nothing to do")
    for line in warnings:
        click.echo(line)
    echo_next("extract plan")


@corpus.command("show")
@click.option(
    "--document",
    "wanted",
    required=True,
    metavar="ID",
    help="Id of a document, or of a chat for all its responses.",
)
@run_options
@json_option
def show(run: RunConfig, wanted: str, as_json: bool) -> None:
    """Show a document as each model reads it, and which part is trained on; page by page on a
    terminal."""
    from extract.plan.planning import load_tokenizers
    from extract.report.document_view import find_documents, objects, shown

    documents, tokenizers = find_documents(run, wanted), load_tokenizers(run).values()
    if not as_json:
        echo_pages("\n".join(shown(documents, tokenizers)))
        return
    for content in objects(documents, tokenizers):
        echo_json(content)


@extract.command("plan")
@click.option(
    "--recut",
    is_flag=True,
    help="Make a new plan although stores were made with the present one, and uncommit shards whose "
    "segments change.",
)
@run_options
@json_option
def plan(run: RunConfig, recut: bool, as_json: bool) -> None:
    """Split documents into segments, assign them to shards, and estimate the cost of scoring."""
    from extract.config import ExtractSection, PlanSection
    from extract.plan.kept_plan import existing_stores, uncommit_changed
    from extract.plan.planning import make_plan
    from extract.report.outlook import store_lines
    from extract.report.tables import plan_figures, plan_report

    with timed_stage(run, "plan") as figures:
        made, changed = make_plan(run, recut=recut)
        uncommitted = uncommit_changed(made, existing_stores(run)) if recut else []
        figures |= {"segments": made.record.num_segments, "shards": len(made.shards)}
    stores = store_lines(run, made, only_refused=not (changed or as_json))
    costs = plan_figures(
        made.record,
        (*run.sources, "target"),
        entries=run.section("extract", ExtractSection).max_entries,
        tokens_per_s=run.section("plan", PlanSection).assumed_tokens_per_s,
    )
    if as_json:
        echo_json(costs | {"fresh": changed, "uncommitted": uncommitted, "stores": stores})
        return
    report = plan_report(costs) if changed else "plan complete, nothing to do"
    click.echo("\n".join([*uncommitted, report, *stores]))
    echo_next("extract generate" if _judges(run) else "extract run")


@extract.command("run")
@run_options
@work_options
@json_option
def run_all(
    run: RunConfig, sources: tuple[str, ...], part: Part, dry_run: bool, as_json: bool
) -> None:
    """Score the corpus with each source, one after the other; resumes where it was stopped."""
    from extract.report.tables import SourceFigures, source_report
    from extract.run import SCORING

    if dry_run:
        _dry_run(run, sources, part, SCORING, as_json=as_json)
        return
    worked = _worked(run, sources, part, SCORING, SourceFigures.read)
    _tell(worked, sources, SCORING.name, source_report, as_json=as_json)
    if not as_json:
        echo_next_of(run, sources, part, "eval advantage" if _judges(run) else "align run")


def _judges(run: RunConfig) -> bool:
    """Whether the run is there for its sources' answers."""
    return bool(getattr(run.sections.get("judge"), "judges", ()))


def _dry_run(
    run: RunConfig, sources: tuple[str, ...], part: Part, stage: Any, *, as_json: bool
) -> None:
    from extract.run import dry_run

    lines = dry_run(run, sources, part, stage)
    if as_json:
        echo_json({"stage": stage.name, "dry_run": lines})
    else:
        click.echo("\n".join(lines))


def _worked(
    run: RunConfig,
    sources: tuple[str, ...],
    part: Part,
    stage: Any,
    read: Callable[[RunConfig, str], Any],
) -> list[Any]:
    """Do a stage's pending shards of each source; the figures of the sources that had any."""
    from extract.run import run_sources

    with timed_stage(run, stage.name) as figures:
        worked = [read(run, name) for name in run_sources(run, sources, part, stage)]
        if worked:
            figures["tokens_per_s"] = {s.name: s.tokens_per_s for s in worked}
    return worked


def _tell(
    worked: list[Any],
    sources: tuple[str, ...],
    stage: str,
    report: Callable[[list[Any]], str],
    *,
    as_json: bool,
) -> None:
    """Report on the sources that a stage worked on, and name those that were complete."""
    names = [source.name for source in worked]
    complete = [name for name in sources if name not in names]
    if as_json:
        done = {source.name: source.figures() for source in worked}
        echo_json({"stage": stage, "sources": done, "complete": complete})
        return
    for name in complete if worked else ():
        click.echo(f"{stage} {name} complete, nothing to do")
    click.echo(report(worked) if worked else f"{stage} complete, nothing to do")


@extract.command("run-source", hidden=True)
@run_options
@work_options
@child_options
@click.option("--require-gpus", type=int, default=0, help="GPUs that the process must see.")
def run_one(
    run: RunConfig,
    sources: tuple[str, ...],
    part: Part,
    stop_fd: int | None,
    halvings: int,
    require_gpus: int,
    **_: Any,
) -> None:
    """The process that `run`, or a scheduler's worker, starts for each source."""
    from extract.engines.memory import check_gpus
    from extract.run import run_source

    check_gpus(require_gpus)
    for name in sources:
        run_source(run, name, part, stop_fd=stop_fd, halvings=halvings)


@extract.command("import")
@click.option(
    "--capture",
    "path",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Folder of a DistillKit capture's Parquet files, or one of them.",
)
@click.option(
    "--compression",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML with the capture's compression parameters. Default: compression_config.yaml beside it.",
)
@run_options
@work_options
@json_option
def import_one(
    run: RunConfig,
    sources: tuple[str, ...],
    part: Part,
    dry_run: bool,
    path: Path,
    compression: Path | None,
    as_json: bool,
) -> None:
    """Fill the store of one source from distributions that DistillKit captured; resumes."""
    from extract.captures.files import Capture
    from extract.captures.importing import check_capture, import_capture, import_lines
    from launch.signals import stop_on_signals

    if len(sources) != 1:
        raise ConfigError(
            "a capture is of one model",
            where="--source",
            expected="one name",
            got=", ".join(sources),
        )
    [name] = sources
    with timed_stage(run, "extract"), stop_on_signals() as flag:
        checked = check_capture(run, name, Capture.open(path, compression))
        done = import_capture(checked, part, flag, dry=dry_run)
    if as_json:
        echo_json({"source": name, "dry_run": dry_run} | asdict(done))
        return
    click.echo("\n".join(import_lines(name, done, dry=dry_run)))
    if not dry_run:
        echo_next_of(run, sources, part, "align run")


@extract.command("generate")
@run_options
@work_options
@json_option
def generate_all(
    run: RunConfig, sources: tuple[str, ...], part: Part, dry_run: bool, as_json: bool
) -> None:
    """Generate answers to the corpus's prompts with each source, one after the other."""
    from extract.generation.generate import ANSWERING
    from extract.report.answer_report import AnswerFigures, answer_report

    if dry_run:
        _dry_run(run, sources, part, ANSWERING, as_json=as_json)
        return
    worked = _worked(run, sources, part, ANSWERING, AnswerFigures.read)
    _tell(worked, sources, ANSWERING.name, answer_report, as_json=as_json)
    if not as_json:
        after = "judge run" if _judges(run) else "extract answers --out answers.jsonl"
        echo_next_of(run, sources, part, after)


@extract.command("generate-source", hidden=True)
@run_options
@work_options
@child_options
def generate_one(
    run: RunConfig,
    sources: tuple[str, ...],
    part: Part,
    stop_fd: int | None,
    halvings: int,
    **_: Any,
) -> None:
    """The process that `generate` starts for each source."""
    from extract.generation.generate import ANSWERING
    from extract.run import run_source

    for name in sources:
        run_source(run, name, part, ANSWERING, stop_fd=stop_fd, halvings=halvings)


@extract.command("answers")
@run_options
@SOURCE_OPTION
@click.option(
    "--out",
    required=True,
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write: JSON lines, one object for each answer.",
)
@click.option(
    "--keep-cut",
    is_flag=True,
    help="Write answers that were cut at generate.max_tokens too. Default: they are left out.",
)
@json_option
def answers(
    run: RunConfig, names: tuple[str, ...], out: Path, keep_cut: bool, as_json: bool
) -> None:
    """Write generated answers as a JSON lines file for `corpus.inputs`."""
    from extract.generation.answer_documents import answers_report, write_answers

    counts = write_answers(run, chosen_sources(run, names), out, keep_cut=keep_cut)
    if as_json:
        echo_json({"file": out, "sources": counts})
    else:
        click.echo(answers_report(counts, out))


@click.command("tune")
@click.option("--source", required=True, metavar="NAME", help="Source that scores the sample.")
@click.option(
    "--positions",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Token positions in the sample.",
)
@click.option(
    "--tolerance",
    default=0.01,
    show_default=True,
    metavar="TV",
    help="The smallest encoding is recommended whose total variation distance from the whole "
    "distribution (0 to 1) is at most this much above that of keeping all entries.",
)
@json_option
@run_options
def tune(run: RunConfig, source: str, positions: int, tolerance: float, as_json: bool) -> None:
    """Try every encoding on a sample of the plan and recommend one, before extraction."""
    from extract.tune import recommended, tune_json, tune_table
    from extract.tune import tune as try_all

    trials = try_all(run, source, num_positions=positions)
    chosen = recommended(trials, tolerance)
    if as_json:
        echo_json(tune_json(trials, chosen))
    else:
        click.echo(tune_table(trials, chosen))
