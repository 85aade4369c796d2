"""What the loop of `align.chain.kernel` carries from one position to the next.

`state` (integers) and `weight` (float64) are two small arrays, since compiled functions that share a
handful of numbers can share nothing else; their places have names here.
"""

from __future__ import annotations

from typing import Any

from store_schema.compiled import bare

# Places of `state`, integers: how many open, row of the real open token, row that begins here, whether
# only part of that row still counts; the same for the next position; tokens found.
OPEN, REAL, CLOSED, PARTIAL = range(4)
NEXT_OPEN, NEXT_REAL, NEXT_CLOSED, NEXT_PARTIAL = range(4, 8)
FOUND = 8
# Places of `weight`: of the real open token, of the row that begins here, that row's mass that
# counts; the same for the next position.
W_REAL, W_CLOSED, W_COUNTS = range(3)
W_NEXT_REAL, W_NEXT_CLOSED, W_NEXT_COUNTS = range(3, 6)
NUM_WEIGHTS = 6


@bare
def open_next(at: int, length: int, mass: float, state: Any, following: Any) -> None:
    """Note a source token that reaches `length` bytes beyond the label."""
    next_at, next_length, next_mass = following
    place = state[NEXT_OPEN]
    if length > 0 and mass > 0.0 and place < len(next_at):
        next_at[place] = at
        next_length[place] = length
        next_mass[place] = mass
        state[NEXT_OPEN] += 1
