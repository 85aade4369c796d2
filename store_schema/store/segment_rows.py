"""One segment of a store, token by token, for people to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from store_schema.errors import CorruptionError
from store_schema.layout import Arrays, Origin
from store_schema.store.guards import REPAIR

ORIGINS = {
    Origin.NONE: "nothing known here",
    Origin.BOUNDARY: "starts where a source token starts",
    Origin.INSIDE: "starts inside a source token",
}
"""Where the distribution of an aligned position comes from, in words."""


@dataclass(frozen=True, slots=True)
class Row:
    """One token with the distribution of what might have stood there.

    Args:
        start: First byte in the segment's text.
        end: One past its last byte; equal to `start` for a token without bytes.
        token_id: In its store's vocabulary.
        logprob: Of the token itself, nats; None where it is not known.
        tail_mass: Probability outside all entries.
        entries: The first of the entries as (id, nats), most probable first.
        left_out: Entries that are not among them.
        left_out_mass: Their probability.
    """

    start: int
    end: int
    token_id: int
    logprob: float | None
    tail_mass: float
    entries: tuple[tuple[int, float], ...]
    left_out: int
    left_out_mass: float


def place_of(arrays: Arrays, row: int, where: str) -> int:
    """Place of a segment on the axis D.

    Args:
        arrays: `segment_ids` of its shard.
        row: Of the plan's segment table.
        where: Store and shard, for messages.

    Raises:
        CorruptionError: It is not there exactly once.
    """
    found = np.flatnonzero(arrays["segment_ids"] == row)
    if len(found) != 1:
        raise CorruptionError(
            f"row {row} is there {len(found)} times",
            where=f"{where}, array segment_ids",
            expected="once, as in the plan",
            hint=REPAIR,
        )
    return int(found[0])


def rows_of(arrays: Arrays, at: int, *, top: int) -> tuple[Row, ...]:
    """The tokens of one segment.

    Args:
        arrays: Of its shard, of a source or aligned store.
        at: Its place on the axis D.
        top: Entries kept of each.
    """
    rows, start = [], 0
    for i in range(*map(int, arrays["token_offsets"][at : at + 2])):
        first, last = map(int, arrays["entry_offsets"][i : i + 2])
        ids = arrays["entry_ids"][first:last].tolist()
        logprobs = arrays["entry_logprobs"][first:last].tolist()
        end, label = int(arrays["byte_ends"][i]), float(arrays["label_logprobs"][i])
        rows.append(
            Row(
                start,
                end,
                int(arrays["token_ids"][i]),
                None if math.isnan(label) else label,
                float(arrays["tail_mass"][i]),
                tuple(zip(ids[:top], logprobs[:top], strict=True)),
                max(len(ids) - top, 0),
                sum(map(math.exp, logprobs[top:])),
            )
        )
        start = end
    return tuple(rows)
