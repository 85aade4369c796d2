"""Commands of the train stage."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from fuse_train.machine.processes import is_main, process_count, quiet_beside_main, tells
from launch.command import StageGroup, run_options, timed_stage
from store_schema.config import RunConfig
from store_schema.errors import LogitfuseError, Stopped

if TYPE_CHECKING:
    from fuse_train.run import Outcome


class TrainGroup(StageGroup):
    """Tells an error once, whichever of the processes of a training has it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (LogitfuseError, Stopped) as error:
            if not tells(error.line()):
                sys.exit(error.exit_code)
            raise
        except RuntimeError as error:
            if process_count() == 1 or not _of_another_process(error):
                raise
            line = "train: another process ended; its message, or the launcher's, says why"
            if tells(line):
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
    help="Go on where shards of a source, or text of a domain, are missing.",
)
def run_command(run: RunConfig, allow_partial: bool) -> None:
    """Train the fused target and its CLM control; goes on where it was stopped."""
    from fuse_train.run import train_run

    if allow_partial:
        run = _with_train(run, allow_partial=True)
    if not is_main():
        quiet_beside_main()
        train_run(run)
        return
    with timed_stage(run, "train") as figures:
        outcomes = train_run(run)
        figures.update(_figures(outcomes))
    for outcome in outcomes:
        if not outcome.fresh:
            print(f"train {outcome.record.label}: complete, nothing to do")
    print(_table(outcomes))


@train.command("check")
@run_options
def check_command(run: RunConfig) -> None:
    """Check recipe and target without data: before extraction, what would stop training after it."""
    from fuse_train.recipe import check_recipe

    check_recipe(run)
    print("train check: the target loads, its optimizer fits, and it can be saved")


@train.command("selector")
@run_options
def selector_command(run: RunConfig) -> None:
    """Train the selector alone, on the stores, and say what its pool would score."""
    from fuse_train.selector_run import table, train_alone

    with timed_stage(run, "selector") as figures:
        trained = train_alone(run)
        figures["fresh"] = trained.fresh
    print(table(trained))
    if not trained.fresh:
        print("train selector: complete, nothing to do")


def _with_train(run: RunConfig, **changes: Any) -> RunConfig:
    from fuse_train.config import TrainSection

    section = run.section("train", TrainSection).model_copy(update=changes)
    return run.model_copy(update={"sections": run.sections | {"train": section}})


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        outcome.record.label: {
            "num_steps": outcome.record.num_steps,
            "step": outcome.record.step,
            "train_seconds": round(outcome.record.seconds, 3),
        }
        for outcome in outcomes
        if outcome.fresh
    }


def _table(outcomes: list[Outcome]) -> str:
    """Valid bits per byte of the start and of each trained model, by domain."""
    columns: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        record = outcome.record
        if record.before is not None:
            columns.setdefault("before", record.before)
        if record.after is not None:
            columns[record.label] = record.after
    lines = [
        f"{o.record.label}: step {o.record.step} of {o.record.num_steps}, "
        f"{o.record.seconds:,.0f} s, {o.folder}"
        for o in outcomes
    ]
    if columns:
        names = list(next(iter(columns.values())))
        width = max(len("bits per byte, valid"), *map(len, names))
        lines.append("bits per byte, valid".ljust(width) + "".join(f"{c:>10}" for c in columns))
        for name in names:
            cells = "".join(f"{values[name]:>10.4f}" for values in columns.values())
            lines.append(name.ljust(width) + cells)
        means = (sum(values.values()) / len(values) for values in columns.values())
        lines.append("mean".ljust(width) + "".join(f"{mean:>10.4f}" for mean in means))
    return "\n".join(lines)
