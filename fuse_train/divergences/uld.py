"""Divergence uld."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fuse_train.divergences.kind import DivergenceKind

if TYPE_CHECKING:
    from fuse_train.divergences.classes import Classes
    from fuse_train.divergences.kind import ValueAndSlope


class Uld(DivergenceKind):
    """Distance of sorted probabilities, for sources whose tokens have no counterpart.

    Sum of |p_k - q_k| over classes; with K the target's own most probable tokens it compares sorted
    distributions without a vocabulary map.

    Source: ULD (2402.12030). Departure: what is beyond the K most probable is one class; the paper pads
    the shorter vocabulary with zeros.
    """

    needs_tail_bucket = True
    sorts = True

    def value_and_slope(self, c: Classes, options: Any = None) -> ValueAndSlope:
        """As `DivergenceKind.value_and_slope` says."""
        over_RMK, over_RM = c.q_RMK - c.p_RMK, c.rest_RM - c.tail_RM
        slope_RMK = c.q_RMK * (over_RMK.sign() - over_RM.sign()[..., None])
        return over_RMK.abs().sum(-1) + over_RM.abs(), slope_RMK
