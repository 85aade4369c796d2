"""Sums of `align report`, by source, domain and origin.

Figures in bits per byte compare a source with itself: the NLL of the aligned labels with the NLL of the
source's own tokens, on the same bytes. They are taken over common spans, the smallest parts of a text
that begin and end with a token on both sides. A span counts where the probabilities of its source
tokens and of all its aligned labels are known. Its origin is "inside" if any of its target tokens
starts inside a source token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from align.report.view import LN2
from store_schema.layout import Origin

BIN_BPB = 0.01
"""Width of a bin of the histogram, bits per byte."""


@dataclass(slots=True)
class Sums:
    """Sums over positions and spans of one domain and origin.

    Args:
        positions: Number of target positions.
        kept_mass: Sum of the probability in their entries.
        placed: Number of positions whose source row is known.
        stored_mass: Sum of the probability in the entries of those source rows.
        spans: Number of common spans with known probabilities on both sides.
        num_bytes: Bytes of these spans.
        aligned_nats: NLL of their aligned labels.
        source_nats: NLL of the source's tokens in them.
    """

    positions: float = 0.0
    kept_mass: float = 0.0
    placed: float = 0.0
    stored_mass: float = 0.0
    spans: float = 0.0
    num_bytes: float = 0.0
    aligned_nats: float = 0.0
    source_nats: float = 0.0

    def add(self, other: Sums) -> None:
        """Add the sums of other positions."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def figures(self) -> dict[str, float | None]:
        """Means, and numbers of positions, spans and bytes; a mean of nothing is None."""
        size = self.num_bytes * LN2
        excess = self.aligned_nats - self.source_nats
        return {
            "positions": int(self.positions),
            "mass_stored": _ratio(self.stored_mass, self.placed),
            "mass_kept": _ratio(self.kept_mass, self.positions),
            "spans": int(self.spans),
            "common_bytes": int(self.num_bytes),
            "aligned_bpb": _ratio(self.aligned_nats, size),
            "source_bpb": _ratio(self.source_nats, size),
            "excess_bpb": _ratio(excess, size),
            "excess_nats_per_span": _ratio(excess, self.spans),
        }


@dataclass(slots=True)
class DomainSums:
    """Sums over one domain of a source.

    Args:
        segments: Number of segments.
        text_bytes: Bytes of their text.
        own_nats: The source's NLL of all its tokens with a known probability.
        own_bytes: Bytes of those tokens.
        by_origin: Sums by origin.
    """

    segments: float = 0.0
    text_bytes: float = 0.0
    own_nats: float = 0.0
    own_bytes: float = 0.0
    by_origin: dict[Origin, Sums] = field(default_factory=lambda: {o: Sums() for o in Origin})

    def add(self, other: DomainSums) -> None:
        """Add the sums of other segments."""
        self.segments += other.segments
        self.text_bytes += other.text_bytes
        self.own_nats += other.own_nats
        self.own_bytes += other.own_bytes
        for origin, sums in other.by_origin.items():
            self.by_origin[origin].add(sums)

    def figures(self) -> dict[str, Any]:
        """The domain's figures as JSON-like values. Masses are means over the covered positions."""
        covered = Sums()
        for origin in (Origin.BOUNDARY, Origin.INSIDE):
            covered.add(self.by_origin[origin])
        positions = sum(sums.positions for sums in self.by_origin.values())
        origins = {}
        for origin in reversed(Origin):
            sums = self.by_origin[origin]
            origins[origin.name.lower()] = {
                "share": _ratio(sums.positions, positions),
                **sums.figures(),
            }
        return {
            "segments": int(self.segments),
            "bytes": int(self.text_bytes),
            **covered.figures(),
            "positions": int(positions),
            "coverage": _ratio(covered.positions, positions),
            "own_bytes": int(self.own_bytes),
            "own_bpb": _ratio(self.own_nats, self.own_bytes * LN2),
            "origins": origins,
        }


@dataclass(slots=True)
class SourceReport:
    """The report on one source.

    Args:
        num_shards: Shards of the plan.
        missing: Indices of shards that are not aligned yet.
        has_source_store: Whether there is a source store to read stored masses from.
        method: The aligned store's method; None where nothing is aligned.
        domains: Sums by domain.
        histogram: Number of segments by excess; the middle of bin i is i * BIN_BPB bits per byte.
        worst: Figures of the segments with the largest excess NLL per byte, worst first.
    """

    num_shards: int
    missing: list[int]
    has_source_store: bool
    method: str | None = None
    domains: dict[str, DomainSums] = field(default_factory=dict)
    histogram: Counter[int] = field(default_factory=Counter)
    worst: list[dict[str, Any]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """The report as JSON-like values."""
        every = DomainSums()
        for sums in self.domains.values():
            every.add(sums)
        return {
            "shards": self.num_shards,
            "missing_shards": self.missing,
            "has_source_store": self.has_source_store,
            "method": self.method,
            "all": every.figures(),
            "domains": {name: self.domains[name].figures() for name in sorted(self.domains)},
            "histogram": {
                "bin_bpb": BIN_BPB,
                "segments": {str(i): self.histogram[i] for i in sorted(self.histogram)},
            },
            "worst": self.worst,
        }


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
