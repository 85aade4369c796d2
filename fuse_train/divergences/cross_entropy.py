"""Divergence cross_entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fuse_train.divergences.kind import DivergenceKind

if TYPE_CHECKING:
    from fuse_train.divergences.classes import Classes
    from fuse_train.divergences.kind import ValueAndSlope


class CrossEntropy(DivergenceKind):
    """Cross-entropy of the target under the source.

    Source: FuseLLM (2401.10491) eq. 5 with D = CE.
    """

    def value_and_slope(self, c: Classes, options: Any = None) -> ValueAndSlope:
        """As `DivergenceKind.value_and_slope` says."""
        value_RM = -(c.p_RMK * c.logq_RMK).sum(-1) - c.tail_RM * c.rest_RM.log()
        return value_RM, c.q_RMK * (c.tail_RM / c.rest_RM)[..., None] - c.p_RMK
