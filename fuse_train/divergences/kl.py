"""Divergence kl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fuse_train.divergences.cross_entropy import CrossEntropy

if TYPE_CHECKING:
    from fuse_train.divergences.classes import Classes
    from fuse_train.divergences.kind import ValueAndSlope


class Kl(CrossEntropy):
    """The same less the source's entropy: same gradient, 0 where both agree."""

    def value_and_slope(self, c: Classes, options: Any = None) -> ValueAndSlope:
        """As `DivergenceKind.value_and_slope` says."""
        value_RM, slope_RMK = super().value_and_slope(c)
        entropy_RM = -c.p_RMK.xlogy(c.p_RMK).sum(-1) - c.tail_RM.xlogy(c.tail_RM)
        return value_RM - entropy_RM, slope_RMK
