"""Weights of models by the squared size of their differences from the base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def square_sums(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of each row over all parts [K, E]: float64 [K]."""
    sums = [part.double().square_().sum(1) for part in parts]
    return sum(sums[1:], start=sums[0])


def shares(sums_K: torch.Tensor) -> torch.Tensor:
    """Each sum's share of the total, float32 [K]; equal ones where that is 0."""
    total = sums_K.sum()
    if total == 0:
        return sums_K.new_full(sums_K.shape, 1 / len(sums_K)).float()
    return (sums_K / total).float()
