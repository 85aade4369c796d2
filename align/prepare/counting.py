"""Count pairs of source and target tokens in training text, once for all workers.

Every worker would count the same text. The first to finish writes its counts into the aligned store
(`kept_counts`); workers that start later read them, and those that are still counting stop and read
them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from align.counts.counted_text import planned_count, text_fingerprint
from align.counts.kept_counts import COUNTS_FILE, KeptCounts
from align.counts.pair_counts import DistinctPairs
from align.methods.turn_ends import turn_end_rows, without_turn_ends
from align.prepare.checked import CheckedAlignment
from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.errors import StoreError
from store_schema.plan.plan import ShardRecord

logger = logging.getLogger(__name__)

COUNTING_VERSION = 1
"""Raised when counting changes, so that counts of an older version are not used."""

Ids = npt.NDArray[np.uint32]
Ends = npt.NDArray[np.int64]
Note = Callable[[bytes, Ids, Ends, Ids, Ends], None]
"""Counts a segment: UTF-8 text, source ids and byte ends, target ids and byte ends."""


@dataclass(frozen=True, slots=True)
class Counting:
    """Which pairs are counted, and how.

    Args:
        what: Description of the pairs; only kept counts with the same one are used.
        pairs: The counts.
        note: Adds the pairs of a segment to `pairs`.
    """

    what: str
    pairs: DistinctPairs
    note: Note


def shards_to_count(checked: CheckedAlignment) -> list[ShardRecord]:
    """The shards whose text is counted."""
    return planned_count(checked.plan, checked.section)


def count_once(checked: CheckedAlignment, counting: Counting, stop: StopFlag) -> None:
    """Read the kept counts into `counting.pairs`; where there are none, count and keep them.

    The aligned store must exist. Kept counts that cannot be used are logged and counted again.

    Raises:
        MissingError: A shard of the source store is not there.
        StorageError: The disk or object store refused.
        Stopped: On a signal; checked between shards.
    """
    shards = shards_to_count(checked)
    checked.reader.require_shards(shards)
    kept = _kept(checked, counting.what, shards)
    awaited = not checked.location.exists(COUNTS_FILE)
    if not awaited and _read(kept, counting.pairs):
        return
    total = sum(shard.num_tokens["target"] for shard in shards)
    with Progress(f"count tokens for {checked.source}", total, unit="tok") as progress:
        for shard in shards:
            stop.check()
            if awaited and checked.location.exists(COUNTS_FILE):  # another worker was faster
                if _read(kept, counting.pairs):
                    return
                awaited = False
            _count(checked, shard, counting)
            progress.add(shard.num_tokens["target"])
    kept.write(counting.pairs)


def _kept(checked: CheckedAlignment, what: str, shards: list[ShardRecord]) -> KeptCounts:
    own = checked.reader.commits
    return KeptCounts(
        checked.location,
        {
            "what": what,
            "counting_version": COUNTING_VERSION,
            "text": text_fingerprint(shards),
            "source_store": checked.reader.manifest.fingerprint(),
            "target_tokenizer": checked.target.fingerprint,
            "statistics_tokens": checked.section.statistics_tokens,
        },
        (len(checked.reader.vocabulary), checked.target.vocab_size),
        # Each pair takes at least one token of either side.
        sum(own[s.index].counts.positions + s.num_tokens["target"] for s in shards),
    )


def _read(kept: KeptCounts, pairs: DistinctPairs) -> bool:
    try:
        return kept.read_into(pairs)
    except StoreError as error:
        logger.warning("%s", error.line())
        return False


def _count(checked: CheckedAlignment, shard: ShardRecord, counting: Counting) -> None:
    """Count the pairs of one shard."""
    source = checked.reader.read(shard.index, ["token_offsets", "token_ids", "byte_ends"])
    segments = checked.plan.segments(shard)
    rows_D = turn_end_rows(source, segments, checked.reader.vocabulary.special)
    source = without_turn_ends(source, rows_D)
    offsets, ends = source["token_offsets"], source["byte_ends"].astype(np.int64)
    for d, (segment, whole) in enumerate(
        zip(segments, checked.target.encode(segments), strict=True)
    ):
        rows, target = slice(offsets[d], offsets[d + 1]), whole.text_only
        counting.note(
            segment.text.encode(),
            source["token_ids"][rows],
            ends[rows],
            target.token_ids,
            target.byte_ends.astype(np.int64),
        )
    counting.pairs.merge()
