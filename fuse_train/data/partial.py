"""Sources that lack shards: who lacks which, and what stands in for them.

With `--allow-partial` a source is silent in a shard that it lacks: its rows count as not covered, and
no text is lost. A shard that no source has is left out, for the control too.
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
    found = {
        name: frozenset(s.index for s in shards if s.index not in reader.commits)
        for name, reader in stores.items()
    }
    return {name: lacking for name, lacking in found.items() if lacking}


def incomplete(
    missing: Mapping[str, frozenset[int]], shards: Sequence[ShardRecord]
) -> MissingError:
    """The error that names what is missing."""
    told = []
    for name, lacking in missing.items():
        named = sorted(lacking)
        shown = ", ".join(map(str, named[:10])) + (" ..." if len(named) > 10 else "")
        told.append(f"{name} {len(named)} of {len(shards)} shards ({shown})")
    return MissingError(
        "sources lack shards of the split",
        where="aligned stores",
        got="missing: " + "; ".join(told),
        hint="rerun `logitfuse align run`, or train without them by `--allow-partial`",
    )


def silent_arrays(like: Arrays) -> Arrays:
    """Arrays of a shard that a source says nothing about: no entries, tail mass 1, nothing known.

    Args:
        like: Of another source, for the same shard.
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
