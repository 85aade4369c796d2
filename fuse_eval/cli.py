"""`logitfuse eval pool`, `logitfuse eval run` and `logitfuse report`."""

from __future__ import annotations

from typing import Any

import click

from fuse_eval.findings import (
    BEFORE,
    CONTROL,
    document_line,
    headline,
    interference_line,
    pool_lines,
    ratio_lines,
    specialist_lines,
    title_of,
)
from fuse_eval.tables import bpb_table, document_table, plain
from launch.command import (
    StageGroup,
    echo_json,
    echo_next,
    json_option,
    run_options,
    timed_stage,
)
from launch.signals import stop_on_signals
from store_schema.config import RunConfig


@click.group("eval", cls=StageGroup)
def evaluate() -> None:
    """Score models and pools of sources in bits per byte."""


@evaluate.command("pool")
@json_option
@run_options
def pool_command(run: RunConfig, as_json: bool) -> None:
    """Score each source and each pool from the stores alone, before training."""
    from fuse_eval.run import estimate_pools

    with timed_stage(run, "pool") as figures, stop_on_signals() as stop:
        result = estimate_pools(run, stop)
        figures["fresh"] = result.fresh
    if as_json:
        echo_json(result.content)
        return
    click.echo(pool_report(result.content))
    if not result.fresh:
        click.echo("eval pool: complete, nothing to do")
    echo_next("train run")


@evaluate.command("run")
@json_option
@run_options
def run_command(run: RunConfig, as_json: bool) -> None:
    """Score the target before training, CLM control, fused model and sources, and compare them."""
    from fuse_eval.run import evaluate as evaluate_run

    with timed_stage(run, "evaluate") as figures, stop_on_signals() as stop:
        result = evaluate_run(run, stop)
        figures["fresh"] = result.fresh
    if as_json:
        echo_json(result.content)
        return
    click.echo(evaluation_report(result.content))
    if not result.fresh:
        click.echo("eval run: complete, nothing to do")
    echo_next("report")


@evaluate.command("interference")
@click.option(
    "--against",
    metavar="RUN",
    help="Another evaluated run, by its run file or folder, whose interference is compared.",
)
@click.option(
    "--control",
    metavar="RUN",
    help="A run whose control is used instead of the run's own; if it has none, its fused model.",
)
@json_option
@run_options
def interference_command(
    run: RunConfig, against: str | None, control: str | None, as_json: bool
) -> None:
    """Show documents and domains on which the fused model is worse than the control."""
    from fuse_eval.interference.compare_runs import run_interference

    content = run_interference(run, against=against, control=control)
    if as_json:
        echo_json(content)
    else:
        click.echo(interference_report(content))


@evaluate.command("advantage")
@json_option
@run_options
def advantage_command(run: RunConfig, as_json: bool) -> None:
    """Count how often each source is best: by likelihood, by its own judged answers, and by both."""
    from fuse_eval.advantage import advantage, advantage_table
    from fuse_eval.summary import ADVANTAGE_FILE, report_location, write_json

    content = advantage(run)
    write_json(report_location(run), ADVANTAGE_FILE, content)
    if as_json:
        echo_json(content)
    else:
        click.echo(advantage_table(content))
        echo_next("report")


@evaluate.command("answers")
@json_option
@run_options
def answers_command(run: RunConfig, as_json: bool) -> None:
    """Let all models of the run answer held-out prompts, and count right answers."""
    from fuse_eval.answers.report import answer_table
    from fuse_eval.answers.run import count_right

    with timed_stage(run, "answers") as figures, stop_on_signals() as stop:
        result = count_right(run, stop)
        figures["fresh"] = result.fresh
    if as_json:
        echo_json(result.content)
        return
    click.echo(answer_table(result.content))
    if not result.fresh:
        click.echo("eval answers: complete, nothing to do")
    echo_next("report")


