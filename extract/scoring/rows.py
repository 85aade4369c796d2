"""Converts an engine's rows to the store's: order of entries, padding ids, tail mass, checks for NaN.

Shapes: R known rows of a segment (N, or N - 1 where the first token has nothing before it),
N positions, K entries of a row, E entries of all positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.engines.protocol import CHECK_WEIGHTS, DenseRows
from store_schema.compiled import compiled
from store_schema.errors import ModelError

LOGPROB_SLACK = 1e-3
"""Nats above 0 that rounding may leave in a float32 log-probability."""

_SOUND, _NAN, _IMPOSSIBLE, _ABOVE_0 = 0, 1, 2, 3
_FAULTS = {
    _NAN: "NaN from the model",
    _IMPOSSIBLE: "the model assigns probability 0 to a token of the text",
    _ABOVE_0: "log-probability above 0",
}


@dataclass(frozen=True, slots=True)
class ScoredSegment:
    """Rows of one segment as the store keeps them; row i is the distribution OF token i.

    Args:
        counts: [N] int64 entries of each position.
        entry_ids: [E] uint32, most probable first, ties by id.
        entry_logprobs: [E] float32 nats, finite, <= 0.
        tail_mass: [N] float32, 1 - sum of the entries.
        label_logprobs: [N] float32 nats; NaN for a first token without context.
    """

    counts: npt.NDArray[np.int64]
    entry_ids: npt.NDArray[np.uint32]
    entry_logprobs: npt.NDArray[np.float32]
    tail_mass: npt.NDArray[np.float32]
    label_logprobs: npt.NDArray[np.float32]


def scored_segment(
    dense: DenseRows, num_positions: int, *, vocab_size: int, where: str
) -> ScoredSegment:
    """An engine's rows as the store keeps them.

    Entries are sorted by falling log-probability, ties by id. Ids beyond the tokenizer's (padding of
    the model's vocabulary) and entries of probability 0 are left out; their mass is in the tail.
    Sampled rows have no tail.

    Args:
        dense: Rows of the last R of `num_positions` positions.
        num_positions: N.
        vocab_size: Ids of the tokenizer.
        where: Source and segment, for messages.

    Raises:
        ModelError: NaN, or a label of probability 0; names the position.
    """
    num_rows, width = dense.ids.shape
    unknown = num_positions - num_rows
    counts = np.zeros(num_positions, np.int64)
    tail = np.ones(num_positions, np.float32)
    ids = np.empty(num_rows * width, np.uint32)
    logprobs = np.empty(num_rows * width, np.float32)
    num_entries, fault, row = _entries(
        dense.ids,
        dense.logprobs,
        dense.label_logprobs,
        vocab_size,
        counts[unknown:],
        tail[unknown:],
        ids,
        logprobs,
    )
    if fault != _SOUND:
        raise ModelError(
            _FAULTS[fault],
            where=f"{where}, position {row + unknown}",
            hint=CHECK_WEIGHTS,
        )
    if dense.sampled:
        tail[unknown:] = 0.0
    return ScoredSegment(
        counts=counts,
        # Copies, so that the larger buffers are freed.
        entry_ids=ids[:num_entries].copy(),
        entry_logprobs=logprobs[:num_entries].copy(),
        tail_mass=tail,
        label_logprobs=_padded(np.minimum(dense.label_logprobs, 0.0), num_positions),
    )


def unscored_segment(num_positions: int) -> ScoredSegment:
    """A segment without any distribution, of `num_positions` positions."""
    return ScoredSegment(
        counts=np.zeros(num_positions, np.int64),
        entry_ids=np.empty(0, np.uint32),
        entry_logprobs=np.empty(0, np.float32),
        tail_mass=np.ones(num_positions, np.float32),
        label_logprobs=np.full(num_positions, np.nan, np.float32),
    )


def _padded(values: npt.NDArray[np.float32], num_positions: int) -> npt.NDArray[np.float32]:
    """[N] the values of the last positions, with NaN before them."""
    padded = np.full(num_positions, np.nan, np.float32)
    padded[num_positions - len(values) :] = values
    return padded


@compiled
def _entries(
    ids_RK: Any,
    logprobs_RK: Any,
    labels_R: Any,
    vocab_size: int,
    counts_R: Any,
    tail_R: Any,
    out_ids: Any,
    out_logprobs: Any,
) -> tuple[int, int, int]:
    """Fill counts, tails and entries; returns the number of entries, the first fault and its row."""
    stop = 0
    for row in range(len(labels_R)):
        label = labels_R[row]
        if math.isnan(label):
            return stop, _NAN, row
        if label == -np.inf:
            return stop, _IMPOSSIBLE, row
        if label > LOGPROB_SLACK:
            return stop, _ABOVE_0, row
        start = stop
        total = 0.0
        in_order = True
        for k in range(ids_RK.shape[1]):
            logprob = logprobs_RK[row, k]
            if math.isnan(logprob):
                return stop, _NAN, row
            if logprob > LOGPROB_SLACK:
                return stop, _ABOVE_0, row
            token = ids_RK[row, k]
            if logprob == -np.inf or token >= vocab_size:
                continue
            if stop > start:
                before = out_logprobs[stop - 1]
                here = min(logprob, np.float32(0.0))
                if here > before or (here == before and token < out_ids[stop - 1]):
                    in_order = False
            out_ids[stop] = token
            out_logprobs[stop] = min(logprob, np.float32(0.0))
            total += math.exp(np.float64(logprob))
            stop += 1
        if not in_order:
            _sort(out_ids[start:stop], out_logprobs[start:stop])
        counts_R[row] = stop - start
        tail_R[row] = min(max(1.0 - total, 0.0), 1.0)
    return stop, _SOUND, 0


@compiled
def _sort(ids: Any, logprobs: Any) -> None:
    """Sort one row in place by falling log-probability, ties by id."""
    order = np.argsort(ids)
    order = order[np.argsort(-logprobs[order], kind="mergesort")]
    sorted_ids, sorted_logprobs = ids[order], logprobs[order]
    for i in range(len(order)):  # a slice takes three seconds to compile
        ids[i], logprobs[i] = sorted_ids[i], sorted_logprobs[i]
