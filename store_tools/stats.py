"""`store stats`: what the bytes of a store go to, and what its distributions look like.

Sizes come from the commits of all shards. The rest is read from a sample of shards: sums with counts,
so that shards add up in any number, and divided once at the end.

D segments, N positions, E entries of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.errors import MissingError
from store_schema.layout import Arrays, Finish, Kind, Origin, row_sums
from store_schema.manifest import Commit
from store_schema.plan.plan import Plan
from store_tools.places import SoundReader, StorePlace, planned_shard
from store_tools.shard_work import for_each_shard

SAMPLE_SHARDS = 16
METADATA = "(metadata)"
NO_DOMAIN = "(all)"
MASS_BINS = 10_000
"""Kept mass is counted in steps of 1e-4: percentiles of any number of positions in fixed memory."""

NEEDED = (
    "segment_ids",
    "token_offsets",
    "byte_ends",
    "entry_offsets",
    "entry_logprobs",
    "tail_mass",
    "label_logprobs",
)
NEEDED_OF: dict[Kind, tuple[str, ...]] = {
    "source": NEEDED,
    "generated": (*NEEDED, "finish"),
    "aligned": (*NEEDED, "origin", "source_nats", "source_bytes"),
}

Counts = npt.NDArray[np.int64]


@dataclass(slots=True)
class DomainSums:
    """Sums over the positions of one domain.

    Args:
        positions: All of them.
        covered: Those with entries.
        entropy_nats: Sum over the covered.
        known_labels: Labels with a known probability above 0.
        impossible_labels: Labels of probability 0.
        label_nats: Sum over the known.
        label_bytes: Bytes of the known and the impossible.
        bytes: Bytes of all positions.
        source_nats: Aligned stores: the source's own cost, on its own tokens.
        source_bytes: Bytes that cost covers.
        full_entropy_nats: Stores with the extra: of whole distributions, over labels not unknown.
        space_mass: The same of the mass on tokens that begin with white space.
    """

    positions: int = 0
    covered: int = 0
    entropy_nats: float = 0.0
    known_labels: int = 0
    impossible_labels: int = 0
    label_nats: float = 0.0
    label_bytes: int = 0
    bytes: int = 0
    source_nats: float = 0.0
    source_bytes: int = 0
    full_entropy_nats: float = 0.0
    space_mass: float = 0.0

    def add(self, other: DomainSums) -> None:
        """Add the sums of other positions."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self, extras: Sequence[str]) -> dict[str, Any]:
        """What people compare, of a store with these extras; None where nothing is known."""
        bpb = _ratio(self.label_nats / math.log(2), self.label_bytes)
        not_unknown = self.known_labels + self.impossible_labels
        of_extras = {
            "entropy": ("full_entropy_nats_per_position", self.full_entropy_nats),
            "space_mass": ("space_mass", self.space_mass),
        }
        return {
            "positions": self.positions,
            "bytes": self.bytes,
            "covered": _ratio(self.covered, self.positions),
            "entropy_nats_per_position": _ratio(self.entropy_nats, self.covered),
            "label_bpb": None if self.impossible_labels else bpb,
            "label_bytes_share": _ratio(self.label_bytes, self.bytes),
            "impossible_labels": self.impossible_labels,
            "source_bpb": _ratio(self.source_nats / math.log(2), self.source_bytes),
            **{of_extras[name][0]: _ratio(of_extras[name][1], not_unknown) for name in extras},
        }


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


@dataclass(slots=True)
class Sums:
    """What a sample of shards adds up to.

    Args:
        by_domain: Sums by domain.
        entry_counts: [longest + 1] positions by their number of entries.
        mass: [MASS_BINS + 1] covered positions by kept mass.
        kept_mass: Sum of the kept mass of covered positions.
        origins: [3] positions by origin; zeros where the store is not aligned.
        finishes: [5] answers by how they ended; zeros where the store is not generated.
    """

    by_domain: dict[str, DomainSums] = field(default_factory=dict)
    entry_counts: Counts = field(default_factory=lambda: np.zeros(1, np.int64))
    mass: Counts = field(default_factory=lambda: np.zeros(MASS_BINS + 1, np.int64))
    kept_mass: float = 0.0
    origins: Counts = field(default_factory=lambda: np.zeros(len(Origin), np.int64))
    finishes: Counts = field(default_factory=lambda: np.zeros(len(Finish), np.int64))

    def add(self, other: Sums) -> None:
        """Add the sums of other shards."""
        for domain, sums in other.by_domain.items():
            self.by_domain.setdefault(domain, DomainSums()).add(sums)
        longest = max(len(self.entry_counts), len(other.entry_counts))
        self.entry_counts = _padded(self.entry_counts, longest) + _padded(
            other.entry_counts, longest
        )
        self.mass = self.mass + other.mass
        self.kept_mass += other.kept_mass
        self.origins = self.origins + other.origins
        self.finishes = self.finishes + other.finishes


