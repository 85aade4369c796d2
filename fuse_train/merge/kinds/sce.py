"""Method sce."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from fuse_train.merge.deltas import elected, summed
from fuse_train.merge.kind import Block, MergeKind
from fuse_train.merge.shares import shares, square_sums
from store_schema.config import StrictModel

if TYPE_CHECKING:
    import torch

    from fuse_train.merge.largest import Largest


class SceSection(StrictModel):
    """Method sce."""

    density: float = Field(default=0.1, gt=0, le=1)
    """Share of the entries that is selected: those on which the models differ most, counted among
    the entries on which they differ at all."""
    select_for: Literal["all", "weights"] = "all"
    """all: only selected entries are merged, the rest stays as in the base (the paper's text, and
    mergekit). weights: the models' weights come from the selected entries, and all entries are merged
    (the paper's public code)."""


class Measured(NamedTuple):
    """Figures of a tensor: the selected entries (None for all), and the models' weights [K]."""

    selected: Largest | None
    eta_K: torch.Tensor


class Sce(MergeKind):
    """Select the entries on which models differ, weigh models by them, erase the minority's sign.

    With delta_k = theta_k - base, tensor by tensor: Select S, the `density` of the entries with the
    largest variance over k. Calculate eta_k = sum_S delta_k^2 / sum_i sum_S delta_i^2. Erase: an entry
    of delta_k counts where its sign is that of sum_i delta_i (plus where the sum is 0).
    theta = base + sum_k eta_k delta_k / sum_k eta_k, over the k that count at that entry.

    Models that are all the same differ nowhere: with a density below 1 nothing is selected, and the
    base stays. mergekit takes equal eta where the sum of mean squares is below 1e-6, as it is in most
    fine-tuned models; here only where it is 0.

    Source: FuseChat, Wan et al., 2024.
    """

    section = SceSection
    needs_base = True
    weighted = False
    paper = "arXiv 2408.07990"

    def measure(self, blocks: Iterable[Block], options: Any) -> Measured:
        if options.density == 1:
            return Measured(None, shares(square_sums(block.deltas() for block in blocks)))
        from fuse_train.merge.largest import find_largest

        selected = find_largest(
            lambda: ((block.start, variance(block.deltas())) for block in blocks),
            lambda nonzero, total: int(options.density * nonzero),
        )
        parts = (_selected(block, selected) for block in blocks)
        return Measured(selected, shares(square_sums(parts)))

    def merge(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        if measured.selected is None or options.select_for == "weights":
            deltas_KE = block.deltas()
        else:
            deltas_KE = _selected(block, measured.selected)
        eta_KE = elected(deltas_KE) * measured.eta_K[:, None]
        total_E = summed(deltas_KE * eta_KE)
        weight_E = summed(eta_KE)
        return total_E.div_(weight_E.masked_fill_(weight_E == 0, 1.0)).add_(block.required_base)


def variance(deltas_KE: torch.Tensor) -> torch.Tensor:
    """Variance of each entry over the models, float32 [1, E]."""
    mean_E = summed(deltas_KE).div_(len(deltas_KE))
    return summed((deltas_KE - mean_E).square_()).div_(len(deltas_KE))[None]


def _selected(block: Block, selected: Largest) -> torch.Tensor:
    deltas_KE = block.deltas()
    return deltas_KE.mul_(selected.mask(variance(deltas_KE), block.start))
