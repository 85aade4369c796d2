"""The target tokens that have mass at one position: gathered in any order, written heaviest first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

FOUND = 8
"""Place in the kernel's state of how many tokens were found."""
SMALL_SORT = 32
"""So many tokens are sorted by insertion; more by numba's own sort."""
_LARGEST, _ID = np.int64(0x7FFFFFFF), np.int64(0xFFFFFFFF)


@njit(cache=True, nogil=True)
def add_mass(token: int, mass: float, state: Any, found: Any) -> None:
    """Give mass to a target token.

    Args:
        found: (place of each token of the vocabulary in the two that follow, -1 for none; tokens;
            their masses).
    """
    places, tokens, masses = found
    if mass > 0.0:
        place = places[token]
        if place < 0:
            place = state[FOUND]
            places[token] = place
            tokens[place] = token
            masses[place] = 0.0
            state[FOUND] += 1
        masses[place] += mass


@njit(cache=True, nogil=True)
def heaviest(
    count: int, label: int, limit: int, found: Any, keys: Any, out_ids: Any, out_mass: Any
) -> int:
    """Write the heaviest `limit` tokens (the label always among them), heaviest first.

    Masses are compared as the float32 they are stored in, ties by id.
    """
    places, tokens, masses = found
    rounded = masses[:count].astype(np.float32).view(np.uint32)
    for k in range(count):
        keys[k] = ((_LARGEST - np.int64(rounded[k])) << 32) | np.int64(tokens[k])
    if count > SMALL_SORT:
        keys[:count].sort()
    else:
        for k in range(1, count):
            key = keys[k]
            i = k - 1
            while i >= 0 and keys[i] > key:
                keys[i + 1] = keys[i]
                i -= 1
            keys[i + 1] = key
    kept = min(count, limit)
    has_label = False
    for k in range(kept):
        token = keys[k] & _ID
        out_ids[k] = token
        out_mass[k] = masses[places[token]]
        has_label = has_label or token == label
    if not has_label and kept > 0:
        out_ids[kept - 1] = label
        out_mass[kept - 1] = masses[places[label]]
    return kept


@njit(cache=True, nogil=True)
def grown(array: Any, used: int) -> Any:
    """A copy with twice the room."""
    larger = np.empty(2 * len(array), array.dtype)
    larger[:used] = array[:used]
    return larger
