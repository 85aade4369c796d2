"""Compact entries: encode log-probabilities and ids as small integers, and decode them.

A code q stands for a log-probability of -`values[q]` nats. Codes are spaced evenly in sqrt(p) until a
step reaches `max_step` nats, and evenly in nats from there on, with x = -log p:

    x < corner:   q = (2 / step) (1 - exp(-x / 2))                      corner = 2 ln(max_step / step)
    x >= corner:  q = (2 / step) (1 - step / max_step) + (x - corner) / max_step

Codes rise within a row, so the difference to the previous entry is stored (its rise). Entries of one
code are sorted by frequency rank, and such a rank is stored as its difference to the previous one, less
one. That saves log2(m!) bits for every m entries of a code.

The tail has a code too. If it is below one half, the decoded row is scaled so that entries and tail sum
to one; a larger tail is decoded as one minus the entries. So rows sum to one, and every entry is within
one step of its true value: where scaling would move an entry further, codes are rounded up
instead and the tail is decoded as one minus the entries.

Shapes: N positions, E entries. Ranks and codes are uint32, offsets int64 [N+1].
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from store_schema.compiled import compiled
from store_schema.presets import Steps

TAIL_DERIVED, TAIL_ZERO, FIRST_TAIL_CODE = 0, 1, 2
"""Tail codes: one minus the entries; 0; and from here on 2 + an index into `values`."""

SMALLEST_TAIL = 1e-9
"""A smaller tail is a rounding error of float32, and is stored as 0."""
MANY_TIES = 48
"""Up to so many entries of one code are sorted by insertion, which is faster for few."""
LARGEST_NATS = 64.0
"""Entries of probability below exp(-64) are not kept, so that the table of codes is finite."""


class Spacing(NamedTuple):
    """Steps in nats (see `Steps`), and nats and code of the corner, where they stop growing."""

    step: float
    max_step: float
    nats: float
    code: float


def spacing(steps: Steps) -> Spacing:
    """The spacing of codes for compiled code."""
    return Spacing(
        steps.step,
        steps.max_step,
        nats=2.0 * float(np.log(steps.max_step / steps.step)),
        code=2.0 / steps.step * (1.0 - steps.step / steps.max_step),
    )


@cache
def values(steps: Steps) -> npt.NDArray[np.float64]:
    """[Q] the negative log-probability in nats of each code, up to the first above `LARGEST_NATS`."""
    spaced = spacing(steps)
    nats, code, last = spaced.nats, spaced.code, _code(LARGEST_NATS, spaced)
    q = np.arange(int(last) + 2, dtype=np.float64)
    curved = -2.0 * np.log1p(-np.minimum(q, code) * steps.step / 2.0)
    return np.where(q <= code, curved, nats + (q - code) * steps.max_step)


def bound(steps: Steps, nats: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Largest error in nats at a log-probability of minus `nats`: one step."""
    return np.minimum(steps.max_step, steps.step * np.exp(nats / 2.0))


