"""The mixture of two predictors with the lowest NLL: how much each adds to the other.

Shape suffixes: S spans of text.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_HALVINGS = 50


def mixture_weight(nats_S: Floats, other_nats_S: Floats) -> float:
    """Weight of the second predictor in the mixture that scores the text best.

    The w in [0, 1] that maximises sum_i log((1 - w) q_i + w p_i), with q_i and p_i the probabilities
    of span i under the two. The sum is concave in w, so bisection on its slope finds it.

    Args:
        nats_S: -log q of each span, finite.
        other_nats_S: -log p of each span, finite.

    Returns:
        0 where the second adds nothing to the first, 1 where the first adds nothing to the second, 0.5
        where they are equal everywhere.
    """
    ahead_S = (nats_S - other_nats_S).clip(-500.0, 500.0)
    # Slope (p - q) / ((1 - w) q + w p), both sides over the larger of p and q: nothing overflows.
    p_S, q_S = np.exp(np.minimum(ahead_S, 0.0)), np.exp(np.minimum(-ahead_S, 0.0))
    if not np.any(p_S != q_S):
        return 0.5
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        slope = ((p_S - q_S) / ((1 - middle) * q_S + middle * p_S)).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return 0.5 * (low + high)


def mixture_nats(nats_S: Floats, other_nats_S: Floats, weight: float) -> Floats:
    """-log((1 - weight) q + weight p) of each span [S]."""
    with np.errstate(divide="ignore"):
        first, second = np.log(1.0 - weight), np.log(weight)
    mixed: Floats = -np.logaddexp(first - nats_S, second - other_nats_S)
    return mixed
