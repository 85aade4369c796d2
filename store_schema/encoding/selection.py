"""Apply an encoding's selection rule (`presets.Encoding`) to the entries of a shard."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.compiled import compiled
from store_schema.encoding.codes import LARGEST_NATS
from store_schema.layout import BRANCH, Arrays, branch_entries
from store_schema.presets import Encoding


def select_entries(arrays: Arrays, encoding: Encoding) -> Arrays:
    """Remove the entries that the rule does not keep; their mass is added to the tail.

    A branch of an entry that is removed is removed too.

    Args:
        arrays: A shard's arrays. Entries fall within each position, so the first ones are kept.
        encoding: Has the rule. If it has steps, entries below exp(-64) are removed too.

    Returns:
        The arrays, with new entry arrays and tail mass if any entry was removed.
    """
    kept = _selected(arrays, encoding, "")
    if "branch_tokens" not in arrays:
        return kept
    if kept is not arrays:
        kept = take_branches(kept, np.flatnonzero(branch_entries(kept) >= 0))
    return _selected(kept, encoding, BRANCH)


def take_branches(arrays: Arrays, branches: npt.NDArray[np.int64]) -> Arrays:
    """A shard's arrays with some of its branches.

    Args:
        arrays: With branches.
        branches: Indices of those that stay, rising.
    """
    offsets = arrays["branch_entry_offsets"]
    counts_B = np.diff(offsets)
    stays_B = np.zeros(len(counts_B), bool)
    stays_B[branches] = True
    if stays_B.all():
        return arrays
    stays_F = np.repeat(stays_B, counts_B)
    taken = {
        n: arrays[n][stays_B] for n in ("branch_positions", "branch_tokens", "branch_tail_mass")
    }
    taken |= {n: arrays[n][stays_F] for n in ("branch_entry_ids", "branch_entry_logprobs")}
    ends = np.concatenate([[0], np.cumsum(counts_B[stays_B])]).astype(np.int64)
    return arrays | taken | {"branch_entry_offsets": ends}


def _selected(arrays: Arrays, encoding: Encoding, of: str) -> Arrays:
    """The same for the entries of positions (`of` is "") or of branches."""
    selection = encoding.selection
    if selection.keeps_all and encoding.steps is None:
        return arrays
    offsets = arrays[f"{of}entry_offsets"]
    counts, dropped = _kept_counts(
        arrays[f"{of}entry_logprobs"],
        offsets,
        2.0 if selection.keeps_all else selection.top_p,  # a rounded sum may reach 1 too early
        selection.min_entries,
        selection.floor,
        0.0 if encoding.steps is None else float(np.exp(-LARGEST_NATS)),
    )
    if int(counts.sum()) == len(arrays[f"{of}entry_ids"]):
        return arrays
    keep = _prefixes(offsets, counts)
    tail = np.minimum(arrays[f"{of}tail_mass"].astype(np.float64) + dropped, 1.0)
    return arrays | {
        f"{of}entry_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        f"{of}entry_ids": arrays[f"{of}entry_ids"][keep],
        f"{of}entry_logprobs": arrays[f"{of}entry_logprobs"][keep],
        f"{of}tail_mass": tail.astype(np.float32),
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
