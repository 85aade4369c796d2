"""Base class of divergences; imported when a run file is read, so it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from store_schema.registry import Kind

if TYPE_CHECKING:
    import torch

    from fuse_train.divergences.classes import Classes

    ValueAndSlope = tuple[torch.Tensor, torch.Tensor]


class DivergenceKind(Kind):
    """Base of all divergences; their options are in `train.loss`."""

    needs_tail_bucket: ClassVar[bool] = False
    """Whether it needs whole distributions, and so the tail as a class."""
    sorts: ClassVar[bool] = False
    """Whether it compares the source's k-th most probable entry with the target's k-th most probable
    token, whatever tokens these are."""

    def value_and_slope(self, c: Classes, options: Any) -> ValueAndSlope:
        """D [R, M] in nats, and its slope g [R, M, K] to the target's log-probabilities.

        g_k = d D / d log q_k with rest = 1 - sum_j exp(log q_j). An entry that is not there has
        p = q = 0 and log q = 0, and must get slope 0.

        Args:
            c: Source and target over the source's K entries and one class for all other tokens.
            options: Its options, from the run file.
        """
        raise NotImplementedError
