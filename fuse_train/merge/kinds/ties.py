"""Method ties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fuse_train.merge.deltas import DeltaKind, SparseOptions
from fuse_train.merge.kind import Block

if TYPE_CHECKING:
    import torch


class TiesSection(SparseOptions):
    """Method ties."""

    density: float = Field(default=0.2, gt=0, le=1)
    """Share of the entries of each difference that is kept: the largest."""
    normalize: bool = True
    """Mean of the entries that count, not their sum."""


class Ties(DeltaKind):
    """Mean of the largest differences from the base that agree in sign.

    Trim: of each delta_k the `density` of its entries that are largest in magnitude are kept. Elect:
    the sign of sum_k w_k delta_k, entry by entry. Merge: theta = base + scale * the weighted mean of
    the entries that have the elected sign.

    Departure: trimmed tensor by tensor, as in mergekit; the paper trims a model as a whole.

    Source: Yadav et al., NeurIPS 2023.
    """

    section = TiesSection
    elects = True
    paper = "arXiv 2306.01708"

    def measure(self, blocks: Iterable[Block], options: Any) -> Any:
        if options.density == 1:
            return None
        from fuse_train.merge.largest import find_largest

        return find_largest(
            lambda: ((block.start, block.deltas().abs_()) for block in blocks),
            lambda nonzero, total: max(1, int(options.density * total)),
        )

    def sparse(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        deltas_KE = block.deltas()
        if measured is None:
            return deltas_KE
        return deltas_KE.mul_(measured.mask(deltas_KE.abs(), block.start))
