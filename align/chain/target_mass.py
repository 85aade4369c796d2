"""Probability mass of target tokens at one position: added in any order, written largest first."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from store_schema.compiled import bare, compiled

_ONE = np.int64(0x3F800000)
"""Bits of 1 as a float32."""
_LARGEST, _ID = np.int64(0x7FFFFFFF), np.int64(0xFFFFFFFF)
_STEP = 20
"""Low bits of a float32 mass that the first, coarse sort ignores: 8 steps to each power of 2."""
MANY = 128
"""Insertion sort alone is used up to this many tokens more than the limit; Shell sort beyond."""
NUM_STEPS = 256
"""Steps from 1 down to 2^-32; the last step has all smaller masses."""


class TargetMass(NamedTuple):
    """Mass of target tokens at a position, for adding to.

    Args:
        number: [1] int64, how many tokens have mass.
        tokens: [V] int32; the first `number` are the tokens with mass, in the order of adding.
        masses: [V] float64 mass of each token of the vocabulary, 0 for the others.
    """

    number: Any
    tokens: Any
    masses: Any


class Scratch(NamedTuple):
    """Buffers of `heaviest`: float32 copies of masses, their bits, keys to sort by, sorted keys, and
    the number of masses by step."""

    rounded: Any
    bits: Any
    keys: Any
    ordered: Any
    places: Any


@compiled
def allocate_target_mass(vocab_size: int) -> TargetMass:
    """No mass yet, for a vocabulary of this size."""
    return TargetMass(np.zeros(1, np.int64), np.empty(vocab_size, np.int32), np.zeros(vocab_size))


@compiled
def allocate_scratch(vocab_size: int) -> Scratch:
    """Buffers to sort up to `vocab_size` tokens."""
    rounded = np.empty(vocab_size, np.float32)
    return Scratch(
        rounded,
        rounded.view(np.int32),
        np.empty(vocab_size, np.int64),
        np.empty(vocab_size, np.int64),
        np.empty(NUM_STEPS + 1, np.int64),
    )


@bare
def add_mass(token: int, mass: float, target_mass: TargetMass) -> None:
    """Add mass to a target token."""
    if mass > 0.0:
        if target_mass.masses[token] == 0.0:
            target_mass.tokens[target_mass.number[0]] = token
            target_mass.number[0] += 1
        target_mass.masses[token] += mass


@bare
def heaviest(
    target_mass: TargetMass,
    label: int,
    limit: int,
    scratch: Scratch,
    out_ids: Any,
    out_mass: Any,
    at: int,
) -> int:
    """Write the `limit` tokens of most mass, the label always among them, in order of falling mass.

    Masses are compared as float32, as they are stored; ties are in order of id. A coarse sort by
    `_step` comes first, then only the steps that are written are sorted.

    Args:
        target_mass: The masses.
        label: Takes the last place if it is not among the largest.
        limit: How many to write, at most.
        scratch: Buffers.
        out_ids: Tokens are written here, from `at` on.
        out_mass: Their masses are written here, from `at` on.
        at: Index of the first to be written.

    Returns:
        The index after the last one written.
    """
    count, tokens, masses = target_mass.number[0], target_mass.tokens, target_mass.masses
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
    """The coarse step of a mass's key, 0 for masses of 1 or more."""
    step = (key - (_LARGEST - _ONE)) >> _STEP
    if step < 0:
        return 0
    return int(step) if step < NUM_STEPS else NUM_STEPS - 1


@bare
def clear(target_mass: TargetMass) -> None:
    """Set all masses to 0 again."""
    for k in range(target_mass.number[0]):
        target_mass.masses[target_mass.tokens[k]] = 0.0
    target_mass.number[0] = 0


@compiled
def grown(array: Any, used: int) -> Any:
    """A copy of twice the length, with the first `used` values."""
    larger = np.empty(2 * len(array), array.dtype)
    for i in range(used):  # a slice takes three seconds to compile
        larger[i] = array[i]
    return larger
