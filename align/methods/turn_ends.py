"""The token that ends a chat turn: converted from source to target apart from the text.

In each model it is one special token without bytes, and both mean the same. So with every method its
rows are removed before a shard is aligned, and a row for the target's token is put after the text, with
the probability that the source gave its own token. The rest of that row is tail.

Shapes: D segments, N positions, E entries, S spans of a shard, R rows that are put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.encoding.selection import take_branches
from store_schema.layout import BRANCH, Arrays, Origin
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import EncodedSegment

_ENTRIES = ("entry_ids", "entry_logprobs")
_OFFSETS = ("token_offsets", "entry_offsets", "segment_ids")


def is_chat_end(segment: Segment) -> bool:
    """Whether the last token of a segment may be the token that ends a chat turn."""
    return segment.ends_document and segment.context is not None and '"messages"' in segment.context


def turn_end_rows(
    source: Arrays, segments: Sequence[Segment], special: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """[D] row of the source's token that ends the turn, -1 where a segment has none.

    Args:
        source: token_offsets, token_ids and byte_ends of a shard.
        segments: The shard's segments.
        special: [V] whether a source token is special (has no text).
    """
    offsets, ends = source["token_offsets"], source["byte_ends"]
    rows_D = np.full(len(segments), -1, np.int64)
    for d, segment in enumerate(segments):
        last = int(offsets[d + 1]) - 1
        if last <= offsets[d] or not is_chat_end(segment):
            continue
        if special[int(source["token_ids"][last])] and ends[last] == ends[last - 1]:
            rows_D[d] = last
    return rows_D


def without_turn_ends(source: Arrays, rows_D: npt.NDArray[np.int64]) -> Arrays:
    """A source's arrays without the rows that end turns.

    Args:
        source: Some or all arrays of a shard; token_offsets among them.
        rows_D: From `turn_end_rows`.
    """
    gone = rows_D[rows_D >= 0]
    if not len(gone):
        return source
    num_tokens = int(source["token_offsets"][-1])
    stays_N = np.ones(num_tokens, bool)
    stays_N[gone] = False
    out: Arrays = {}
    for name, array in source.items():
        if name not in (*_ENTRIES, *_OFFSETS) and not name.startswith(BRANCH):
            out[name] = array[stays_N]
    out["token_offsets"] = source["token_offsets"] - np.concatenate(([0], np.cumsum(rows_D >= 0)))
    if "segment_ids" in source:
        out["segment_ids"] = source["segment_ids"]
    if "entry_offsets" in source:
        counts_N = np.diff(source["entry_offsets"])
        out["entry_offsets"] = _offsets(counts_N[stays_N])
        kept_E = np.repeat(stays_N, counts_N)
        out |= {name: source[name][kept_E] for name in _ENTRIES}
    if "branch_positions" in source:
        positions = source["branch_positions"].astype(np.int64)
        kept = take_branches(source, np.flatnonzero(stays_N[positions]))
        out |= {name: array for name, array in kept.items() if name.startswith(BRANCH)}
        gone_before = np.concatenate(([0], np.cumsum(~stays_N)))
        positions = out["branch_positions"].astype(np.int64)
        out["branch_positions"] = (positions - gone_before[positions]).astype("<u4")
    return out


def with_turn_ends(
    aligned: Arrays, target: Sequence[EncodedSegment], logprobs_D: npt.NDArray[np.floating[Any]]
) -> Arrays:
    """Add a row for each target token that ends a turn to the arrays of an aligned shard.

    Args:
        aligned: Arrays of an aligned shard, without ends of turns.
        target: The segments as the target reads them, with ends of turns.
        logprobs_D: [D] the source's log-probability of its own token, NaN where it has none: the added
            row then has no distribution and is trained on ground truth alone.
    """
    ends_D = np.fromiter((part.ends_turn for part in target), bool, len(target))
    if not ends_D.any():
        return aligned
    offsets = aligned["token_offsets"]
    at_R = offsets[1:][ends_D]  # a row is put before what stands there now
    ids_R = np.array([part.token_ids[-1] for part in target if part.ends_turn], "<u4")
    bytes_R = np.array([part.byte_ends[-1] for part in target if part.ends_turn], "<u4")
    logprobs_R = logprobs_D[ends_D].astype("<f4")
    # Method spans has no entries here either.
    has_entries = len(aligned["entry_ids"]) > 0
    has_entry_R = has_entries & ~np.isnan(logprobs_R)
    rows: dict[str, npt.NDArray[Any]] = {
        "token_ids": ids_R,
        "byte_ends": bytes_R,
        "label_logprobs": np.where(has_entry_R, logprobs_R, np.nan).astype("<f4"),
        "tail_mass": np.where(has_entry_R, -np.expm1(logprobs_R), 1.0).astype("<f4"),
        "origin": np.where(has_entry_R, Origin.BOUNDARY, Origin.NONE).astype("|u1"),
        # A span of its own, after those of the text.
        "span_index": np.diff(aligned["span_offsets"])[ends_D].astype("<u4"),
    }
    out = dict(aligned)
    for name, values in rows.items():
        out[name] = np.insert(aligned[name], at_R, values)
    out["token_offsets"] = offsets + np.concatenate(([0], np.cumsum(ends_D)))
    entry_at_R = aligned["entry_offsets"][at_R]
    counts_N = np.insert(np.diff(aligned["entry_offsets"]), at_R, has_entry_R.astype(np.int64))
    out["entry_offsets"] = _offsets(counts_N)
    out["entry_ids"] = np.insert(aligned["entry_ids"], entry_at_R[has_entry_R], ids_R[has_entry_R])
    out["entry_logprobs"] = np.insert(
        aligned["entry_logprobs"], entry_at_R[has_entry_R], logprobs_R[has_entry_R]
    )
    span_at_R = aligned["span_offsets"][1:][ends_D]
    out["span_byte_ends"] = np.insert(aligned["span_byte_ends"], span_at_R, bytes_R)
    out["span_logprobs"] = np.insert(aligned["span_logprobs"], span_at_R, logprobs_R)
    out["span_offsets"] = aligned["span_offsets"] + np.concatenate(([0], np.cumsum(ends_D)))
    return out


def source_logprobs(source: Arrays, rows_D: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """[D] the source's log-probability of each end of a turn, NaN where there is none.

    Args:
        source: label_logprobs of a shard.
        rows_D: From `turn_end_rows`.
    """
    logprobs_D = np.full(len(rows_D), np.nan, np.float32)
    has_end_D = rows_D >= 0
    logprobs_D[has_end_D] = source["label_logprobs"][rows_D[has_end_D]]
    return logprobs_D


def _offsets(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(counts))).astype("<i8")
