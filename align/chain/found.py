"""The target tokens that have mass at one position: gathered in any order, written heaviest first."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

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


class Found(NamedTuple):
    """Target tokens that have mass at a position.

    Args:
        number: [1] int64, how many.
        tokens: [V] int32, which, in the order in which they were found.
        masses: [V] float64 by token; 0 for those not found.
    """

    number: Any
    tokens: Any
    masses: Any


class Scratch(NamedTuple):
    """What `heaviest` works in: float32 copies of masses, their bits, keys to sort by, keys in order,
    and places by step."""

    rounded: Any
    bits: Any
    keys: Any
    ordered: Any
    places: Any


@compiled
def allocate_found(vocab_size: int) -> Found:
    """Nothing found yet among so many target tokens."""
    return Found(np.zeros(1, np.int64), np.empty(vocab_size, np.int32), np.zeros(vocab_size))


@compiled
def allocate_scratch(vocab_size: int) -> Scratch:
    """Room to sort so many target tokens in."""
    rounded = np.empty(vocab_size, np.float32)
    return Scratch(
        rounded,
        rounded.view(np.int32),
        np.empty(vocab_size, np.int64),
        np.empty(vocab_size, np.int64),
        np.empty(NUM_STEPS + 1, np.int64),
    )


@bare
def add_mass(token: int, mass: float, found: Found) -> None:
    """Give mass to a target token."""
    if mass > 0.0:
        if found.masses[token] == 0.0:
            found.tokens[found.number[0]] = token
            found.number[0] += 1
        found.masses[token] += mass


@bare
def heaviest(
    found: Found, label: int, limit: int, scratch: Scratch, out_ids: Any, out_mass: Any, at: int
) -> int:
    """Write the heaviest `limit` tokens (the label always among them) from place `at` on, heaviest
    first; returns the place after them.

    Masses are compared as the float32 they are stored in, ties by id. They are sorted into steps of
    mass, and only the steps that are written are put in order.
    """
    count, tokens, masses = found.number[0], found.tokens, found.masses
    rounded, bits, keys, ordered, places = scratch
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
    num_sorted = places[last + 1]
    for k in range(count):
        step = _step(keys[k] >> 32)
        if step <= last:
            ordered[places[step]] = keys[k]
            places[step] += 1
    gap = 1
    while num_sorted > limit + MANY and gap < num_sorted // 3:
        gap = 3 * gap + 1  # Shell's sort
    while gap > 0:
        for k in range(gap, num_sorted):
            key = ordered[k]
            i = k - gap
            while i >= 0 and ordered[i] > key:
                ordered[i + gap] = ordered[i]
                i -= gap
            ordered[i + gap] = key
        gap //= 3
    kept = min(num_sorted, limit)
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
def clear(found: Found) -> None:
    """Forget what was found."""
    for k in range(found.number[0]):
        found.masses[found.tokens[k]] = 0.0
    found.number[0] = 0


@compiled
def grown(array: Any, used: int) -> Any:
    """A copy with twice the room."""
    larger = np.empty(2 * len(array), array.dtype)
    larger[:used] = array[:used]
    return larger
