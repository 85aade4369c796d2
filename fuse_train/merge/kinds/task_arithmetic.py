"""Method task_arithmetic."""

from __future__ import annotations

from fuse_train.merge.deltas import DeltaKind


class TaskArithmetic(DeltaKind):
    """Weighted sum of the differences from the base.

    theta = base + scale * sum_k w_k (theta_k - base).

    With all weights 1 the paper finds scales of 0.3 to 0.5 best for several models.

    Source: Ilharco et al., ICLR 2023.
    """

    paper = "arXiv 2212.04089"
