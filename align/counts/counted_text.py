"""Which text of a plan is counted by methods that count: the same for every worker."""

from __future__ import annotations

from collections.abc import Iterable

from align.config import AlignSection
from align.methods import METHODS
from store_schema.fingerprint import fingerprint
from store_schema.plan.plan import Plan, ShardRecord


def counted_shards(plan: Plan) -> tuple[ShardRecord, ...]:
    """Shards whose text may be counted: the split "train", or the plan's first split without one.

    Held-out text is never counted, so that what is measured on it was not learned from it.
    """
    splits = plan.splits()
    return splits.get("train", next(iter(splits.values()), ()))


def planned_count(plan: Plan, section: AlignSection) -> list[ShardRecord]:
    """The first of `counted_shards`, until they have `statistics_tokens` target tokens."""
    left, chosen = section.statistics_tokens, []
    for shard in counted_shards(plan):
        if left <= 0:
            break
        left -= shard.num_tokens["target"]
        chosen.append(shard)
    return chosen


def counts_text(section: AlignSection) -> bool:
    """Whether the run file's method counts training text before it aligns."""
    return METHODS[section.method].counts_text(section)


def text_fingerprint(shards: Iterable[ShardRecord]) -> str:
    """Fingerprint of the segments of some shards, in order."""
    return fingerprint([[shard.start, shard.fingerprint] for shard in shards])
