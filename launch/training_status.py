"""The status of a run's trainings, read from their step logs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from launch.json_lines import read_lines
from launch.summary import logs_folder, pair_folders
from launch.worklog import Reason
from store_schema.config import RunConfig

STEP_LOGS = {"fused": "train_steps.jsonl", "control": "control_steps.jsonl"}
SUMMARIES = "train.jsonl"
RECENT_STEPS = 20
"""Number of last steps whose mean is the speed."""
SILENT_S = 600.0
"""A training is `silent` (stalled) when it wrote nothing for this long,"""
SILENT_STEPS = 20
"""and for longer than this many times its slowest recent step."""

State = Literal["running", Reason, "silent"]
TrainingState = Literal["not begun", State]


@dataclass(frozen=True, slots=True)
class TrainingStatus:
    """One training.

    Args:
        label: "fused", "control", or the pair of a pairwise training: "with NAME".
        state: `silent` is stalled: its logs have no end, and no new line for long.
        step: Steps done.
        num_steps: Steps in all; None before the first step.
        loss: Loss of the last step, nats.
        tokens_per_s: Mean speed of the last steps.
        eta_s: Seconds to the last step at that speed, without evaluations; None if it does not run.
    """

    label: str
    state: TrainingState
    step: int
    num_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None


def read_trainings(run: RunConfig, time: datetime) -> tuple[TrainingStatus, ...]:
    """The fused training or those of all pairs, and the control where the run has one."""
    section = run.sections.get("train")
    folder = logs_folder(run)
    ending = _last_ending(folder / SUMMARIES)
    logs = {
        f"with {name}": place / "logs" / STEP_LOGS["fused"]
        for name, place in pair_folders(run).items()
    } or {"fused": folder / STEP_LOGS["fused"]}
    if getattr(section, "control", True):
        logs["control"] = folder / STEP_LOGS["control"]
    return tuple(_training(label, path, ending, time) for label, path in logs.items())


def _training(
    label: str, path: Path, ending: tuple[datetime, TrainingState] | None, time: datetime
) -> TrainingStatus:
    try:
        lines, _ = read_lines(path)
        last = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        lines = []
    steps = [line for line in lines if line.get("step") and line.get("num_steps")]
    if not lines:
        return TrainingStatus(label, "not begun", 0, None, None, None, None)
    recent = steps[-RECENT_STEPS:]
    seconds = [float(line.get("seconds", 0.0)) for line in recent]
    step, total = (int(steps[-1]["step"]), int(steps[-1]["num_steps"])) if steps else (0, None)
    patience = max(SILENT_S, SILENT_STEPS * max(seconds, default=0.0))
    state: TrainingState = "running"
    if total is not None and step >= total:
        state = "done"
    elif ending is not None and ending[0] >= last - timedelta(seconds=1):
        state = ending[1]
    elif time - last > timedelta(seconds=patience):
        state = "silent"
    eta = None
    if state == "running" and total is not None:
        eta = (total - step) * sum(seconds) / len(seconds)
    rates = [float(line["tokens_per_s"]) for line in recent if "tokens_per_s" in line]
    return TrainingStatus(
        label=label,
        state=state,
        step=step,
        num_steps=total,
        loss=_number(steps[-1].get("loss")) if steps else None,
        tokens_per_s=sum(rates) / len(rates) if rates else None,
        eta_s=eta,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _last_ending(path: Path) -> tuple[datetime, TrainingState] | None:
    """When the train stage last ended early, and whether "stopped" or "failed"; None if it did not."""
    try:
        lines, _ = read_lines(path)
        ended = datetime.strptime(lines[-1]["ended"], "%Y-%m-%dT%H:%M:%S%z")
        error = str(lines[-1]["error"])
    except (OSError, LookupError, ValueError, TypeError):
        return None
    return ended, "stopped" if error.startswith("Stopped") else "failed"
