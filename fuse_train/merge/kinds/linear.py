"""Method linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fuse_train.merge.kind import Block, MergeKind
from store_schema.config import StrictModel

if TYPE_CHECKING:
    import torch


class LinearSection(StrictModel):
    """Method linear."""

    normalize: bool = True
    """Divide by the sum of the weights."""


class Linear(MergeKind):
    """Weighted mean of the models.

    theta = sum_k w_k theta_k / sum_k w_k (without the division where `normalize` is off).

    Source: model soups, Wortsman et al., ICML 2022.
    """

    section = LinearSection
    paper = "arXiv 2203.05482"

    def check(self, options: Any, weights: tuple[float, ...]) -> None:
        if options.normalize and abs(sum(weights)) < 1e-8:
            raise ValueError("weights sum to 0 and cannot be normalised")

    def merge(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        total_E = block.weights_K @ block.models_KE
        return total_E.div_(block.weights_K.sum()) if options.normalize else total_E
