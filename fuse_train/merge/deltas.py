"""Methods that sum the models' differences from a base: drop entries, elect a sign, sum.

K models, E elements of a block
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from fuse_train.merge.kind import Block, MergeKind
from store_schema.config import StrictModel

if TYPE_CHECKING:
    import torch


class DeltaOptions(StrictModel):
    """Options that every such method has."""

    scale: float = 1.0
    """Factor of the sum that is added to the base (lambda of the papers)."""
    normalize: bool = False
    """Divide the sum by the sum of the weights that took part in it."""


class SparseOptions(DeltaOptions):
    """Options of methods that drop entries of each difference."""

    density: float = Field(default=0.5, gt=0, le=1)
    """Share of the entries that is kept."""


class DeltaKind(MergeKind):
    """theta = base + scale * sum_k w_k s(delta_k), delta_k = theta_k - base.

    `sparse` is s. With `elects`, an entry counts only where the sign of its w_k s(delta_k) is that of
    their sum over k (plus where the sum is 0), as in TIES. With `normalize` the sum is divided by the
    sum of the weights that count at that entry.
    """

    needs_base = True
    fewest = 1
    section = DeltaOptions
    elects: ClassVar[bool] = False

    def check(self, options: Any, weights: tuple[float, ...]) -> None:
        if options.normalize and not self.elects and abs(sum(weights)) < 1e-8:
            raise ValueError("weights sum to 0 and cannot be normalised")

    def sparse(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        """The differences after dropping entries, [K, E] float32; a new tensor, may be changed."""
        return block.deltas()

    def merge(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        weights_K1 = block.weights_K[:, None]
        parts_KE = self.sparse(block, measured, options).mul_(weights_K1)
        if self.elects:
            counts_KE = elected(parts_KE)
            total_E = summed(parts_KE * counts_KE)
        else:
            total_E = summed(parts_KE)
        if options.normalize and self.elects:
            weight_E = summed(counts_KE * weights_K1)
            total_E /= weight_E.masked_fill_(weight_E == 0, 1.0)
        elif options.normalize:
            total_E /= block.weights_K.sum()
        return total_E.mul_(options.scale).add_(block.required_base)


def elected(values_KE: torch.Tensor) -> torch.Tensor:
    """Whether each value has the sign of its column's sum: bool [K, E], false for zeros.

    A sum of 0 counts as positive.
    """
    positive_E = summed(values_KE) >= 0
    return (values_KE > 0) & positive_E | (values_KE < 0) & ~positive_E


def summed(rows_KE: torch.Tensor) -> torch.Tensor:
    """Sum of the rows [E], one after the other.

    torch's own sum takes another order at the end of an array than in its middle, so that results near
    a tie would depend on the size of blocks.
    """
    total_E = rows_KE[0].clone()
    for row_E in rows_KE[1:]:
        total_E += row_E
    return total_E