def encode_rows(
    logprobs: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.int64],
    tail_mass: npt.NDArray[np.float32],
    steps: Steps,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Encode entries and tails.

    Args:
        logprobs: [E] nats, falling within each row.
        offsets: [N+1] where each row's entries begin.
        tail_mass: [N] probabilities.
        steps: Precision.

    Returns:
        Codes of entries [E], rising within each row, and codes of tails [N].
    """
    table = values(steps)
    encoded: tuple[Any, Any] = _encode_rows(
        logprobs, offsets, tail_mass, spacing(steps), table, np.exp(-table)
    )
    return encoded


@compiled
def _code(x: float, spaced: Spacing) -> float:
    if x < spaced.nats:
        return 2.0 / spaced.step * (1.0 - np.exp(-x / 2.0))
    return spaced.code + (x - spaced.nats) / spaced.max_step


@compiled
def _encode_rows(
    logprobs: Any, offsets: Any, tail: Any, spaced: Spacing, table: Any, mass: Any
) -> tuple[Any, Any]:
    """See `encode_rows`; `table` [Q] float64 nats and `mass` [Q] probability of a code."""
    codes = np.empty(len(logprobs), np.uint32)
    tails = np.zeros(len(tail), np.uint32)
    for row in range(len(tail)):
        first, stop = offsets[row], offsets[row + 1]
        total = 0.0
        for i in range(first, stop):
            q = np.uint32(np.rint(_code(-np.float64(logprobs[i]), spaced)))
            codes[i] = q
            total += mass[q]
        if first == stop:
            continue
        if tail[row] < 0.5:
            left = 0.0
            tails[row] = TAIL_ZERO
            if tail[row] > SMALLEST_TAIL:
                left_nats = -np.log(np.float64(tail[row]))
                q = np.uint32(np.rint(_code(left_nats, spaced)))
                left = mass[q]
                tails[row] = q + np.uint32(FIRST_TAIL_CODE)
            shift = np.log((1.0 - left) / total)
            good = True
            for i in range(first, stop):
                x = -np.float64(logprobs[i])
                error = abs(table[codes[i]] - shift - x)
                # `step` is the bound of the most probable entry, and the least; most are within it.
                if error > spaced.step:
                    back = table[codes[i]] - shift
                    limit = spaced.step * np.exp(max(x, back) / 2.0)
                    good &= error <= min(spaced.max_step, limit)
            if good:
                continue
        tails[row] = TAIL_DERIVED
        if total > 1.0:
            for i in range(first, stop):
                x = -np.float64(logprobs[i])
                codes[i] = np.uint32(np.ceil(_code(x, spaced)))
    return codes, tails


def decode_rows(
    rises: npt.NDArray[Any],
    ids: npt.NDArray[np.uint32],
    offsets: npt.NDArray[np.int64],
    tails: npt.NDArray[np.uint32],
    ids_by_rank: npt.NDArray[np.uint32],
    steps: Steps,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32], npt.NDArray[np.float32], int]:
    """Decode what `encode_rows` and `pack_ids` encoded.

    Args:
        rises: [E] differences of codes, in place-major order (see `to_place_major`).
        ids: [E] ranks and rank differences, as `pack_ids` returns them.
        offsets: [N+1], from 0 to E.
        tails: [N] codes.
        ids_by_rank: [V] the rank table.
        steps: The precision they were encoded with.

    Returns:
        Ids [E], log-probabilities [E] and tail mass [N], and the index of the first invalid row (a
        rank or code out of range), -1 for none.
    """
    nats = values(steps)
    # One stream is read for each place in a row; 16-bit values keep them all in the CPU's cache.
    if not rises.size or rises.max() < 1 << 16:
        rises = rises.astype(np.uint16)
    decoded: tuple[Any, Any, Any, int] = _decode_rows(
        rises, ids, offsets, tails, ids_by_rank, (-nats).astype(np.float32), np.exp(-nats)
    )
    return decoded


@compiled
def sort_ties(codes: Any, ranks: Any, offsets: Any) -> Any:
    """Ranks [E], sorted within each group of equal codes of a row."""
    out = ranks.copy()
    for row in range(len(offsets) - 1):
        first, stop = offsets[row], offsets[row + 1]
        start = first
        for i in range(first + 1, stop + 1):
            if i == stop or codes[i] != codes[start]:
                if i - start > MANY_TIES:
                    out[start:i].sort()
                else:
                    for j in range(start + 1, i):
                        rank = out[j]
                        k = j
                        while k > start and out[k - 1] > rank:
                            out[k] = out[k - 1]
                            k -= 1
                        out[k] = rank
                start = i
    return out


@compiled
def place_starts(offsets: Any) -> Any:
    """[K+1] index of the first entry of each place (index within its row) in place-major order."""
    most = 0
    for row in range(len(offsets) - 1):
        most = max(most, offsets[row + 1] - offsets[row])
    starts = np.zeros(most + 1, np.int64)
    for row in range(len(offsets) - 1):
        starts[offsets[row + 1] - offsets[row]] += 1
    # From "rows of exactly k entries" to "entries at places before k".
    rows = len(offsets) - 1
    before = 0
    for place in range(most + 1):
        rows -= starts[place]
        starts[place] = before
        before += rows
    return starts


@compiled
def to_place_major(entries: Any, offsets: Any) -> Any:
    """Entries [E] in place-major order: first entries of all rows, then all second entries, and so
    on."""
    out = np.empty_like(entries)
    place = place_starts(offsets)
    for row in range(len(offsets) - 1):
        for i in range(offsets[row], offsets[row + 1]):
            k = i - offsets[row]
            out[place[k]] = entries[i]
            place[k] += 1
    return out


@compiled
def from_place_major(entries: Any, offsets: Any) -> Any:
    """Undo `to_place_major`."""
    out = np.empty_like(entries)
    place = place_starts(offsets)
    for row in range(len(offsets) - 1):
        for i in range(offsets[row], offsets[row + 1]):
            k = i - offsets[row]
            out[i] = entries[place[k]]
            place[k] += 1
    return out


@compiled
def pack_ids(codes: Any, ranks: Any, offsets: Any) -> tuple[Any, Any]:
    """Differences of codes [E], place-major, and encoded ids [E]: the ranks of each code's first entry,
    then the rank differences, less one, of all others."""
    rises = np.empty_like(codes)
    ids = np.empty_like(ranks)
    num_ties = 0
    for row in range(len(offsets) - 1):
        for i in range(offsets[row] + 1, offsets[row + 1]):
            num_ties += codes[i] == codes[i - 1]
    head, gap = 0, len(ranks) - num_ties
    place = place_starts(offsets)
    for row in range(len(offsets) - 1):
        before = np.uint32(0)
        for i in range(offsets[row], offsets[row + 1]):
            k = i - offsets[row]
            rise = codes[i] - before
            rises[place[k]] = rise
            place[k] += 1
            before = codes[i]
            if k > 0 and rise == 0:
                ids[gap] = ranks[i] - ranks[i - 1] - np.uint32(1)
                gap += 1
            else:
                ids[head] = ranks[i]
                head += 1
    return rises, ids


@compiled
def _decode_rows(
    rises: Any, ids: Any, offsets: Any, tails: Any, ids_by_rank: Any, table: Any, mass: Any
) -> tuple[Any, Any, Any, int]:
    """See `decode_rows`; `table` [Q] float32 log-probability and `mass` [Q] probability of a code.

    All integers are unsigned, since numba adds a test to every signed index; and there is no branch on
    whether two codes are equal, which a CPU would predict wrongly half of the time.
    """
    num_entries, num_rows = len(ids), len(offsets) - 1
    out_ids = np.empty(num_entries, np.uint32)
    logprobs = np.empty(num_entries, np.float32)
    tail = np.empty(num_rows, np.float32)
    zero, one = np.uint64(0), np.uint64(1)
    place = place_starts(offsets).astype(np.uint64)
    num_ties = 0
    for i in range(np.int64(place[1]) if len(place) > 1 else 0, num_entries):
        num_ties += rises[i] == 0
    head, gap = zero, np.uint64(num_entries - num_ties)
    last_rank, last_code = np.uint64(len(ids_by_rank) - 1), np.uint64(len(table) - 1)
    at_entry: Any = zero
    for row in range(num_rows):
        first, length = at_entry, np.uint64(offsets[row + 1] - offsets[row])
        code, rank, top_rank, total = zero, zero, zero, 0.0
        k = zero
        while k < length:
            at = place[k]
            place[k] = at + one
            rise = np.uint64(rises[at])
            tie = np.uint64(rise == zero and k > zero)
            rank = np.uint64(ids[gap if tie else head]) + (rank + one if tie else zero)
            gap += tie
            head += one - tie
            code += rise
            top_rank = max(rank, top_rank)
            out_ids[at_entry] = ids_by_rank[min(rank, last_rank)]
            logprobs[at_entry] = table[min(code, last_code)]
            total += mass[min(code, last_code)]
            at_entry += one
            k += one
        wrong = top_rank > last_rank or code > last_code
        if length == zero:
            tail[row] = 1.0
        elif tails[row] == TAIL_DERIVED:
            tail[row] = max(1.0 - total, 0.0)
        else:
            left = 0.0
            if tails[row] != TAIL_ZERO:
                tail_code = np.uint64(tails[row]) - np.uint64(FIRST_TAIL_CODE)
                wrong |= tail_code > last_code
                left = mass[min(tail_code, last_code)]
            wrong |= left >= 1.0
            shift = np.float32(np.log((1.0 - left) / total))
            for j in range(np.int64(first), np.int64(at_entry)):
                logprobs[j] = min(logprobs[j] + shift, np.float32(0.0))
            tail[row] = left
        if wrong:
            return out_ids, logprobs, tail, row
    return out_ids, logprobs, tail, -1
