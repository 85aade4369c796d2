"""The state that the loop of `align.chain.kernel` carries from one position to the next.

Compiled functions can share changing numbers only in arrays. So they are in two small arrays, `number`
(int64) and `weight` (float64), and the constants below are indices into them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from align.chain.target_mass import TargetMass
from store_schema.compiled import bare, compiled

# Indices into `number`: how many tokens are open, row of the real token if it is open (-1 for none),
# row that begins here (-1 for none), whether only part of that row is still possible; then the same
# for the next position.
OPEN, REAL, CLOSED, PARTIAL = range(4)
NEXT_OPEN, NEXT_REAL, NEXT_CLOSED, NEXT_PARTIAL = range(4, 8)
NUM_NUMBERS = 8
# Indices into `weight`: probability that the real token is open, that the row begins here, and the mass
# of that row's part that is still possible; then the same for the next position.
W_REAL, W_CLOSED, W_COUNTS = range(3)
W_NEXT_REAL, W_NEXT_CLOSED, W_NEXT_COUNTS = range(3, 6)
NUM_WEIGHTS = 6


class OpenTokens(NamedTuple):
    """Source tokens that agree with the text so far and reach beyond it, in no order.

    The arrays are buffers; the first `number[OPEN]` values of each are in use.

    Args:
        at: int64, where the remaining bytes of each token begin in the piece table.
        length: int64, how many bytes remain.
        mass: float64 probability.
        branch: int64 branch of each token, -1 for none. With a branch no bytes may remain: then the
            branch's row begins.
    """

    at: Any
    length: Any
    mass: Any
    branch: Any


class Carried(NamedTuple):
    """The states that the source may be in, before the label and after it.

    Args:
        number: [NUM_NUMBERS] int64.
        weight: [NUM_WEIGHTS] float64.
        opened: Open tokens before the label.
        next_opened: Open tokens after the label.
        counts: Which entries of the row that begins here are still possible, if `number[PARTIAL]`.
        next_counts: The same for the row that begins after the label.
        target_mass: Mass of target tokens at this position.
    """

    number: Any
    weight: Any
    opened: OpenTokens
    next_opened: OpenTokens
    counts: Any
    next_counts: Any
    target_mass: TargetMass


class Label(NamedTuple):
    """The target token of a position, with what is needed of its segment.

    Args:
        token: Its id.
        begin: Its first byte within the segment.
        end: The byte after it.
        at_start: Whether it is the first of its segment.
        marked: Whether it begins with a word mark (space) that is not in the text.
        last_row: One past the segment's last source row.
        text: uint8, all texts end to end.
        text_start: Where the segment begins in it.
    """

    token: Any
    begin: Any
    end: Any
    at_start: Any
    marked: Any
    last_row: Any
    text: Any
    text_start: Any


@compiled
def allocate_open(size: int) -> OpenTokens:
    """Buffers for `size` open tokens."""
    at, length = np.empty(size, np.int64), np.empty(size, np.int64)
    return OpenTokens(at, length, np.empty(size), np.empty(size, np.int64))


@bare
def open_next(at: int, length: int, mass: float, branch: int, carried: Carried) -> None:
    """Add a source token that reaches `length` bytes beyond the label to the next open tokens, or, with
    a branch, to its end."""
    opened, number = carried.next_opened, carried.number
    place = number[NEXT_OPEN]
    further = length > 0 or (length == 0 and branch >= 0)
    if further and mass > 0.0 and place < len(opened.at):
        opened.at[place] = at
        opened.length[place] = length
        opened.mass[place] = mass
        opened.branch[place] = branch
        number[NEXT_OPEN] += 1


@bare
def advance(total: float, carried: Carried) -> Carried:
    """Go to the next position: its states become the present ones, their weights divided by `total`."""
    number, weight, mass = carried.number, carried.weight, carried.next_opened.mass
    for i in range(NEXT_OPEN):
        number[i] = number[NEXT_OPEN + i]
    for i in range(W_NEXT_REAL):
        weight[i] = weight[W_NEXT_REAL + i]
    weight[W_REAL] /= total
    weight[W_CLOSED] /= total
    for i in range(number[OPEN]):
        mass[i] /= total
    return Carried(
        number, weight, carried.next_opened, carried.opened, carried.next_counts, carried.counts,
        carried.target_mass,
    )  # fmt: skip
