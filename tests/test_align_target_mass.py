"""The heaviest tokens of a position, against sorting all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from numba import typed

from align.chain.target_mass import (
    Scratch,
    TargetMass,
    add_mass,
    allocate_scratch,
    allocate_target_mass,
    clear,
    heaviest,
)
from store_schema.compiled import compiled

MASSES = st.one_of(
    st.floats(0.0, 1.0),
    st.floats(1e-45, 1e-30),
    st.sampled_from([1.0, 1.0 + 1e-9, 0.5, 0.25, 2.0**-32, 2.0**-33, 1e-300]),
    st.integers(0, 3).map(lambda n: 0.01 * (1 + n * 1e-9)),  # equal once they are float32
)


@given(
    given_masses=st.lists(st.tuples(st.integers(0, 99), MASSES), min_size=1, max_size=300),
    limit=st.integers(1, 40),
    label=st.integers(0, 99),
)
@example([(token, 0.01) for token in range(100)], 5, 7)
def test_heaviest_equals_a_sort(
    given_masses: list[tuple[int, float]], limit: int, label: int
) -> None:
    check(100, given_masses, limit, label)


def test_many_tokens_of_one_mass() -> None:
    chance = np.random.default_rng(0)
    near = 0.001 * (1 + chance.random(5000) * 1e-2)
    check(5000, list(enumerate(near.tolist())), 32, 4321)
    check(5000, list(enumerate(np.full(5000, 1e-12).tolist())), 4000, 10)


@compiled
def heaviest_of(
    added: Any, target_mass: TargetMass, label: int, limit: int, scratch: Scratch, out: Any
) -> int:
    """Add masses, write the heaviest from place 3 on, and take all masses away."""
    for token, mass in added:
        add_mass(token, mass, target_mass)
    stop = heaviest(target_mass, label, limit, scratch, *out, 3)
    out[1][0] = target_mass.number[0]
    clear(target_mass)
    return stop


def check(size: int, given_masses: list[tuple[int, float]], limit: int, label: int) -> None:
    given_masses = [*given_masses, (label, 0.125)]
    target_mass, scratch = allocate_target_mass(size), allocate_scratch(size)
    expected: dict[int, float] = {}
    for token, mass in given_masses:
        if mass > 0:
            expected[token] = expected.get(token, 0.0) + mass
    ids, masses = np.zeros(size + 3, np.uint32), np.zeros(size + 3)
    added = typed.List(given_masses)
    stop = heaviest_of(added, target_mass, label, limit, scratch, (ids, masses))
    assert masses[0] == len(expected)
    order = sorted(expected, key=lambda token: (-np.float32(expected[token]), token))[:limit]
    if label not in order:
        order[-1] = label
    assert ids[3:stop].tolist() == order
    assert masses[3:stop].tolist() == [expected[token] for token in order]
    assert not target_mass.masses.any()
    assert target_mass.number[0] == 0
