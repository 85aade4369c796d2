"""A step's figures: means of its sums, for the step log and the printed lines.

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
"""A mean weight below this draws a warning that the selector ignores the source."""

COLLAPSE_STEPS = 50
"""Steps of that mean: a single step may hold no text of a source's domain."""


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
        sums: Sums of the step over all processes.
        totals: Counts of the step.
        section: The recipe.
        sources: Names, in the order of M.
        domains: Names, in the order of G.
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
    weights_M, squares_M = (
        sums[name].sum(0) / max(covered, 1.0) for name in ("weights_GM", "squares_GM")
    )
    covered_G = sums["covered_G"].clamp(min=1)
    rows_by_domain = sums["covered_G"].tolist()

    def means(name: str) -> torch.Tensor:
        """Over covered rows, by domain."""
        values = sums[name]
        return values / covered_G.view(-1, *(1,) * (values.ndim - 1))

    def by_source(values_M: torch.Tensor) -> dict[str, Any]:
        return dict(zip(sources, values_M.tolist(), strict=True))

    def by_domain(values: torch.Tensor) -> dict[str, Any]:
        """Of domains that have covered rows; of [G, M] values by source too."""
        return {
            domain: by_source(value) if value.ndim else float(value)
            for domain, value, rows in zip(domains, values, rows_by_domain, strict=True)
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
        "weights": by_source(weights_M),
        "weights_by_domain": by_domain(means("weights_GM")),
        "weight_spread": by_source(deviation(weights_M, squares_M)),
        "weight_spread_by_domain": by_domain(deviation(means("weights_GM"), means("squares_GM"))),
        "load_by_domain": by_domain(means("load_GM")),
        "entropy_by_domain": by_domain(means("entropy_G")),
        "fusion_weights": by_domain(means("fusion_weight_G")),
    }


def deviation(mean: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """Standard deviation from the mean of values and of their squares."""
    return (mean_square - mean * mean).clamp(min=0).sqrt()


def readable(line: dict[str, Any], total: int) -> str:
    """A step log line as one line to print."""
    stage = f" (stage {line['stage']})" if "stage" in line else ""
    parts = [f"step {line['step']}/{total}{stage}", f"loss {line['loss']:.4f}"]
    parts.append(f"clm {line['clm']:.4f}")
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
    """Warns once when the selector gives a source hardly any weight."""

    def __init__(self) -> None:
        self._warned = False
        self._recent: deque[dict[str, float]] = deque(maxlen=COLLAPSE_STEPS)

    def add(self, weights: dict[str, float]) -> None:
        """Add a step's mean weights by source."""
        self._recent.append(weights)
        if len(self._recent) < COLLAPSE_STEPS or self._warned:
            return
        means = {
            name: sum(step[name] for step in self._recent) / COLLAPSE_STEPS for name in weights
        }
        gone = [name for name, weight in means.items() if weight < COLLAPSE_SHARE]
        if gone:
            self._warned = True
            logger.warning(
                "the selector hardly uses %s any more (mean weight below %g); "
                "raise train.feedback_weight if that is not wanted",
                ", ".join(gone),
                COLLAPSE_SHARE,
            )
