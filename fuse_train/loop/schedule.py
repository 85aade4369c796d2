"""Learning rates: pure functions of the step, so resuming restores them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fuse_train.config import TrainSection
from store_schema.errors import ConfigError

MOST_STEPS_UNSAVED = 100
"""Most steps between checkpoints, unless the run file sets them."""


def steps_between_checkpoints(section: TrainSection, num_steps: int) -> int:
    """`checkpoint_every`; without it a tenth of the training, at most 100 steps."""
    return section.checkpoint_every or min(math.ceil(num_steps / 10), MOST_STEPS_UNSAVED)


def steps_in_all(section: TrainSection, num_samples: int, staged: int | None = None) -> int:
    """Optimizer steps of a whole training.

    Args:
        section: The recipe.
        num_samples: Samples of an epoch.
        staged: Steps of all stages; None for a training without stages.
    """
    if staged is not None:
        return min(staged, section.max_steps or staged)
    per_epoch = num_samples / section.batch_segments
    return section.max_steps or max(1, math.ceil(section.epochs * per_epoch - 1e-9))


def progress_at(step: int, num_steps: int) -> float:
    """Progress of the training at a step (from 0): 0 at the first, 1 at the last."""
    return min(step / max(1, num_steps - 1), 1.0)


def rate_factor(step: int, num_steps: int, *, warmup_ratio: float, floor: float) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine to `floor`."""
    warmup = warmup_steps(num_steps, warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    """Steps in which the rate rises, at least one."""
    return max(1, round(warmup_ratio * num_steps))


def rate_schedule(section: TrainSection, num_steps: int) -> Callable[[int], float]:
    """The schedule `train.lr_scheduler_type`: from a step (from 0) to its share of the peak rate.

    The schedules are transformers' (`get_scheduler`). One departure, for all but constant: the warm-up
    begins with 1 / warm-up steps of the peak, not with 0, which would waste the first batch.

    Raises:
        ConfigError: `train.lr_scheduler_kwargs` do not fit that schedule.
    """
    name, extra = section.lr_scheduler_type, dict(section.lr_scheduler_kwargs)
    warmup = warmup_steps(num_steps, section.warmup_ratio)
    if name in ("cosine_with_min_lr", "warmup_stable_decay"):
        key = "min_lr_rate" if name == "cosine_with_min_lr" else "min_lr_ratio"
        extra = {key: section.min_lr_ratio} | extra
    after = _of_transformers(name, section.lr, warmup, num_steps, extra)

    def factor(step: int) -> float:
        if name != "constant" and step < warmup:
            return (step + 1) / warmup
        return float(after(step))

    return factor


def _of_transformers(
    name: str, lr: float, warmup: int, num_steps: int, extra: dict[str, Any]
) -> Callable[[int], float]:
    from transformers import get_scheduler

    unused = torch.optim.SGD([torch.zeros(1)], lr=lr)
    where = "train.lr_scheduler_kwargs"
    if extra and name in ("constant", "constant_with_warmup"):
        raise ConfigError(f"schedule {name} takes none", where=where, got=", ".join(extra))
    try:
        scheduler = get_scheduler(name, unused, warmup, num_steps, extra)
        after: Callable[[int], float] = scheduler.lr_lambdas[0]
        after(warmup)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"do not fit schedule {name}", where=where, got=str(error)) from error
    return after


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
