"""Sources that lack shards: which they lack, and the arrays that replace them.

With `--allow-partial` a source covers no row of a shard that it lacks, and no text is lost. A shard
that no source has is left out, for the control too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from store_schema.errors import MissingError
from store_schema.layout import Arrays, Origin
from store_schema.plan.plan import ShardRecord
from store_schema.store.reader import StoreReader


def missing_shards(
    stores: Mapping[str, StoreReader], shards: Sequence[ShardRecord]
) -> dict[str, frozenset[int]]:
    """Shards that sources lack, by source; sources that lack none are left out."""
    by_source = {
        name: frozenset(s.index for s in shards if s.index not in reader.commits)
        for name, reader in stores.items()
    }
    return {name: lacking for name, lacking in by_source.items() if lacking}


def missing_shards_error(
    missing: Mapping[str, frozenset[int]], shards: Sequence[ShardRecord]
) -> MissingError:
    """The error that names what is missing."""
    parts = []
    for name, lacking in missing.items():
        named = sorted(lacking)
        shown = ", ".join(map(str, named[:10])) + (" ..." if len(named) > 10 else "")
        parts.append(f"{name} {len(named)} of {len(shards)} shards ({shown})")
    return MissingError(
        "sources lack shards of the split",
        where="aligned stores",
        got="missing: " + "; ".join(parts),
        hint="rerun `logitfuse align run`, or train without them by `--allow-partial`",
    )


def uncovered_arrays(like: Arrays) -> Arrays:
    """Arrays of a shard that a source does not cover: no entries, tail mass 1, labels unknown.

    Args:
        like: Arrays of another source for the same shard.
    """
    empty = {name: like[name][:0] for name in ("entry_ids", "entry_logprobs")}
    unknown = {
        name: np.full_like(like[name], np.nan)
        for name in ("label_logprobs", "span_logprobs")
        if name in like
    }
    zero = ("entry_offsets", "source_nats", "source_bytes")
    none = {name: np.zeros_like(like[name]) for name in zero}
    return {
        **like,
        **empty,
        **unknown,
        **none,
        "tail_mass": np.ones_like(like["tail_mass"]),
        "origin": np.full_like(like["origin"], Origin.NONE),
    }
