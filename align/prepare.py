"""The method of the run file made ready for one source: maps are built, text is counted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from align.checked import CheckedAlignment
from align.continuation import PairCounts, first_tokens
from align.exact import ExactAligner
from align.first_token import piece_table
from align.method import Aligner, BytesAligner, SpansAligner
from align.mined import CarryOptions, MinedAligner
from align.mined_vocabulary import NearestTokens, nearest_tokens, written_tokens
from align.project import VocabularyMap
from align.stats import MatchCounts, StatsAligner
from align.transport import NUM_CANDIDATES, TransportAligner
from align.trie import TargetTrie
from store_schema.layout import Arrays
from store_schema.plan import Plan, ShardRecord
from store_schema.tokenizer import EncodedSegment, SegmentTokenizer


def make_aligner(checked: CheckedAlignment) -> Aligner:
    """The method of the run file, ready for this source."""
    section, reader, target = checked.section, checked.reader, checked.target
    options = CarryOptions(max_entries=section.max_entries)
    match section.method:
        case "exact":
            return ExactAligner(reader.location.url, target.vocab_size, eos_ids(checked))
        case "spans":
            return SpansAligner()
        case "mined":
            return MinedAligner(nearest(checked).token_map, target.vocab_size, options)
        case "stats":
            return StatsAligner(met_most(checked), target.vocab_size, options)
        case "ot":
            candidates = nearest(checked, NUM_CANDIDATES)
            return TransportAligner.of(
                candidates, reader.vocabulary, target.vocabulary, options=options
            )
    return BytesAligner(vocabulary_map(checked), section.max_entries)


def eos_ids(checked: CheckedAlignment) -> tuple[int, int]:
    """EOS of the source and of the target, -1 for none."""
    source = SegmentTokenizer.load(checked.run.sources[checked.source], name=checked.source)
    own, other = source.eos_id, checked.target.eos_id
    return -1 if own is None else own, -1 if other is None else other


def nearest(checked: CheckedAlignment, count: int = 1) -> NearestTokens:
    """The target tokens of least edit distance to each source token."""
    own, other = eos_ids(checked)
    return nearest_tokens(
        checked.reader.vocabulary,
        checked.target.vocabulary,
        count=count,
        written=written_tokens(checked.target),
        roles={own: other} if own >= 0 and other >= 0 else {},
    )


def met_most(checked: CheckedAlignment) -> npt.NDArray[np.int32]:
    """[V] the target token that each source token met most often in training text."""
    source, target = checked.reader.vocabulary, checked.target.vocabulary
    counts = MatchCounts(len(source), len(target))
    for tokens, segments, texts in counted(checked):
        offsets, ends = tokens["token_offsets"], tokens["byte_ends"].astype(np.int64)
        for d, (segment, text) in enumerate(zip(segments, texts, strict=True)):
            rows = slice(offsets[d], offsets[d + 1])
            counts.add(
                text,
                tokens["token_ids"][rows],
                ends[rows],
                segment.token_ids,
                segment.byte_ends.astype(np.int64),
            )
        counts.merge()
    return counts.token_map(nearest(checked).token_map, source, target)


def vocabulary_map(checked: CheckedAlignment) -> VocabularyMap:
    """Build the map of method `bytes`, counting continuations on training text if asked to.

    The same plan and store give the same map in every worker: only shards of the plan's order enter,
    whatever is committed.
    """
    section, reader, target = checked.section, checked.reader, checked.target
    pieces = piece_table(reader.vocabulary, target)
    counts = PairCounts(len(reader.vocabulary), target.vocab_size)
    if section.continuation != "first_token":
        for source, segments, _ in counted(checked):
            offsets = source["token_offsets"]
            ends = source["byte_ends"].astype(np.int64)
            for d, segment in enumerate(segments):
                rows = slice(offsets[d], offsets[d + 1])
                counts.add(
                    source["token_ids"][rows],
                    ends[rows],
                    segment.token_ids,
                    segment.byte_ends.astype(np.int64),
                )
            counts.merge()
    continuation = counts.continuation(first_tokens(pieces), section.continuation_prior)
    if section.continuation == "tail":
        continuation = continuation.only_sure()
    return VocabularyMap(
        pieces,
        continuation,
        TargetTrie.of(target.vocabulary),
        target.vocabulary.lengths,
        eos_ids(checked),
        section.look_ahead,
    )


def counted_shards(plan: Plan) -> tuple[ShardRecord, ...]:
    """Shards whose text may be counted: the split "train", or the plan's first where there is none.

    Held-out text stays out, so that what is measured on it was not learnt from it.
    """
    splits = plan.splits()
    return splits.get("train", next(iter(splits.values()), ()))


def counted(
    checked: CheckedAlignment,
) -> Iterator[tuple[Arrays, list[EncodedSegment], list[bytes]]]:
    """Tokens of the shards whose text may be counted, up to `statistics_tokens`.

    Yields:
        The source's token_offsets, token_ids and byte_ends; the segments in the target's tokens; their
        UTF-8 text.
    """
    left = checked.section.statistics_tokens
    for shard in counted_shards(checked.plan):
        if left <= 0:
            return
        left -= shard.num_tokens["target"]
        checked.reader.require_shards([shard])
        names = ["token_offsets", "token_ids", "byte_ends"]
        segments = checked.plan.segments(shard)
        yield (
            checked.reader.read(shard.index, names),
            checked.target.encode(segments),
            [segment.text.encode() for segment in segments],
        )
