"""Method dare_ties."""

from __future__ import annotations

from fuse_train.merge.kinds.dare_linear import DareLinear


class DareTies(DareLinear):
    """As dare_linear, and only entries that agree in sign count, as in ties.

    theta = base + scale * the sum over k of those w_k m_k delta_k / density that have the sign of their
    sum.

    Source: Yu et al., ICML 2024.
    """

    elects = True
