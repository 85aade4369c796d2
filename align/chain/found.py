"""The target tokens that have mass at one position: gathered in any order, written heaviest first."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.chain.places import FOUND
from store_schema.compiled import bare, compiled

_ONE = np.int64(0x3F800000)
"""Bits of 1 as a float32."""
_LARGEST, _ID = np.int64(0x7FFFFFFF), np.int64(0xFFFFFFFF)
_STEP = 20
"""Masses are put in order by these upper bits first: 8 steps to each power of 2."""
MANY = 128
"""More than so many beyond the limit, all of nearly one mass, are not sorted by insertion alone."""
NUM_STEPS = 256
"""From 1 down to 2^-32; the last step has all that is smaller."""


@compiled
def room_for(vocab_size: int) -> Any:
    """What `add_mass` and `heaviest` work in: (masses by token, all 0; tokens found; float32 copies and
    their bits; keys; keys in order; places by step)."""
    rounded = np.empty(vocab_size, np.float32)
    return (
        np.zeros(vocab_size),
        np.empty(vocab_size, np.int32),
        rounded,
        rounded.view(np.int32),
        np.empty(vocab_size, np.int64),
        np.empty(vocab_size, np.int64),
        np.empty(NUM_STEPS + 1, np.int64),
    )


@bare
def add_mass(token: int, mass: float, state: Any, found: Any) -> None:
    """Give mass to a target token.

    Args:
        found: (masses by token, 0 where none was given; tokens that were given some).
    """
    masses, tokens = found
    if mass > 0.0:
        if masses[token] == 0.0:
            tokens[state[FOUND]] = token
            state[FOUND] += 1
        masses[token] += mass


@bare
def heaviest(
    count: int, label: int, limit: int, room: Any, out_ids: Any, out_mass: Any, at: int
) -> int:
    """Write the heaviest `limit` tokens (the label always among them) from place `at` on, heaviest
    first; returns the place after them.

    Masses are compared as the float32 they are stored in, ties by id. They are dealt into steps of
    mass, and only the steps that are written are put in order.
    """
    masses, tokens, rounded, bits, keys, ordered, places = room
    places[:] = 0
    for k in range(count):
        rounded[k] = masses[tokens[k]]
        key = _LARGEST - np.int64(bits[k])
        keys[k] = (key << 32) | np.int64(tokens[k])
        places[_step(key) + 1] += 1
    last = 0
    while places[last + 1] < limit and last + 1 < NUM_STEPS:
        last += 1
        places[last + 1] += places[last]
    dealt = places[last + 1]
    for k in range(count):
        step = _step(keys[k] >> 32)
        if step <= last:
            ordered[places[step]] = keys[k]
            places[step] += 1
    gap = 1
    while dealt > limit + MANY and gap < dealt // 3:
        gap = 3 * gap + 1  # Shell's sort
    while gap > 0:
        for k in range(gap, dealt):
            key = ordered[k]
            i = k - gap
            while i >= 0 and ordered[i] > key:
                ordered[i + gap] = ordered[i]
                i -= gap
            ordered[i + gap] = key
        gap //= 3
    kept = min(dealt, limit)
    has_label = False
    for k in range(kept):
        token = ordered[k] & _ID
        out_ids[at + k] = token
        out_mass[at + k] = masses[token]
        has_label = has_label or token == label
    if not has_label and kept > 0:
        out_ids[at + kept - 1] = label
        out_mass[at + kept - 1] = masses[label]
    return int(at + kept)


@bare
def _step(key: int) -> int:
    """Of a mass, heaviest first."""
    step = (key - (_LARGEST - _ONE)) >> _STEP
    if step < 0:
        return 0
    return int(step) if step < NUM_STEPS else NUM_STEPS - 1


@bare
def clear(count: int, masses: Any, tokens: Any) -> None:
    """Forget what was found."""
    for k in range(count):
        masses[tokens[k]] = 0.0


@compiled
def grown(array: Any, used: int) -> Any:
    """A copy with twice the room."""
    larger = np.empty(2 * len(array), array.dtype)
    larger[:used] = array[:used]
    return larger
