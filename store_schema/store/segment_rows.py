"""The rows of one segment of a store, for showing them to users."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from store_schema.errors import CorruptionError
from store_schema.layout import Arrays, Origin
from store_schema.store.guards import REPAIR

ORIGINS = {
    Origin.NONE: "no distribution known",
    Origin.BOUNDARY: "starts where a source token starts",
    Origin.INSIDE: "starts inside a source token",
}
"""Where the distribution of an aligned position comes from, in words."""


@dataclass(frozen=True, slots=True)
class Row:
    """One token of a segment with the distribution at its position.

    Args:
        start: First byte in the segment's text.
        end: One past its last byte; equal to `start` for a token without bytes.
        token_id: Its id in the store's vocabulary.
        logprob: Its log-probability in nats; None where it is not known.
        tail_mass: Probability outside all entries.
        entries: The first entries as (id, log-probability in nats), most probable first.
        left_out: Number of the other entries.
        left_out_mass: Sum of their probabilities.
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
    """Index of a segment on axis D.

    Args:
        arrays: `segment_ids` of its shard.
        row: Its row in the plan's segment table.
        where: Store and shard, for messages.

    Raises:
        CorruptionError: The shard does not have it exactly once.
    """
    places = np.flatnonzero(arrays["segment_ids"] == row)
    if len(places) != 1:
        raise CorruptionError(
            f"row {row} is there {len(places)} times",
            where=f"{where}, array segment_ids",
            expected="once, as in the plan",
            hint=REPAIR,
        )
    return int(places[0])


def rows_of(arrays: Arrays, at: int, *, top: int) -> tuple[Row, ...]:
    """The rows of one segment.

    Args:
        arrays: Arrays of its shard, of a source or aligned store.
        at: Its index on axis D.
        top: Entries of each row, at most.
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
