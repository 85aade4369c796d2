"""Divergence reverse_kl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fuse_train.divergences.kind import DivergenceKind

if TYPE_CHECKING:
    from fuse_train.divergences.classes import Classes
    from fuse_train.divergences.kind import ValueAndSlope

MIN_PROBABILITY = 1e-12
"""Least probability under a source whose logarithm is taken."""


class ReverseKl(DivergenceKind):
    """KL of target and source the other way round, which seeks modes.

    Source: MiniLLM (2306.08543), here token by token.
    """

    needs_tail_bucket = True

    def value_and_slope(self, c: Classes, options: Any = None) -> ValueAndSlope:
        """As `DivergenceKind.value_and_slope` says."""
        excess_RMK = c.logq_RMK - c.p_RMK.clamp(min=MIN_PROBABILITY).log()
        excess_RM = c.rest_RM.log() - c.tail_RM.clamp(min=MIN_PROBABILITY).log()
        value_RM = (c.q_RMK * excess_RMK).sum(-1) + c.rest_RM * excess_RM
        return value_RM, c.q_RMK * (excess_RMK - excess_RM[..., None])
