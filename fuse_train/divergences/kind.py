"""What a divergence is to the rest of the program; read with the run file, so it needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from store_schema.registry import Kind

if TYPE_CHECKING:
    import torch

    from fuse_train.divergences.classes import Classes

    ValueAndSlope = tuple[torch.Tensor, torch.Tensor]


class DivergenceKind(Kind):
    """Base of all divergences; options stand in `train.loss`."""

    needs_tail_bucket: ClassVar[bool] = False
    """Whether it means nothing between parts of distributions: it needs the tail as a class."""
    sorts: ClassVar[bool] = False
    """Whether both sides are sorted first: the target's most probable tokens stand beside the source's
    most probable entries, whatever tokens these are."""

    def value_and_slope(self, c: Classes, options: Any) -> ValueAndSlope:
        """D [R, M] in nats, and its slope g [R, M, K] to the target's log-probabilities.

        g_k = d D / d log q_k with rest = 1 - sum_j exp(log q_j). An entry that is not there has
        p = q = 0 and log q = 0, and must get slope 0.

        Args:
            c: Source and target over the source's K entries and one class for all other tokens.
            options: Its own, of the run file.
        """
        raise NotImplementedError
