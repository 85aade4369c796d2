"""The exact k largest entries of a tensor that is never in memory as a whole.

Floats from 0 up have the order of their bits read as integers. So two passes with counts of the upper
and of the lower 16 bits find the k-th largest; if only some of several equal to it are wanted, a third
pass finds the index up to which they are taken.

M rows that are treated separately, E elements of a block
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

_HALF = 1 << 16
_NO_VALUE = torch.iinfo(torch.int32).max


@dataclass(frozen=True, slots=True)
class Largest:
    """Which entries are among the largest.

    Args:
        least_M: Bits of the smallest selected value, int32.
        last_M: Index of the last selected element with exactly these bits.
    """

    least_M: torch.Tensor
    last_M: torch.Tensor

    def mask(self, values_ME: torch.Tensor, start: int) -> torch.Tensor:
        """Whether each element is selected, bool [M, E].

        Args:
            values_ME: float32, 0 or more, of consecutive elements.
            start: Index of the first.
        """
        bits_ME = _bits(values_ME)
        index_E = torch.arange(start, start + values_ME.shape[1])
        least_M1, last_M1 = self.least_M[:, None], self.last_M[:, None]
        return (bits_ME > least_M1) | (bits_ME == least_M1) & (index_E <= last_M1)


Pass = Callable[[], Iterable[tuple[int, torch.Tensor]]]


def find_largest(values: Pass, count_of: Callable[[int, int], int]) -> Largest:
    """Select the largest entries of each row, ties by lower index.

    Args:
        values: Each call iterates over all entries in order: index of the first element, and float32
            values [M, E], 0 or more.
        count_of: Number of entries to select, from the row's number of nonzero entries and of entries.
    """
    upper_MH, nonzero_M, total = _count(values, None)
    wanted_M = [count_of(int(nonzero), total) for nonzero in nonzero_M]
    upper_M, left_M = _reach(upper_MH, wanted_M)
    lower_MH, _, _ = _count(values, upper_M)
    lower_M, left_M = _reach(lower_MH, left_M)
    least_M = torch.tensor(
        [
            _NO_VALUE if wanted <= 0 else upper * _HALF + lower
            for wanted, upper, lower in zip(wanted_M, upper_M, lower_M, strict=True)
        ],
        dtype=torch.int32,
    )
    last_M = torch.full((len(wanted_M),), total, dtype=torch.int64)
    equal = [int(counts[lower]) for counts, lower in zip(lower_MH, lower_M, strict=True)]
    if any(0 < left < same for left, same in zip(left_M, equal, strict=True)):
        last_M = _last_equal(values, least_M, left_M, total)
    return Largest(least_M, last_M)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def _count(values: Pass, upper_M: list[int] | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Histogram [M, 65536] of the upper halves of the bits (or, given `upper_M`, of the lower halves of
    entries with that upper half); numbers of nonzero entries [M]; number of entries."""
    counts: torch.Tensor | None = None
    nonzero_M, total = torch.zeros(0, dtype=torch.int64), 0
    for _, values_ME in values():
        bits_ME = _bits(values_ME)
        if counts is None:
            counts = torch.zeros(len(bits_ME), _HALF, dtype=torch.int64)
            nonzero_M = torch.zeros(len(bits_ME), dtype=torch.int64)
        for m, bits_E in enumerate(bits_ME):
            nonzero_M[m] += torch.count_nonzero(bits_E)
            if upper_M is None:
                halves_E = bits_E >> 16
            else:
                halves_E = bits_E[bits_E >> 16 == upper_M[m]] & (_HALF - 1)
            counts[m] += torch.bincount(halves_E, minlength=_HALF)
        total += bits_ME.shape[1]
    if counts is None:
        raise ValueError("a tensor without elements has no largest ones")
    return counts, nonzero_M, total


def _reach(counts_MH: torch.Tensor, wanted_M: list[int]) -> tuple[list[int], list[int]]:
    """The bin in which the cumulative count from the top reaches `wanted_M`, and how many of its
    entries are needed for that."""
    bins, left = [], []
    for counts_H, wanted in zip(counts_MH, wanted_M, strict=True):
        down_H = counts_H.flip(0).cumsum(0)
        place = int(torch.searchsorted(down_H, max(wanted, 1)))
        place = min(place, _HALF - 1)
        above = int(down_H[place - 1]) if place else 0
        bins.append(_HALF - 1 - place)
        left.append(wanted - above)
    return bins, left


def _last_equal(values: Pass, least_M: torch.Tensor, left_M: list[int], total: int) -> torch.Tensor:
    """Index of the `left_M`-th entry that is equal to `least_M`, in each row."""
    last_M = torch.full((len(left_M),), total, dtype=torch.int64)
    left = list(left_M)
    for start, values_ME in values():
        for m, bits_E in enumerate(_bits(values_ME)):
            if left[m] <= 0:
                continue
            places = (bits_E == least_M[m]).nonzero()[:, 0]
            if len(places) >= left[m]:
                last_M[m] = start + int(places[left[m] - 1])
            left[m] -= len(places)
    return last_M
