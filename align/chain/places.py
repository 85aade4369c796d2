"""What the loop of `align.chain.kernel` carries from one position to the next, and what it reads.

Compiled functions that share a handful of numbers can share nothing but arrays, so the numbers stand in
two small ones, `number` (integers) and `weight` (float64), whose places have names here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from align.chain.found import Found
from store_schema.compiled import bare, compiled

# Places of `number`: how many open, row of the real open token, row that begins here, whether only
# part of that row still counts; the same for the next position.
OPEN, REAL, CLOSED, PARTIAL = range(4)
NEXT_OPEN, NEXT_REAL, NEXT_CLOSED, NEXT_PARTIAL = range(4, 8)
NUM_NUMBERS = 8
# Places of `weight`: of the real open token, of the row that begins here, that row's mass that
# counts; the same for the next position.
W_REAL, W_CLOSED, W_COUNTS = range(3)
W_NEXT_REAL, W_NEXT_CLOSED, W_NEXT_COUNTS = range(3, 6)
NUM_WEIGHTS = 6


class OpenTokens(NamedTuple):
    """Source tokens that agree with the text so far and reach on, in no order; `OPEN` of them.

    Args:
        at: int64, where the rest of each stands in the piece table.
        length: int64, bytes of that rest.
        mass: float64.
    """

    at: Any
    length: Any
    mass: Any


class Carried(NamedTuple):
    """Where the source may stand, before the label and behind it.

    Args:
        number: [NUM_NUMBERS] int64.
        weight: [NUM_WEIGHTS] float64.
        opened: Before the label.
        next_opened: Behind it.
        counts: Which entries of the row that begins here count, where only part of it does.
        next_counts: The same of the row that begins behind the label.
        found: Target tokens with mass at this position.
    """

    number: Any
    weight: Any
    opened: OpenTokens
    next_opened: OpenTokens
    counts: Any
    next_counts: Any
    found: Found


class Label(NamedTuple):
    """The target token of a position, and what its segment has around it.

    Args:
        token: Its id.
        begin: Its first byte within the segment.
        end: The byte after it.
        at_start: Whether it is the first of its segment.
        marked: Whether it carries a word mark that is not in the text.
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
    """Place for so many open tokens."""
    return OpenTokens(np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size))


@bare
def open_next(at: int, length: int, mass: float, carried: Carried) -> None:
    """Note a source token that reaches `length` bytes beyond the label."""
    opened, number = carried.next_opened, carried.number
    place = number[NEXT_OPEN]
    if length > 0 and mass > 0.0 and place < len(opened.at):
        opened.at[place] = at
        opened.length[place] = length
        opened.mass[place] = mass
        number[NEXT_OPEN] += 1


@bare
def advance(total: float, carried: Carried) -> Carried:
    """Make the next position's mixture the present one, its weights shares of `total`."""
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
        carried.found,
    )  # fmt: skip
