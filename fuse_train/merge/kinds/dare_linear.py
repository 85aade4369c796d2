"""Method dare_linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fuse_train.merge.deltas import DeltaKind, SparseOptions

if TYPE_CHECKING:
    import torch

    from fuse_train.merge.kind import Block


class DareSection(SparseOptions):
    """Methods dare_linear and dare_ties."""

    rescale: bool = True
    """Divide the entries that are kept by `density`."""


class DareLinear(DeltaKind):
    """Weighted sum of the differences from the base, entries of which are dropped at random.

    theta = base + scale * sum_k w_k m_k delta_k / density, m_k drawn from Bernoulli(density) entry by
    entry: the expected difference stays what it was.

    mergekit brings the kept entries to the magnitude (sum of absolute values) of all instead, which
    is the same up to the noise of the draw.

    Source: Yu et al., ICML 2024.
    """

    section = DareSection
    draws = True
    paper = "arXiv 2311.03099"

    def sparse(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        if options.density == 1:
            return block.deltas()
        from fuse_train.merge.draws import uniform

        deltas_KE = block.deltas()
        for k, delta_E in enumerate(deltas_KE):
            drawn_E = uniform(
                block.name, seed=block.seed, model=k, start=block.start, count=len(delta_E)
            )
            delta_E.mul_(drawn_E < options.density)
        return deltas_KE.div_(options.density) if options.rescale else deltas_KE
