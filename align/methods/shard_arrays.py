"""Arrays of an aligned shard that all methods make in the same way, and the figures of its commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from align.methods.spans import common_spans
from store_schema.layout import Arrays, Origin, row_sums
from store_schema.text.tokenizer import EncodedSegment


def without_entries(source: Arrays, target: Sequence[EncodedSegment]) -> Arrays:
    """Arrays of an aligned shard that has common spans but no entries.

    Args:
        source: The source store's arrays of the shard.
        target: The same segments as the target's tokenizer reads them.
    """
    ids, ends, offsets = join_segments(target)
    count = len(ids)
    arrays: Arrays = {
        "segment_ids": source["segment_ids"],
        "token_offsets": offsets,
        "token_ids": ids,
        "byte_ends": ends.astype("<u4"),
        "entry_offsets": np.zeros(count + 1, "<i8"),
        "entry_ids": np.empty(0, "<u4"),
        "entry_logprobs": np.empty(0, "<f4"),
        "tail_mass": np.ones(count, "<f4"),
        "label_logprobs": np.full(count, np.nan, "<f4"),
        "origin": np.full(count, Origin.NONE, "|u1"),
    }
    rows = (source["token_offsets"], offsets)
    return arrays | span_arrays(source, rows, source["byte_ends"].astype(np.int64), ends)


class MappedRows(NamedTuple):
    """Rows of N target positions, E entries in all.

    Args:
        offsets: [N+1] int64 entries of each position.
        token_ids: [E] target ids, most probable first.
        mass: [E] float64 probabilities.
        label_mass: [N] float64 probability of the label, 0 where it is not known.
        origin: [N] uint8 `Origin`.
    """

    offsets: npt.NDArray[np.int64]
    token_ids: npt.NDArray[Any]
    mass: npt.NDArray[np.float64]
    label_mass: npt.NDArray[np.float64]
    origin: npt.NDArray[np.uint8]


def mapped_arrays(
    source: Arrays,
    target: tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], npt.NDArray[np.int64]],
    rows: MappedRows,
) -> Arrays:
    """Arrays of an aligned shard whose rows were mapped; what the entries lack is tail.

    Args:
        source: The source store's arrays of the shard.
        target: Token ids, byte ends and token offsets, as of `join_segments`.
        rows: The rows; a position without entries gets origin none.
    """
    ids, ends, offsets = target
    origin = rows.origin.astype("|u1")
    origin[np.diff(rows.offsets) == 0] = Origin.NONE
    with np.errstate(divide="ignore"):
        labels = np.minimum(np.log(rows.label_mass), 0.0)
    arrays: Arrays = {
        "segment_ids": source["segment_ids"],
        "token_offsets": offsets,
        "token_ids": ids,
        "byte_ends": ends.astype("<u4"),
        "entry_offsets": rows.offsets.astype("<i8"),
        "entry_ids": rows.token_ids.astype("<u4"),
        "entry_logprobs": np.minimum(np.log(rows.mass), 0.0).astype("<f4"),
        "tail_mass": np.clip(1.0 - row_sums(rows.mass, rows.offsets), 0.0, 1.0).astype("<f4"),
        "label_logprobs": np.where(rows.label_mass > 0, labels, np.nan).astype("<f4"),
        "origin": origin,
    }
    both = (source["token_offsets"], offsets)
    return arrays | span_arrays(source, both, source["byte_ends"].astype(np.int64), ends)


def span_arrays(
    source: Arrays, rows: Any, source_ends: npt.NDArray[Any], target_ends: npt.NDArray[Any]
) -> Arrays:
    """Arrays of the common spans, and the source's NLL and bytes of each segment.

    Args:
        source: The source store's arrays of the shard.
        rows: (source token offsets [D+1], target token offsets [D+1]).
        source_ends: [source positions] int64 byte after each source token, within its segment.
        target_ends: [N] int64, the same of the target.
    """
    labels = source["label_logprobs"].astype(np.float64)
    offsets, index, span_ends, logprobs = common_spans(rows, source_ends, target_ends, labels)
    starts = source["token_offsets"][:-1]
    known = ~np.isnan(labels)
    row_segment = np.repeat(np.arange(len(starts)), np.diff(source["token_offsets"]))
    begins = np.concatenate(([0], source_ends[:-1])) if len(source_ends) else source_ends
    begins = begins.copy()
    begins[starts[starts < len(begins)]] = 0
    lengths = np.where(known, source_ends - begins, 0)
    nats = np.where(known, -labels, 0.0)
    return {
        "span_offsets": offsets,
        "span_index": index,
        "span_byte_ends": span_ends,
        "span_logprobs": np.minimum(logprobs, 0.0).astype("<f4"),
        "source_nats": np.bincount(row_segment, nats, len(starts)).astype("<f8"),
        "source_bytes": np.bincount(row_segment, lengths, len(starts)).astype("<i8"),
    }


def join_segments(
    segments: Sequence[EncodedSegment],
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token ids [N] uint32, byte ends [N] int64 and token offsets [D+1] of segments, end to end."""
    counts = np.fromiter((len(s.token_ids) for s in segments), np.int64, len(segments))
    ids = np.concatenate([s.token_ids for s in segments]).astype("<u4")
    ends = np.concatenate([s.byte_ends for s in segments]).astype("<i8")
    return ids, ends, np.concatenate(([0], np.cumsum(counts)))


def statistics(arrays: Arrays, source: Arrays) -> dict[str, float]:
    """Figures of an aligned shard for its commit: counts by origin, mass, NLL in nats, bytes.

    Args:
        arrays: Of the aligned shard.
        source: Of the source store's shard.
    """
    origin = arrays["origin"]
    covered = origin != Origin.NONE
    return {
        "positions": float(len(origin)),
        "origin_boundary": float((origin == Origin.BOUNDARY).sum()),
        "origin_inside": float((origin == Origin.INSIDE).sum()),
        "origin_none": float((~covered).sum()),
        "mass_in": float((1.0 - source["tail_mass"].astype(np.float64)).sum()),
        "source_positions": float(len(source["tail_mass"])),
        "mass_out": float((1.0 - arrays["tail_mass"].astype(np.float64)).sum()),
        "label_nats": float(-np.nansum(arrays["label_logprobs"].astype(np.float64))),
        "label_positions": float((~np.isnan(arrays["label_logprobs"])).sum()),
        "source_nats": float(arrays["source_nats"].sum()),
        "source_bytes": float(arrays["source_bytes"].sum()),
    }
