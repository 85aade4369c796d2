"""Which segments a share of the training text has."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from store_schema.plan.columns import segment_columns
from store_schema.plan.plan import Plan, ShardRecord, chat_of

_COLUMNS = ("document_id", "domain", "byte_start", "byte_end")


def used_segments(
    plan: Plan, shards: Sequence[ShardRecord], share: float
) -> list[npt.NDArray[np.int64]]:
    """Segments of each shard that a share of the shards' text has, by index in the shard.

    Of each domain whole documents (chats), in the order of a hash of their names, until they have this
    share of its bytes: at least one, and a smaller share's are among a larger one's.

    Args:
        plan: The plan.
        shards: Of one split.
        share: In (0, 1].
    """
    table = segment_columns(plan, _COLUMNS)
    sizes: dict[str, Counter[str]] = {}
    names: list[list[tuple[str, str]]] = []
    for shard in shards:
        rows = table.slice(shard.start, shard.stop - shard.start).to_pylist()
        names.append([(row["domain"], _whole(row["document_id"])) for row in rows])
        for row, (domain, name) in zip(rows, names[-1], strict=True):
            sizes.setdefault(domain, Counter())[name] += row["byte_end"] - row["byte_start"]
    kept = {(domain, name) for domain, own in sizes.items() for name in _first(own, share)}
    return [np.flatnonzero([name in kept for name in of_shard]) for of_shard in names]


def _whole(document_id: str) -> str:
    return chat_of(document_id) or document_id


def _first(sizes: Mapping[str, int], share: float) -> list[str]:
    """Names in the order of their hash until they are this share of the sizes' sum; one at least."""
    kept: list[str] = []
    total, goal = 0, share * sum(sizes.values())
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= goal and kept:
            break
        kept.append(name)
        total += sizes[name]
    return kept
