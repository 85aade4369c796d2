"""The status of a run as a table and for JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import datetime
from typing import Any

from launch.quantities import count_text, duration_text, size_text
from launch.status import RunStatus, WorkerStatus, WorkStatus
from launch.training_status import TrainingStatus
from launch.visible import table
from launch.work import some_shards

STAGE_HEAD = (
    *("stage", "source", "shards", "pending", "failed"),
    *("tokens", "tok/s", "ETA", "on disk", "workers"),
)
WORKER_HEAD = ("worker", "state", "done", "left", "current shard", "tok/s", "seen", "host", "job")


def status_text(status: RunStatus, *, all_workers: bool = False) -> str:
    """The status as text: a table with a line for each stage and source, then what needs attention.

    Args:
        status: Status of the run.
        all_workers: Add a table of all workers of each line, not only of failed and stalled ones.
    """
    lines = [f"{status.name} ({status.folder}), {status.time:%Y-%m-%d %H:%M:%S %Z}", ""]
    lines += table(STAGE_HEAD, [_stage_row(work) for work in status.work], left=(0, 1, 9))
    lines += ["", *(training_line(training) for training in status.trainings)]
    for work in status.work:
        shown = [w for w in work.workers if all_workers or w.needs_care]
        if work.problem is None and not work.failed and not shown:
            continue
        lines += ["", f"{work.stage} {work.source}"]
        if work.problem is not None:
            lines.append(f"  {work.problem}")
        if work.failed:
            lines.append(f"  failed shards: {some_shards(work.failed)}")
        if shown:
            rows = [_worker_row(worker, status.time) for worker in shown]
            head, *body = table(WORKER_HEAD, rows, left=(0, 1, 4, 7, 8))
            errors = (f"  {worker.error}" if worker.error else None for worker in shown)
            lines.append(f"  {head}")
            for row, error in zip(body, errors, strict=True):
                lines += [f"  {row}", *([f"  {error}"] if error else [])]
    return "\n".join(lines)


def _stage_row(work: WorkStatus) -> tuple[str, ...]:
    states = Counter(worker.state for worker in work.workers)
    care = Counter(worker.state for worker in work.workers if worker.needs_care)
    # Workers that failed or stalled are left out once other workers have their shards.
    shown = {"running": states["running"], **{s: care[s] for s in ("failed", "silent")}}
    tokens = count_text(work.tokens_done)
    if work.tokens_left is not None:
        tokens += f" of {count_text(work.tokens_done + work.tokens_left)}"
    return (
        work.stage,
        work.source,
        f"{work.done:,} of {work.total:,}",
        f"{work.pending:,}",
        f"{len(work.failed):,}",
        tokens,
        _rate(work.tokens_per_s),
        _eta(work.eta_s),
        size_text(work.size_bytes),
        ", ".join(f"{count} {state}" for state, count in shown.items() if count) or "-",
    )


def _worker_row(worker: WorkerStatus, now: datetime) -> tuple[str, ...]:
    in_hand = "-"
    if worker.in_hand is not None:
        end = now if worker.state in ("running", "silent") else worker.last
        held = duration_text((end - worker.since).total_seconds())
        in_hand = f"{worker.in_hand} for {held}"
    return (
        str(worker.worker),
        worker.state,
        f"{worker.finished:,}",
        f"{worker.left:,}",
        in_hand,
        _rate(worker.tokens_per_s),
        f"{duration_text((now - worker.last).total_seconds())} ago",
        worker.host,
        worker.job or "-",
    )


def training_line(training: TrainingStatus) -> str:
    """One training on one line."""
    parts = [f"train {training.label}: {training.state}"]
    if training.state != "not begun":
        total = "" if training.num_steps is None else f" of {training.num_steps:,}"
        parts.append(f"step {training.step:,}{total}")
    if training.loss is not None:
        parts.append(f"loss {training.loss:.4f}")
    if training.tokens_per_s is not None:
        parts.append(f"{_rate(training.tokens_per_s)} tok/s")
    if training.eta_s is not None:
        parts.append(f"{_eta(training.eta_s)} left")
    return ", ".join(parts)


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:,.0f}"


def _eta(seconds: float | None) -> str:
    return "-" if seconds is None else duration_text(seconds)


def status_json(status: RunStatus) -> dict[str, Any]:
    """The status for `json_text`; times are in UTC."""
    work = []
    for stage in status.work:
        workers = [asdict(w) | {"worker": str(w.worker)} for w in stage.workers]
        derived = {
            "pending": stage.pending,
            "tokens_per_s": stage.tokens_per_s,
            "eta_s": stage.eta_s,
            "workers": workers,
        }
        work.append(asdict(stage) | derived)
    return asdict(status) | {"work": work}
