"""`store stats`: stored bytes by array, and figures of the distributions.

Sizes come from the commits of all shards. The rest is read from a sample of shards, as sums with counts
that are divided once at the end (`stats_sums`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.errors import MissingError
from store_schema.layout import Finish, Kind, Origin
from store_schema.manifest import Commit
from store_schema.plan.plan import Plan
from store_tools.places import StorePlace, TolerantReader, planned_shard
from store_tools.shard_work import for_each_shard
from store_tools.stats_sums import MASS_BINS, NEEDED_OF, Counts, Sums, ratio, shard_sums

SAMPLE_SHARDS = 16
METADATA = "(metadata)"
NO_DOMAIN = "(all)"


def array_bytes(commits: Mapping[int, Commit]) -> dict[str, int]:
    """Stored bytes by array, largest first; the arrays' metadata files are under `METADATA`."""
    sizes: dict[str, int] = {}
    for commit in commits.values():
        for key, record in commit.files.items():
            name = METADATA if key.endswith("zarr.json") else key.split("/")[0]
            sizes[name] = sizes.get(name, 0) + record.size
    return dict(sorted(sizes.items(), key=lambda item: (item[0] == METADATA, -item[1])))


def sample_of(shards: Sequence[int], count: int = SAMPLE_SHARDS) -> list[int]:
    """`count` of the shards, spread evenly from the first to the last."""
    if len(shards) <= count:
        return list(shards)
    return [shards[i * (len(shards) - 1) // (count - 1)] for i in range(count)]


def store_stats(
    place: StorePlace,
    *,
    shards: Sequence[int] | None = None,
    jobs: int | None = None,
    stop: StopFlag | None = None,
) -> dict[str, Any]:
    """Figures of one store, JSON-like.

    Args:
        place: The store.
        shards: Shards to read; None reads up to `SAMPLE_SHARDS` spread evenly.
        jobs: Shards at a time.
        stop: Checked between shards.

    Raises:
        StoreError: A shard or a commit is damaged, or one of `shards` is not there.
        Stopped: `stop` was set.
    """
    reader, plan = place.open(), place.plan()
    for fault in reader.faults.values():
        raise fault
    if plan is not None:
        reader.require_plan(plan)
    there = sorted(reader.commits)
    if shards is not None and (absent := sorted(set(shards) - set(there))):
        raise MissingError(
            f"{len(absent)} shard(s) not committed ({', '.join(map(str, absent[:10]))})",
            where=reader.location.url,
        )
    wanted = sample_of(there) if shards is None else list(shards)
    total = _sums(place.name, reader, plan, wanted, jobs, stop)
    return _identity(place, reader, wanted) | _sizes(reader) | _figures(reader.manifest.kind, total)


def _sums(
    name: str,
    reader: TolerantReader,
    plan: Plan | None,
    shards: Sequence[int],
    jobs: int | None,
    stop: StopFlag | None,
) -> Sums:
    kind = reader.manifest.kind

    def read(shard: int) -> Sums:
        arrays = reader.read(shard, NEEDED_OF[kind])
        domains = [NO_DOMAIN] * len(arrays["segment_ids"])
        if plan is not None:
            record = planned_shard(plan, shard, reader.location.url)
            reader.require_shards([record])
            by_row = {segment.index: segment.domain for segment in plan.segments(record)}
            domains = [by_row.get(row, NO_DOMAIN) for row in arrays["segment_ids"].tolist()]
        return shard_sums(kind, arrays, domains)

    positions = {shard: reader.commits[shard].counts.positions for shard in shards}
    by_shard = {}
    with Progress(f"stats {name}", sum(positions.values()), unit="pos") as progress:
        for shard, sums in for_each_shard(read, shards, jobs=jobs, stop=stop):
            by_shard[shard] = sums
            progress.add(positions[shard])
    total = Sums()
    for shard in shards:  # in a fixed order, so that rounding is the same every time
        total.add(by_shard[shard])
    return total


def _identity(place: StorePlace, reader: TolerantReader, shards: Sequence[int]) -> dict[str, Any]:
    manifest = reader.manifest
    return {
        "name": place.name,
        "url": reader.location.url,
        "kind": manifest.kind,
        "source": manifest.source,
        "schema_version": manifest.schema_version,
        "estimator": manifest.estimator,
        "vocab_size": manifest.vocab_size,
        "shards": len(reader.commits),
        "shards_planned": manifest.num_shards,
        "shards_read": len(shards),
    }


def _sizes(reader: TolerantReader) -> dict[str, Any]:
    sizes = array_bytes(reader.commits)
    counts = [commit.counts for commit in reader.commits.values()]
    positions = sum(count.positions for count in counts)
    branches = sum(count.branches for count in counts)
    return {
        "segments": sum(count.segments for count in counts),
        "positions": positions,
        "entries": sum(count.entries for count in counts),
        **({"branches": branches} if reader.manifest.form == "branched" else {}),
        "size_bytes": sum(sizes.values()),
        "bytes_per_position": ratio(sum(sizes.values()), positions),
        "array_bytes": sizes,
    }


def _figures(kind: Kind, sums: Sums) -> dict[str, Any]:
    positions = sum(of_domain.positions for of_domain in sums.by_domain.values())
    domains = {name: sums.by_domain[name].figures(kind) for name in sorted(sums.by_domain)}
    record: dict[str, Any] = {"positions_read": positions, "domains": domains}
    if kind == "generated":
        finishes = {finish.name.lower(): int(sums.finishes[finish]) for finish in Finish}
        return record | {"finishes": finishes}
    covered = int(sums.mass.sum())
    record["entries_per_position"] = {
        "mean": ratio(float(sums.entry_counts @ np.arange(len(sums.entry_counts))), positions),
        "histogram": histogram(sums.entry_counts),
    }
    record["kept_mass"] = {"mean": ratio(sums.kept_mass, covered)} | {
        f"p{share}": percentile(sums.mass, share) for share in (5, 50, 95)
    }
    if sums.origins.any():
        record["origins"] = {
            origin.name.lower(): int(sums.origins[origin]) / positions for origin in Origin
        }
    return record


def histogram(counts: Counts) -> list[dict[str, int]]:
    """Positions by number of entries, in buckets that double: 0, 1, 2, 3-4, 5-8, ..."""
    edges = [0, 1, 2]
    while edges[-1] < len(counts) - 1:
        edges.append(2 * edges[-1])
    first = 0
    buckets = []
    for last in edges:
        if first < len(counts):
            number = int(counts[first : last + 1].sum())
            buckets.append({"from": first, "to": last, "positions": number})
        first = last + 1
    return buckets


def percentile(counts: Counts, share: float) -> float | None:
    """The `share`-th percentile of the kept mass, from its histogram; None without positions."""
    total = int(counts.sum())
    if not total:
        return None
    rank = max(math.ceil(total * share / 100), 1)
    return int(np.searchsorted(np.cumsum(counts), rank)) / MASS_BINS
