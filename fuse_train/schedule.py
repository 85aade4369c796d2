"""Learning rate and optimizer: the rate is a pure function of the step, so resuming restores it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from fuse_train.config import TrainSection


def rate_factor(step: int, num_steps: int, *, warmup_ratio: float, floor: float) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine to `floor`."""
    warmup = max(1, round(warmup_ratio * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(
    model: torch.nn.Module, selector: Iterable[torch.nn.Parameter], section: TrainSection
) -> torch.optim.AdamW:
    """AdamW with weight decay on the target's matrices only, and the selector at its own rate.

    Source: FuseLLM's recipe (betas 0.9, 0.95, weight decay 0.1). Departure: biases, norms and the
    selector do not decay.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if p.ndim >= 2],
            "peak_lr": section.lr,
            "weight_decay": section.weight_decay,
        },
        {
            "params": [p for p in trainable if p.ndim < 2],
            "peak_lr": section.lr,
            "weight_decay": 0.0,
        },
        {"params": list(selector), "peak_lr": section.asn.lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=section.lr, betas=(0.9, 0.95), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Put every group at `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
