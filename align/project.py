"""One shard carried into the target's tokens: a pure function of arrays, texts and the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from align.continuation import Continuation
from align.first_token import PieceTable
from align.kernel import common_spans, project_segments
from store_schema.layout import Arrays, Origin, array_names, row_sums
from store_schema.tokenizer import EncodedSegment


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """Where the bytes of each source token go.

    Args:
        pieces: What the target begins with at each byte of each source token.
        continuation: Where a whole source token's mass goes in running text.
        target_vocab_size: Ids of the target are below it.
    """

    pieces: PieceTable
    continuation: Continuation
    target_vocab_size: int


def project(
    source: Arrays,
    texts: Sequence[bytes],
    target: Sequence[EncodedSegment],
    mapping: VocabularyMap,
    *,
    max_entries: int,
) -> Arrays:
    """Aligned arrays of one shard (method `bytes`).

    Args:
        source: The source store's arrays of the shard.
        texts: UTF-8 text of each segment, in the order of the shard.
        target: The same segments as the target's tokenizer reads them.
        mapping: Between the two vocabularies.
        max_entries: Kept at each position, at most; the rest is tail.

    Returns:
        Arrays of an aligned shard, see store_schema.layout.

    Source: design.md, "Align, default method bytes", cases 1 to 4; the share of a row's entries that
        stays with the tail inside a source token is ours.
    """
    target_ids, target_ends, target_offsets = join_segments(target)
    source_ends = source["byte_ends"].astype(np.int64)
    rows = (source["token_offsets"], target_offsets)
    text_lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    with np.errstate(invalid="ignore"):
        probabilities = np.exp(source["entry_logprobs"].astype(np.float64))
        labels = np.exp(source["label_logprobs"].astype(np.float64))
    pieces, continuation = mapping.pieces, mapping.continuation
    offsets, ids, mass, origin, label_mass = project_segments(
        rows,
        target_ids,
        target_ends,
        np.frombuffer(b"".join(texts), np.uint8),
        np.concatenate(([0], np.cumsum(text_lengths))),
        _lead_marks(source, pieces),
        (
            source_ends,
            source["token_ids"],
            source["entry_offsets"],
            source["entry_ids"],
            probabilities,
            labels,
        ),
        (pieces.data, pieces.offsets),
        (pieces.middle, pieces.start),
        (continuation.offsets, continuation.targets, continuation.weights),
        mapping.target_vocab_size,
        max_entries,
    )
    with np.errstate(divide="ignore"):
        logprobs = np.minimum(np.log(mass), 0.0).astype("<f4")
        label_logprobs = np.minimum(np.log(label_mass), 0.0)
    entries: Arrays = {
        "segment_ids": source["segment_ids"],
        "token_offsets": target_offsets,
        "token_ids": target_ids,
        "byte_ends": target_ends.astype("<u4"),
        "entry_offsets": offsets,
        "entry_ids": ids,
        "entry_logprobs": logprobs,
        "tail_mass": _tail(mass, offsets),
        "label_logprobs": np.where(label_mass > 0, label_logprobs, np.nan).astype("<f4"),
        "origin": origin,
    }
    return entries | span_arrays(source, rows, source_ends, target_ends)


def copy_exact(source: Arrays, target: Sequence[EncodedSegment]) -> Arrays:
    """Aligned arrays where source and target share a vocabulary and tokenise alike."""
    known = np.diff(source["entry_offsets"]) > 0
    rows = (source["token_offsets"], source["token_offsets"])
    ends = source["byte_ends"].astype(np.int64)
    origin = np.where(known, Origin.BOUNDARY, Origin.NONE).astype("|u1")
    kept = {name: source[name] for name in array_names("source")}
    return kept | {"origin": origin} | span_arrays(source, rows, ends, ends)


def span_arrays(
    source: Arrays, rows: Any, source_ends: npt.NDArray[Any], target_ends: npt.NDArray[Any]
) -> Arrays:
    """Common spans, and what the source spends on each segment."""
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
    """Token ids [N], byte ends [N] (int64) and token offsets [D+1] of segments end to end."""
    counts = np.fromiter((len(s.token_ids) for s in segments), np.int64, len(segments))
    ids = np.concatenate([s.token_ids for s in segments]).astype("<u4")
    ends = np.concatenate([s.byte_ends for s in segments]).astype("<i8")
    return ids, ends, np.concatenate(([0], np.cumsum(counts)))


def statistics(arrays: Arrays, source: Arrays) -> dict[str, float]:
    """Figures of an aligned shard for its commit: counts by origin, mass, the source's cost."""
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


def _lead_marks(source: Arrays, pieces: PieceTable) -> npt.NDArray[np.uint8]:
    """[D] 1 where the first source token's bytes are one longer than what it takes of the text."""
    starts = source["token_offsets"][:-1]
    marks = np.zeros(len(starts), np.uint8)
    rows = np.flatnonzero(np.diff(source["token_offsets"]) > 0)
    first = starts[rows]
    ids = source["token_ids"][first].astype(np.int64)
    lengths = pieces.offsets[ids + 1] - pieces.offsets[ids]
    marks[rows] = lengths == source["byte_ends"][first].astype(np.int64) + 1
    return marks


def _tail(mass: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    return np.clip(1.0 - row_sums(mass, offsets), 0.0, 1.0).astype("<f4")
