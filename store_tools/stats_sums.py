"""Sums over shards for `store stats`, divided once at the end.

D segments, N positions, E entries of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.layout import Arrays, Finish, Kind, Origin, row_sums
from store_schema.text.encoded import token_lengths

MASS_BINS = 10_000
"""Bins of the histogram of kept mass, which gives percentiles in fixed memory."""
_TEXT = ("segment_ids", "token_offsets", "byte_ends")
_SCORED = (*_TEXT, "entry_offsets", "entry_logprobs", "tail_mass", "label_logprobs")
NEEDED_OF: dict[Kind, tuple[str, ...]] = {
    "source": _SCORED,
    "generated": (*_TEXT, "finish"),
    "aligned": (*_SCORED, "origin", "source_nats", "source_bytes"),
}
Counts = npt.NDArray[np.int64]


@dataclass(slots=True)
class DomainSums:
    """Sums over the positions of one domain.

    Args:
        positions: Number of positions.
        covered: Positions with entries.
        entropy_nats: Sum of entropies of covered positions.
        known_labels: Labels with a known probability above 0.
        impossible_labels: Labels of probability 0.
        label_nats: NLL of the known labels.
        label_bytes: Bytes of the known and the impossible labels.
        bytes: Bytes of all positions.
        source_nats: In aligned stores, the source's NLL on its own tokens.
        source_bytes: Bytes that `source_nats` is of.
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

    def add(self, other: DomainSums) -> None:
        """Add the sums of other positions."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self, kind: Kind) -> dict[str, Any]:
        """Means and shares for a store of `kind`; None where nothing is known."""
        text = {"positions": self.positions, "bytes": self.bytes}
        if kind == "generated":
            return text
        bpb = ratio(self.label_nats / math.log(2), self.label_bytes)
        return text | {
            "covered": ratio(self.covered, self.positions),
            "entropy_nats_per_position": ratio(self.entropy_nats, self.covered),
            "label_bpb": None if self.impossible_labels else bpb,
            "label_bytes_share": ratio(self.label_bytes, self.bytes),
            "impossible_labels": self.impossible_labels,
            "source_bpb": ratio(self.source_nats / math.log(2), self.source_bytes),
        }


def ratio(total: float, count: float) -> float | None:
    """total / count; None if count is 0."""
    return total / count if count else None


@dataclass(slots=True)
class Sums:
    """Sums over a sample of shards. A generated store has only `by_domain` and `finishes`.

    Args:
        by_domain: Sums by domain.
        entry_counts: [longest + 1] positions by their number of entries.
        mass: [MASS_BINS + 1] covered positions by kept mass.
        kept_mass: Sum of the kept mass of covered positions.
        origins: [3] positions by origin; zeros unless the store is aligned.
        finishes: [5] answers by how they ended; zeros unless the store is generated.
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
        kind: Kind of the store.
        arrays: Arrays `NEEDED_OF[kind]`.
        domains: [D] domain of each segment.
    """
    if kind == "generated":
        return _answer_sums(arrays, domains)
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
    entropy = entropies(arrays["entry_logprobs"], offsets, arrays["tail_mass"])
    lengths = token_lengths(arrays["byte_ends"], arrays["token_offsets"])
    rows = np.diff(arrays["token_offsets"])
    for domain in dict.fromkeys(domains):
        segments = np.array([name == domain for name in domains])
        here = np.repeat(segments, rows)
        sums = _domain_sums(arrays["label_logprobs"][here], lengths[here])
        sums.covered = int(covered[here].sum())
        sums.entropy_nats = float(entropy[here & covered].sum())
        if kind == "aligned":
            sums.source_nats = float(arrays["source_nats"][segments].sum())
            sums.source_bytes = int(arrays["source_bytes"][segments].sum())
        made.by_domain[domain] = sums
    return made


def _answer_sums(arrays: Arrays, domains: Sequence[str]) -> Sums:
    lengths = token_lengths(arrays["byte_ends"], arrays["token_offsets"])
    rows = np.diff(arrays["token_offsets"])
    made = Sums(finishes=np.bincount(arrays["finish"], minlength=len(Finish)).astype(np.int64))
    for domain in dict.fromkeys(domains):
        here = np.repeat([name == domain for name in domains], rows)
        made.by_domain[domain] = DomainSums(
            positions=int(here.sum()), bytes=int(lengths[here].sum())
        )
    return made


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
    """Entropy of each position with its tail as one token: a lower bound of the true entropy.

    Args:
        logprobs: [E] nats.
        offsets: [N+1] entries of each position.
        tail_mass: [N] mass outside the entries.

    Returns:
        [N] nats.
    """
    logs = logprobs.astype(np.float64)
    # An entry of probability 0 adds nothing; 0 * -inf would be NaN.
    parts = -np.exp(logs) * np.where(np.isneginf(logs), 0.0, logs)
    tail = tail_mass.astype(np.float64)
    tails: npt.NDArray[np.float64] = tail * np.log(np.where(tail > 0, tail, 1.0))
    return row_sums(parts, offsets) - tails
