"""Commands of the train stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from launch.command import StageGroup, run_options, timed_stage
from store_schema.config import RunConfig

if TYPE_CHECKING:
    from fuse_train.run import Outcome


@click.group(cls=StageGroup)
def train() -> None:
    """Train the target on ground truth and the fused sources."""


@train.command("run")
@run_options
def run_command(run: RunConfig) -> None:
    """Train the fused target and its CLM control; goes on where it was stopped."""
    from fuse_train.run import train_run

    with timed_stage(run, "train") as figures:
        outcomes = train_run(run)
        figures.update(_figures(outcomes))
    for outcome in outcomes:
        if not outcome.fresh:
            print(f"train {outcome.record.label}: complete, nothing to do")
    print(_table(outcomes))


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
