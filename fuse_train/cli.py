"""Commands of the train stage."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import click

from fuse_train.machine.processes import first_to_report, is_main, process_count, quiet_unless_main
from launch.command import (
    StageGroup,
    echo_json,
    echo_next,
    echo_pages,
    json_option,
    run_options,
    timed_stage,
)
from launch.visible import table
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, LogitfuseError, Stopped

if TYPE_CHECKING:
    from fuse_train.run import Outcome


LISTED_POSITIONS = 20
"""Default of `train explain --top`."""


class TrainGroup(StageGroup):
    """Prints an error once, even if several processes of a training raise it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (LogitfuseError, Stopped) as error:
            if not first_to_report(error.line()):
                sys.exit(error.exit_code)
            raise
        except RuntimeError as error:
            if process_count() == 1 or not _of_another_process(error):
                raise
            line = "train: another process ended; its message, or the launcher's, says why"
            if first_to_report(line):
                print(line, file=sys.stderr)
            sys.exit(LogitfuseError.exit_code)


def _of_another_process(error: RuntimeError) -> bool:
    """Whether a collective failed because a process at its other end is gone."""
    text = str(error)
    return any(
        phrase in text for phrase in ("gloo", "Connection closed", "Connection reset", "NCCL")
    )


@click.group(cls=TrainGroup)
def train() -> None:
    """Train the target on ground truth and the fused sources."""


@train.command("run")
@run_options
@click.option(
    "--allow-partial",
    is_flag=True,
    help="Train although shards of a source, or text of a domain, are missing. Default: an error.",
)
@click.option(
    "--pair",
    metavar="SOURCE",
    help="With train.pairwise: train only this source's pair. Default: all pairs, then merge them.",
)
@json_option
def run_command(run: RunConfig, allow_partial: bool, pair: str | None, as_json: bool) -> None:
    """Train the fused target and its CLM control; resumes where it was stopped."""
    from fuse_train.run import train_run

    if allow_partial:
        run = _with_train(run, allow_partial=True)
    if not is_main():
        quiet_unless_main()
        train_run(run, only=pair)
        return
    with timed_stage(run, "train") as figures:
        outcomes = train_run(run, only=pair)
        figures.update(_figures(outcomes))
    if as_json:
        echo_json({"trainings": [_object(outcome) for outcome in outcomes]})
        return
    for outcome in outcomes:
        if not outcome.fresh:
            click.echo(f"train {outcome.name}: complete, nothing to do")
    click.echo(_table(outcomes))
    echo_next("eval run" if pair is None else "status")


@train.command("check")
@run_options
def check_command(run: RunConfig) -> None:
    """Check recipe and target before there is any data, for what would stop training later."""
    from fuse_train.recipe import check_recipe

    check_recipe(run)
    click.echo("train check: the target loads, its optimizer fits, and it can be saved")


@train.command("selector")
@run_options
@json_option
def selector_command(run: RunConfig, as_json: bool) -> None:
    """Train the selector alone, on the stores, and print what its pool scores."""
    from fuse_train.selector_run import pool_table, train_alone

    with timed_stage(run, "selector") as figures:
        trained = train_alone(run)
        figures["fresh"] = trained.fresh
    if as_json:
        record = trained.record
        about = {"folder": trained.folder, "fresh": trained.fresh, "split": record.split}
        echo_json(about | {"bpb": record.bpb, "hindsight": record.hindsight})
        return
    click.echo(pool_table(trained))
    if not trained.fresh:
        click.echo("train selector: complete, nothing to do")
    echo_next("train run")


@train.command("explain")
@click.option("--segment", metavar="ID", help="Segment id, or its row in the plan.")
@click.option(
    "--document",
    metavar="ID",
    help="Document of the segment. If it has several, --segment is the number there, from 0.",
)
@click.option(
    "--model",
    metavar="target|final|control|FOLDER",
    help="Model to show: the target before training, the fused model, the control, or a folder. "
    "Default: the newest checkpoint, else the final model, else the target.",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="N",
    help="Number of positions listed, those of the largest difference in nats. Default: 20.",
)
@click.option("--all", "every", is_flag=True, help="List every position, in order.")
@json_option
@run_options
def explain_command(
    run: RunConfig,
    segment: str | None,
    document: str | None,
    model: str | None,
    top: int | None,
    every: bool,
    as_json: bool,
) -> None:
    """Show what target and pool predict at each position of a segment, and each source's weight.

    Lists the positions where the two differ most; page by page on a terminal.
    """
    if every and top is not None:
        raise ConfigError(
            "two ways to say which positions are listed", where="--all and --top", expected="one"
        )
    from fuse_train.explain.segment import explain_segment
    from fuse_train.explain.text import as_json as explained_json
    from fuse_train.explain.text import explained_text

    explained = explain_segment(run, segment=segment, document=document, model=model)
    if as_json:
        echo_json(explained_json(explained))
        return
    columns = shutil.get_terminal_size((120, 24)).columns
    echo_pages(explained_text(explained, columns, top=None if every else top or LISTED_POSITIONS))


def _with_train(run: RunConfig, **changes: Any) -> RunConfig:
    from fuse_train.config import TrainSection

    section = run.section("train", TrainSection).model_copy(update=changes)
    return run.model_copy(update={"sections": run.sections | {"train": section}})


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        outcome.name: {
            "num_steps": outcome.record.num_steps,
            "step": outcome.record.step,
            "train_seconds": round(outcome.record.seconds, 3),
        }
        for outcome in outcomes
        if outcome.fresh
    }


def _object(outcome: Outcome) -> dict[str, Any]:
    """One training for JSON."""
    record = outcome.record.model_dump(mode="json", exclude={"schema_version"})
    return {"name": outcome.name, "folder": outcome.folder, "fresh": outcome.fresh} | record


def _table(outcomes: list[Outcome]) -> str:
    """Valid bits per byte of the start and of each trained model, by domain."""
    columns: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        record = outcome.record
        if record.before is not None:
            columns.setdefault("before", record.before)
        if record.after is not None:
            columns[outcome.name] = record.after
    lines = [
        f"{o.name}: step {o.record.step} of {o.record.num_steps}, "
        f"{o.record.seconds:,.0f} s, {o.folder}"
        for o in outcomes
    ]
    if columns:
        rows = [
            [name, *(f"{values[name]:.4f}" for values in columns.values())]
            for name in next(iter(columns.values()))
        ]
        means = (sum(values.values()) / len(values) for values in columns.values())
        rows.append(["mean", *(f"{mean:.4f}" for mean in means)])
        lines += table(["bits per byte, valid", *columns], rows)
        if any(o.name == "fused" and o.record.after is None for o in outcomes):
            lines.append("The merged model is not scored here: `logitfuse eval run` does it.")
    return "\n".join(lines)
