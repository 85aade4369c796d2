"""Apply an encoding's selection rule (`presets.Encoding`) to the entries of a shard."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.compiled import compiled
from store_schema.encoding.codes import LARGEST_NATS
from store_schema.layout import Arrays
from store_schema.presets import Encoding


def select_entries(arrays: Arrays, encoding: Encoding) -> Arrays:
    """Remove the entries that the rule does not keep; their mass is added to the tail.

    Args:
        arrays: A shard's arrays. Entries fall within each position, so the first ones are kept.
        encoding: Has the rule. If it has steps, entries below exp(-64) are removed too.

    Returns:
        The arrays, with new entry arrays and tail mass if any entry was removed.
    """
    selection = encoding.selection
    if selection.keeps_all and encoding.steps is None:
        return arrays
    offsets = arrays["entry_offsets"]
    counts, dropped = _kept_counts(
        arrays["entry_logprobs"],
        offsets,
        2.0 if selection.keeps_all else selection.top_p,  # a rounded sum may reach 1 too early
        selection.min_entries,
        selection.floor,
        0.0 if encoding.steps is None else float(np.exp(-LARGEST_NATS)),
    )
    if int(counts.sum()) == len(arrays["entry_ids"]):
        return arrays
    keep = _prefixes(offsets, counts)
    tail = np.minimum(arrays["tail_mass"].astype(np.float64) + dropped, 1.0)
    return arrays | {
        "entry_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "entry_ids": arrays["entry_ids"][keep],
        "entry_logprobs": arrays["entry_logprobs"][keep],
        "tail_mass": tail.astype(np.float32),
    }


def _prefixes(
    offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """[E] bool, True for the first `counts[i]` entries of each row i."""
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    kept: npt.NDArray[np.bool_] = place < np.repeat(counts, np.diff(offsets))
    return kept


@compiled
def _kept_counts(
    logprobs: Any, offsets: Any, top_p: float, min_entries: int, floor: float, least: float
) -> tuple[Any, Any]:
    """Number of entries kept of each row [N], and the removed mass [N]."""
    num_rows = len(offsets) - 1
    counts = np.zeros(num_rows, np.int64)
    dropped = np.zeros(num_rows, np.float64)
    for row in range(num_rows):
        mass = 0.0
        for i in range(offsets[row], offsets[row + 1]):
            probability = np.exp(np.float64(logprobs[i]))
            wanted = counts[row] < min_entries or mass < top_p or 0 < floor <= probability
            if wanted and probability >= least:
                counts[row] += 1
                mass += probability
            else:  # entries fall, so all that follow are removed too
                dropped[row] += probability
    return counts, dropped