def _padded(counts: Counts, length: int) -> Counts:
    return np.pad(counts, (0, length - len(counts)))


def shard_sums(kind: Kind, arrays: Arrays, domains: Sequence[str]) -> Sums:
    """Sums of one shard.

    Args:
        kind: Of the store.
        arrays: `NEEDED_OF` the kind, and the store's extras.
        domains: [D] domain of each segment.
    """
    offsets = arrays["entry_offsets"]
    counts = np.diff(offsets)
    covered = counts > 0
    mass = 1 - arrays["tail_mass"].astype(np.float64)
    made = Sums(
        entry_counts=np.bincount(counts, minlength=1).astype(np.int64),
        mass=np.bincount(
            np.rint(mass[covered] * MASS_BINS).astype(np.int64), minlength=MASS_BINS + 1
        ).astype(np.int64),
        kept_mass=float(mass[covered].sum()),
    )
    if kind == "aligned":
        made.origins = np.bincount(arrays["origin"], minlength=len(Origin)).astype(np.int64)
    if kind == "generated":
        made.finishes = np.bincount(arrays["finish"], minlength=len(Finish)).astype(np.int64)
    entropy = entropies(arrays["entry_logprobs"], offsets, arrays["tail_mass"])
    lengths = token_lengths(arrays["byte_ends"], arrays["token_offsets"])
    rows = np.diff(arrays["token_offsets"])
    for domain in dict.fromkeys(domains):
        segments = np.array([name == domain for name in domains])
        here = np.repeat(segments, rows)
        sums = _domain_sums(arrays["label_logprobs"][here], lengths[here])
        sums.covered = int(covered[here].sum())
        sums.entropy_nats = float(entropy[here & covered].sum())
        if "entropy" in arrays:
            sums.full_entropy_nats = _known_sum(arrays["entropy"][here])
        if "space_mass" in arrays:
            sums.space_mass = _known_sum(arrays["space_mass"][here])
        if kind == "aligned":
            sums.source_nats = float(arrays["source_nats"][segments].sum())
            sums.source_bytes = int(arrays["source_bytes"][segments].sum())
        made.by_domain[domain] = sums
    return made


def _known_sum(values: npt.NDArray[np.float32]) -> float:
    return float(np.nansum(values, dtype=np.float64))


def _domain_sums(labels: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64]) -> DomainSums:
    known = np.isfinite(labels)
    impossible = np.isneginf(labels)
    return DomainSums(
        positions=len(labels),
        known_labels=int(known.sum()),
        impossible_labels=int(impossible.sum()),
        label_nats=float(-labels[known].astype(np.float64).sum()),
        label_bytes=int(lengths[known | impossible].sum()),
        bytes=int(lengths.sum()),
    )


def entropies(
    logprobs: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.int64],
    tail_mass: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Entropy of each position, its tail taken as one token: a lower bound of the true one.

    Args:
        logprobs: [E] nats.
        offsets: [N+1].
        tail_mass: [N].

    Returns:
        [N] nats.
    """
    logs = logprobs.astype(np.float64)
    # An entry of probability 0 adds nothing; 0 * -inf would be NaN.
    parts = -np.exp(logs) * np.where(np.isneginf(logs), 0.0, logs)
    tail = tail_mass.astype(np.float64)
    tails: npt.NDArray[np.float64] = tail * np.log(np.where(tail > 0, tail, 1.0))
    return row_sums(parts, offsets) - tails


def token_lengths(
    byte_ends: npt.NDArray[np.uint32], token_offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """[N] bytes of each token; the first of a segment begins at 0."""
    ends = byte_ends.astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    starts = token_offsets[:-1][np.diff(token_offsets) > 0]
    lengths[starts] = ends[starts]
    return lengths


# ------------------------------------------------------------------------------- a whole store


def array_bytes(commits: Mapping[int, Commit]) -> dict[str, int]:
    """Stored bytes by array, largest first; what describes the arrays is `METADATA`."""
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
    """Figures of one store, as they go into JSON.

    Args:
        place: Which store.
        shards: Those to read; None reads up to `SAMPLE_SHARDS` spread evenly.
        jobs: Shards at a time.
        stop: Asked between shards.

    Raises:
        StoreError: A shard or a commit is damaged, or a shard that was named is not there.
        Stopped: `stop` was asked.
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
    return (
        _identity(place, reader, wanted) | _sizes(reader) | _figures(total, reader.manifest.extras)
    )


