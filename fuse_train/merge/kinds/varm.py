"""Method varm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fuse_train.merge.kind import Block, MergeKind
from fuse_train.merge.shares import shares, square_sums

if TYPE_CHECKING:
    import torch


class Varm(MergeKind):
    """Mean of the models, each tensor's weights by how much it moved from the base.

    theta = sum_k W_k theta_k, W_k = mean(delta_k^2) / sum_i mean(delta_i^2), tensor by tensor (the
    paper's granularity "parameter matrix"). Equal weights where nothing moved; the public code takes
    these as soon as one model did not move.

    Source: FuseChat's first version, Wan et al., 2024.
    """

    needs_base = True
    weighted = False
    paper = "arXiv 2402.16107"

    def measure(self, blocks: Iterable[Block], options: Any) -> torch.Tensor:
        """Weights [K], float32."""
        return shares(square_sums(block.deltas() for block in blocks))

    def merge(self, block: Block, measured: torch.Tensor, options: Any) -> torch.Tensor:
        return measured @ block.models_KE
