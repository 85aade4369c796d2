"""One compiled pass over the vocabulary: the product of the output head and all that is kept of it.

Logits of TILE ids and WIDTH rows are computed into a buffer that stays in the cache, and are used at
once: each row's running maximum and sum of exponentials, its K best ids in a heap, the logit of its
label. Logits [R, V] never exist.

Shapes: R rows, padded to P panels of WIDTH; H hidden, V vocabulary, T ids of a tile, K entries.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from extract.head.bf16_dot import IDS, PAIR_BYTES, WIDTH, add_dots, float_of_bits
from store_schema.compiled import compiled, compiled_fast

TILE = 16 * IDS
"""Ids whose logits are computed before they are used."""
STEP_PAIRS = 512
"""Pairs of hidden numbers that are multiplied at a time: of longer rows not all fits into the cache."""
LOWEST = np.float32(np.finfo(np.float32).min)


class Rows(NamedTuple):
    """What is known of all rows after some ids. A heap's first entry is its least.

    Args:
        peaks: [P, WIDTH] float32 largest logit so far, `LOWEST` before the first.
        sums: [P, WIDTH] float64 sum of exponentials, relative to the peak.
        values: [R, K] float32 heap of the best logits, -inf before the first.
        ids: [R, K] int32, of the same.
        labels: [R] float32 logits of the labels, as soon as they are known.
    """

    peaks: Any
    sums: Any
    values: Any
    ids: Any
    labels: Any


class Buffers(NamedTuple):
    """Memory of one thread.

    Args:
        logits: [TILE, WIDTH] float32.
        peaks: [WIDTH] float32.
        sums: [WIDTH] float32.
    """

    logits: Any
    peaks: Any
    sums: Any


@compiled
def add_ids(
    first: int,
    stop: int,
    weight: Any,
    bias: Any,
    panels: Any,
    label_ids: Any,
    rows: Any,
    buffers: Any,
) -> None:
    """Take ids `first` to `stop` - 1 into account.

    Args:
        first: Id.
        stop: Id.
        weight: [V, H] int16, bits of bf16; H is even.
        bias: [V] float32, or [0].
        panels: [P, H / 2, WIDTH, 2] int16, bits of bf16 hidden states, zero beyond the last row.
        label_ids: [R] int64.
        rows: `Rows`, changed in place.
        buffers: `Buffers`.
    """
    num_rows = len(label_ids)
    for start in range(first, stop, TILE):
        num_ids = min(TILE, stop - start)
        for p in range(len(panels)):
            _tile_logits(weight, bias, start, num_ids, panels[p], buffers.logits)
            _add_to_sums(num_ids, rows.peaks[p], rows.sums[p], buffers)
            for r in range(p * WIDTH, min((p + 1) * WIDTH, num_rows)):
                column = r - p * WIDTH
                if start <= label_ids[r] < start + num_ids:
                    rows.labels[r] = buffers.logits[label_ids[r] - start, column]
                values = rows.values[r]
                if buffers.peaks[column] > values[0]:
                    for i in range(num_ids):
                        if buffers.logits[i, column] > values[0]:
                            _replace_least(
                                values, rows.ids[r], buffers.logits[i, column], start + i
                            )


@compiled
def _tile_logits(weight: Any, bias: Any, start: int, num_ids: int, panel: Any, logits: Any) -> None:
    """[num_ids, WIDTH] logits of a panel; rows of the tile beyond `num_ids` mean nothing."""
    for i in range(TILE):
        known = bias[start + i] if i < num_ids and len(bias) else np.float32(0)
        for r in range(WIDTH):
            logits[i, r] = known
    row_bytes = weight.shape[1] * 2
    num_pairs = weight.shape[1] // 2
    for pair in range(0, num_pairs, STEP_PAIRS):
        for i in range(0, num_ids, IDS):
            add_dots(
                weight.ctypes.data + (start + i) * row_bytes + pair * PAIR_BYTES,
                row_bytes,
                num_ids - i - 1,
                panel.ctypes.data + pair * WIDTH * PAIR_BYTES,
                min(STEP_PAIRS, num_pairs - pair),
                logits.ctypes.data + i * WIDTH * 4,
            )


@compiled
def _add_to_sums(num_ids: int, peaks: Any, sums: Any, buffers: Any) -> None:
    """Take a tile into the running maxima and sums; leaves the tile's own peaks in the buffer."""
    _tile_peaks(num_ids, buffers)
    for r in range(WIDTH):
        if buffers.peaks[r] > peaks[r]:
            sums[r] *= math.exp(np.float64(peaks[r]) - np.float64(buffers.peaks[r]))
            peaks[r] = buffers.peaks[r]
    _tile_sums(num_ids, peaks, buffers)
    for r in range(WIDTH):
        sums[r] += buffers.sums[r]


@compiled
def _tile_peaks(num_ids: int, buffers: Any) -> None:
    logits, peaks = buffers.logits, buffers.peaks
    for r in range(WIDTH):
        peaks[r] = -np.inf
    for i in range(num_ids):
        for r in range(WIDTH):
            peaks[r] = logits[i, r] if logits[i, r] > peaks[r] else peaks[r]


@compiled_fast
def _tile_sums(num_ids: int, peaks: Any, buffers: Any) -> None:
    logits, sums = buffers.logits, buffers.sums
    for r in range(WIDTH):
        sums[r] = 0
    for i in range(num_ids):
        for r in range(WIDTH):
            sums[r] += exp_of(logits[i, r] - peaks[r])


LOG2_E = np.float32(1 / math.log(2))
SMALLEST_EXPONENT = np.float32(-126)
C1, C2, C3, C4, C5, C6 = (
    np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 7)
)  # of 2^x


@compiled_fast
def exp_of(nats: Any) -> Any:
    """exp of a float32 number that is at most 0, to 3e-7 of itself; below 2^-126 that; NaN of NaN.

    Unlike the library's, it is compiled to vector instructions.
    """
    x = nats * LOG2_E
    x = SMALLEST_EXPONENT if x < SMALLEST_EXPONENT else x
    whole = np.floor(x + np.float32(0.5))
    x -= whole
    series = np.float32(1) + x * (C1 + x * (C2 + x * (C3 + x * (C4 + x * (C5 + x * C6)))))
    exponent = np.int32(whole) + np.int32(127)
    return series * float_of_bits(exponent << np.int32(23))


@compiled
def _replace_least(values: Any, ids: Any, value: Any, token: int) -> None:
    """Put an entry in the place of the least of a heap, which is its first."""
    at = 0
    while 2 * at + 1 < len(values):
        child = 2 * at + 1
        if child + 1 < len(values) and values[child + 1] < values[child]:
            child += 1
        if values[child] >= value:
            break
        values[at], ids[at] = values[child], ids[child]
        at = child
    values[at], ids[at] = value, token
