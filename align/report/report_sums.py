"""What `align report` adds up: by source, domain and origin.

Figures in bits per byte compare a source with itself: the labels as aligned against the source's own
tokens, on the bytes that both know. A span is the unit, since nothing smaller begins and ends on both
sides; a span counts where the source's probability and every aligned label in it are known. It stands
under origin "inside" if any of its target tokens starts inside a source token.
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
        positions: Target positions.
        kept_mass: Probability in their entries.
        placed: Positions whose source row is known.
        stored_mass: Probability in the entries of those source rows.
        spans: That both sides know.
        num_bytes: Of these spans.
        aligned_nats: Of their aligned labels.
        source_nats: Of the source's own tokens there.
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
        """Means; None where there is nothing to take one of."""
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
    """One domain of a source.

    Args:
        segments: Number.
        text_bytes: Of the segments.
        own_nats: The source's NLL of whatever it covers.
        own_bytes: Bytes that it covers.
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
        """JSON-like. Masses are means of the covered positions."""
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
    """What is known of one source.

    Args:
        num_shards: Of the plan.
        missing: Shards that are not aligned yet.
        has_source_store: Whether the masses stored could be read.
        method: That made the aligned store; None without one.
        domains: By name.
        histogram: Segments by excess, in bins of BIN_BPB; the middle of bin i is i * BIN_BPB.
        worst: Segments of most excess per byte, worst first.
    """

    num_shards: int
    missing: list[int]
    has_source_store: bool
    method: str | None = None
    domains: dict[str, DomainSums] = field(default_factory=dict)
    histogram: Counter[int] = field(default_factory=Counter)
    worst: list[dict[str, Any]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """JSON-like."""
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