@evaluate.command("harness")
@click.option("--tasks", metavar="NAME,...", help="Tasks and groups, instead of the run file's.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Most examples of a task, instead of the run file's.",
)
@json_option
@run_options
def harness_command(run: RunConfig, tasks: str | None, limit: int | None, as_json: bool) -> None:
    """Run tasks of lm-evaluation-harness on all models of the run."""
    from fuse_eval.config import EvaluateSection
    from fuse_eval.harness.report import harness_table
    from fuse_eval.harness.run import run_harness

    section = run.section("evaluate", EvaluateSection).harness
    if tasks is not None:
        named = tuple(name.strip() for name in tasks.split(",") if name.strip())
        section = section.model_copy(update={"tasks": named})
    if limit is not None:
        section = section.model_copy(update={"limit": limit})
    with timed_stage(run, "harness") as figures, stop_on_signals() as stop:
        result = run_harness(run, section, stop)
        figures["fresh"] = result.fresh
    if as_json:
        echo_json(result.content)
        return
    click.echo(harness_table(result.content))
    if not result.fresh:
        click.echo("eval harness: complete, nothing to do")
    echo_next("report")


@click.command()
@json_option
@run_options
def report(run: RunConfig, as_json: bool) -> None:
    """Write the report of a run: summary.json and a page with plots."""
    from fuse_eval.report import write_report

    with timed_stage(run, "report") as figures:
        url, fresh = write_report(run)
        figures["fresh"] = fresh
    if as_json:
        echo_json({"page": url, "fresh": fresh})
        return
    click.echo(f"report: {url}" if fresh else f"report: {url} complete, nothing to do")


def pool_report(content: dict[str, Any]) -> str:
    """The estimate as text."""
    domains = content["domains"].values()
    rows = sum(item["rows"] for item in domains)
    common = sum(item["common_rows"] for item in domains)
    whole = sum(item["bytes"] for item in domains)
    shared = sum(item["common_bytes"] for item in domains)
    own = bpb_table(
        "each source on its own tokens, whole segments (bits per byte)", content["source_bpb"]
    )
    named = {"target now": content["target_bpb"]}
    named |= {f"{source} alone": values for source, values in content["alone_bpb"].items()}
    for selector, values in content["pool_bpb"].items():
        hindsight = " (hindsight)" if selector in content.get("hindsight", ()) else ""
        named[f"pool {selector}{hindsight}"] = values
    if content.get("mixture"):
        named["best mixture with target"] = {d: m["bpb"] for d, m in content["mixture"].items()}
    if content.get("forecast"):
        control = {d: f["control_bpb"] for d, f in content["forecast"].items()}
        named["plain training (estimated)"] = control
    title = (
        f"pools on split {content['split']} (bits per byte), on the rows that every source knows: "
        f"{common / max(rows, 1):.1%} of the target's tokens, {shared / max(whole, 1):.1%} of bytes"
    )
    pools = bpb_table(title, named, against="target now")
    return "\n".join([own, "", pools, "", *map(plain, pool_lines(content))])


def evaluation_report(content: dict[str, Any]) -> str:
    """The evaluation as text."""
    rows = {title_of(model): values for model, values in content["bpb"].items()}
    against = title_of(CONTROL if CONTROL in content["bpb"] else BEFORE)
    sizes = content["domains"].values()
    title = (
        f"bits per byte on split {content['split']}: {sum(s['bytes'] for s in sizes):,} bytes that "
        f"every model predicts ({sum(s['excluded_bytes'] for s in sizes):,} at starts of segments "
        "are context)"
    )
    lines = [
        headline(content),
        interference_line(content),
        document_line(content),
        *specialist_lines(content),
    ]
    return "\n".join([bpb_table(title, rows, against=against), "", *(plain(x) for x in lines if x)])


def interference_report(content: dict[str, Any]) -> str:
    """Interference as text."""
    lines = [interference_line(content), document_line(content)]
    if "other_run" in content:
        lines += ratio_lines(content["other_run"], content["confidence"])
    parts = [plain(line) for line in lines if line]
    worst = content["interference"]["worst_documents"]
    return "\n".join([*parts, *(["", document_table(worst)] if worst else [])])
