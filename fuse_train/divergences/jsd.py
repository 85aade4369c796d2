"""Divergence jsd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fuse_train.divergences.kind import DivergenceKind

if TYPE_CHECKING:
    from fuse_train.divergences.classes import Classes
    from fuse_train.divergences.kind import ValueAndSlope


class Jsd(DivergenceKind):
    """Jensen-Shannon: both against their mixture, in which the source has weight `jsd_beta` (0.5).

    beta KL(P, M) + (1 - beta) KL(Q, M), M = beta P + (1 - beta) Q.

    Source: GKD (2306.13649).
    """

    section = Annotated[float, Field(gt=0, lt=1)]
    section_at = "jsd_beta"
    always_in_fingerprint = True
    needs_tail_bucket = True

    def default_options(self) -> float:
        """Symmetric."""
        return 0.5

    def value_and_slope(self, c: Classes, options: float) -> ValueAndSlope:
        """As `DivergenceKind.value_and_slope` says; `options` is beta."""
        import torch

        beta, tiny = options, torch.finfo(c.q_RMK.dtype).tiny
        logmix_RMK = (beta * c.p_RMK + (1 - beta) * c.q_RMK).clamp(min=tiny).log()
        logmix_RM = (beta * c.tail_RM + (1 - beta) * c.rest_RM).log()
        excess_RMK, excess_RM = c.logq_RMK - logmix_RMK, c.rest_RM.log() - logmix_RM
        of_source_RM = (c.p_RMK.xlogy(c.p_RMK) - c.p_RMK * logmix_RMK).sum(-1)
        of_source_RM += c.tail_RM.xlogy(c.tail_RM) - c.tail_RM * logmix_RM
        of_target_RM = (c.q_RMK * excess_RMK).sum(-1) + c.rest_RM * excess_RM
        slope_RMK = (1 - beta) * c.q_RMK * (excess_RMK - excess_RM[..., None])
        return beta * of_source_RM + (1 - beta) * of_target_RM, slope_RMK