def _sums(
    name: str,
    reader: SoundReader,
    plan: Plan | None,
    shards: Sequence[int],
    jobs: int | None,
    stop: StopFlag | None,
) -> Sums:
    kind, extras = reader.manifest.kind, reader.manifest.extras

    def read(shard: int) -> Sums:
        arrays = reader.read(shard, (*NEEDED_OF[kind], *extras))
        domains = [NO_DOMAIN] * len(arrays["segment_ids"])
        if plan is not None:
            record = planned_shard(plan, shard, reader.location.url)
            reader.require_shards([record])
            by_row = {segment.index: segment.domain for segment in plan.segments(record)}
            domains = [by_row.get(row, NO_DOMAIN) for row in arrays["segment_ids"].tolist()]
        return shard_sums(kind, arrays, domains)

    positions = {shard: reader.commits[shard].counts.positions for shard in shards}
    found = {}
    with Progress(f"stats {name}", sum(positions.values()), unit="pos") as progress:
        for shard, sums in for_each_shard(read, shards, jobs=jobs, stop=stop):
            found[shard] = sums
            progress.add(positions[shard])
    total = Sums()
    for shard in shards:  # in one order, so that the same store gives the same last digit
        total.add(found[shard])
    return total


def _identity(place: StorePlace, reader: SoundReader, shards: Sequence[int]) -> dict[str, Any]:
    manifest = reader.manifest
    return {
        "name": place.name,
        "url": reader.location.url,
        "kind": manifest.kind,
        "extras": list(manifest.extras),
        "source": manifest.source,
        "schema_version": manifest.schema_version,
        "estimator": manifest.estimator,
        "vocab_size": manifest.vocab_size,
        "shards": len(reader.commits),
        "shards_planned": manifest.num_shards,
        "shards_read": len(shards),
    }


def _sizes(reader: SoundReader) -> dict[str, Any]:
    sizes = array_bytes(reader.commits)
    counts = [commit.counts for commit in reader.commits.values()]
    positions = sum(count.positions for count in counts)
    return {
        "segments": sum(count.segments for count in counts),
        "positions": positions,
        "entries": sum(count.entries for count in counts),
        "size_bytes": sum(sizes.values()),
        "bytes_per_position": _ratio(sum(sizes.values()), positions),
        "array_bytes": sizes,
    }


def _figures(sums: Sums, extras: Sequence[str]) -> dict[str, Any]:
    covered = int(sums.mass.sum())
    positions = int(sums.entry_counts.sum())
    found: dict[str, Any] = {
        "positions_read": positions,
        "entries_per_position": {
            "mean": _ratio(float(sums.entry_counts @ np.arange(len(sums.entry_counts))), positions),
            "histogram": histogram(sums.entry_counts),
        },
        "kept_mass": {"mean": _ratio(sums.kept_mass, covered)}
        | {f"p{share}": percentile(sums.mass, share) for share in (5, 50, 95)},
        "domains": {name: sums.by_domain[name].figures(extras) for name in sorted(sums.by_domain)},
    }
    if sums.origins.any():
        found["origins"] = {
            origin.name.lower(): int(sums.origins[origin]) / positions for origin in Origin
        }
    if sums.finishes.any():
        found["finishes"] = {finish.name.lower(): int(sums.finishes[finish]) for finish in Finish}
    return found


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
    """The kept mass that `share` percent of the positions stay at or below."""
    total = int(counts.sum())
    if not total:
        return None
    rank = max(math.ceil(total * share / 100), 1)
    return int(np.searchsorted(np.cumsum(counts), rank)) / MASS_BINS
