"""A step's figures: means made of its sums, for the step log and for people.

Shape suffixes: M sources, G domains.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from fuse_train.config import TrainSection
from fuse_train.loop.objective import StepTotals, Sums
from fuse_train.losses.losses import importance_cv2

logger = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.01
"""A source whose mean weight over the last steps is below it is as good as gone."""

COLLAPSE_STEPS = 50
"""So many: a single step may hold no text of a source's domain."""


def step_figures(
    sums: Sums,
    totals: StepTotals,
    section: TrainSection,
    *,
    sources: Sequence[str],
    domains: Sequence[str],
    learns: bool,
    pool_trains: bool,
) -> dict[str, Any]:
    """The log line's losses and weights; sums become means here and nowhere else.

    Args:
        sums: Of the step over all processes.
        totals: Its counts.
        section: The recipe.
        sources: Names.
        domains: Names.
        learns: Whether the selector is trained in the step.
        pool_trains: Whether the pool's NLL trains it.
    """
    labels = totals.labels
    loss, clm = float(sums["loss"]) / labels, float(sums["clm"]) / labels
    if "fusion" not in sums:
        return {"loss": loss, "clm": clm}
    covered, pool = float(sums["covered"]), float(sums["pool"]) / max(totals.pool_rows, 1)
    feedback = float(importance_cv2(sums["weights_GM"].sum(0)))
    if learns:
        loss += section.feedback_weight * feedback
        loss += section.pool_weight * pool if pool_trains else 0.0
    weights_M = (sums["weights_GM"].sum(0) / max(covered, 1.0)).tolist()
    covered_G = sums["covered_G"].clamp(min=1)
    rows_by_domain = sums["covered_G"].tolist()

    def by_domain(values: torch.Tensor) -> dict[str, Any]:
        """Means over covered rows of domains that have some; by source where values are."""
        means = (values / covered_G.view(-1, *(1,) * (values.ndim - 1))).tolist()
        return {
            domain: dict(zip(sources, mean, strict=True)) if values.ndim == 2 else mean
            for domain, mean, rows in zip(domains, means, rows_by_domain, strict=True)
            if rows
        }

    spans = {"spans": float(sums["spans"]) / labels} if "spans" in sums else {}
    return spans | {
        "loss": loss,
        "clm": clm,
        "fusion": float(sums["fusion"]) / max(covered, 1.0),
        "feedback": feedback,
        "pool": pool,
        "uncovered": 1.0 - covered / labels,
        "weights": dict(zip(sources, weights_M, strict=True)),
        "weights_by_domain": by_domain(sums["weights_GM"]),
        "load_by_domain": by_domain(sums["load_GM"]),
        "entropy_by_domain": by_domain(sums["entropy_G"]),
    }


def readable(line: dict[str, Any], total: int) -> str:
    """A step log line for people."""
    parts = [f"step {line['step']}/{total}", f"loss {line['loss']:.4f}", f"clm {line['clm']:.4f}"]
    if "fusion" in line:
        parts += [f"fusion {line['fusion']:.4f}", f"pool {line['pool']:.4f}"]
        shown = " ".join(f"{name} {weight:.2f}" for name, weight in line["weights"].items())
        parts += [f"uncovered {line['uncovered']:.1%}", f"weights {shown}"]
    parts += [f"lr {line['lr']:.2e}", f"{line['tokens_per_s']:,.0f} tok/s"]
    if "valid_bpb" in line:
        shown = " ".join(f"{name} {value:.4f}" for name, value in line["valid_bpb"].items())
        parts.append(f"valid bpb {shown}")
    return "  ".join(parts)


class CollapseWatch:
    """Says once when a source has hardly any weight any more."""

    def __init__(self) -> None:
        self._warned = False
        self._heard: deque[dict[str, float]] = deque(maxlen=COLLAPSE_STEPS)

    def see(self, weights: dict[str, float]) -> None:
        """Take note of a step's mean weights."""
        self._heard.append(weights)
        if len(self._heard) < COLLAPSE_STEPS or self._warned:
            return
        means = {name: sum(step[name] for step in self._heard) / COLLAPSE_STEPS for name in weights}
        gone = [name for name, weight in means.items() if weight < COLLAPSE_SHARE]
        if gone:
            self._warned = True
            logger.warning(
                "the selector hardly hears %s any more (mean weight below %g); "
                "raise train.feedback_weight if that is not wanted",
                ", ".join(gone),
                COLLAPSE_SHARE,
            )
