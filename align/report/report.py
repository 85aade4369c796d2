"""`align report`: how much mass alignment keeps and the NLL it adds, by source, domain and origin.

Reads the stores; the sums, and what each figure means, are in `report_sums`.

Axes: D segments, N target positions, R source positions, S spans of one shard.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from align.report.report_sums import BIN_BPB, DomainSums, SourceReport, Sums
from align.report.view import LN2, open_aligned, open_stores
from launch.progress import Progress
from store_schema.config import RunConfig
from store_schema.errors import CorruptionError, MissingError
from store_schema.layout import Arrays, Origin
from store_schema.plan.plan import Plan, Segment
from store_schema.plan.run_plan import open_plan
from store_schema.store.guards import REPAIR
from store_schema.store.reader import StoreReader

_MOST_BINS = 1000
"""Segments further from 0 than so many bins of the histogram count in the outermost one."""

Floats = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------- one shard


def shard_sums(
    arrays: Arrays, stored_mass: Floats | None, domains: npt.NDArray[np.int64], num_domains: int
) -> tuple[list[DomainSums], Floats, Floats, Floats]:
    """Sums of one shard.

    Args:
        arrays: The aligned store's arrays of the shard.
        stored_mass: [N] probability in the entries of the source row in which each position begins,
            NaN where there is no such row; None where the source store is not there.
        domains: [D] index of each segment's domain.
        num_domains: All indices are below it.

    Returns:
        Sums by domain; and by segment [D] the bytes of its common spans, and on them the NLL of the
        aligned labels and of the source's tokens, in nats.
    """
    num_segments, num_spans = len(arrays["segment_ids"]), len(arrays["span_logprobs"])
    segment_N = np.repeat(np.arange(num_segments), np.diff(arrays["token_offsets"]))
    segment_S = np.repeat(np.arange(num_segments), np.diff(arrays["span_offsets"]))
    span_N = arrays["span_offsets"][segment_N] + arrays["span_index"].astype(np.int64)
    origin_N = arrays["origin"].astype(np.int64)
    aligned_S = np.bincount(span_N, -arrays["label_logprobs"].astype(np.float64), num_spans)
    source_S = -arrays["span_logprobs"].astype(np.float64)
    common_S = np.isfinite(aligned_S) & np.isfinite(source_S)
    common_S &= np.bincount(span_N, minlength=num_spans) > 0
    bytes_S = token_starts(arrays["span_offsets"], arrays["span_byte_ends"], lengths=True)
    common_S &= bytes_S > 0  # the end of a chat turn has no text
    inside_S = np.bincount(span_N, origin_N == Origin.INSIDE, num_spans) > 0
    origin_S = np.where(inside_S, Origin.INSIDE, Origin.BOUNDARY)
    known = {
        "spans": np.ones(num_spans),
        "num_bytes": bytes_S,
        "aligned_nats": aligned_S,
        "source_nats": source_S,
    }
    known = {name: np.where(common_S, values, 0.0) for name, values in known.items()}
    count = len(Origin)
    cells = num_domains * count
    cell_N = domains[segment_N] * count + origin_N
    cell_S = domains[segment_S] * count + origin_S
    kept_N = 1.0 - arrays["tail_mass"].astype(np.float64)
    by_cell = {name: np.bincount(cell_S, values, cells) for name, values in known.items()}
    by_cell["positions"] = np.bincount(cell_N, minlength=cells)
    by_cell["kept_mass"] = np.bincount(cell_N, kept_N, cells)
    if stored_mass is not None:
        placed_N = ~np.isnan(stored_mass)
        by_cell["placed"] = np.bincount(cell_N, placed_N, cells)
        by_cell["stored_mass"] = np.bincount(cell_N, np.where(placed_N, stored_mass, 0.0), cells)
    domain_sums = _by_domain(arrays, domains, num_domains)
    for cell in range(cells):
        sums = Sums(**{name: float(values[cell]) for name, values in by_cell.items()})
        domain_sums[cell // count].by_origin[Origin(cell % count)] = sums
    per_segment = (known["num_bytes"], known["aligned_nats"], known["source_nats"])
    size_D, aligned_D, source_D = (
        np.bincount(segment_S, values, num_segments).astype(np.float64) for values in per_segment
    )
    return domain_sums, size_D, aligned_D, source_D


def _by_domain(
    arrays: Arrays, domains: npt.NDArray[np.int64], num_domains: int
) -> list[DomainSums]:
    """Sums by domain of what is known by segment; sums by origin are still zero."""
    sizes = np.zeros(len(domains))
    offsets = arrays["token_offsets"]
    rows = np.flatnonzero(np.diff(offsets) > 0)
    sizes[rows] = arrays["byte_ends"][offsets[rows + 1] - 1]
    counted = (np.ones(len(domains)), sizes, arrays["source_nats"], arrays["source_bytes"])
    columns = [np.bincount(domains, values, num_domains).tolist() for values in counted]
    return [DomainSums(*values) for values in zip(*columns, strict=True)]


def token_starts(
    offsets: npt.NDArray[np.int64], ends: npt.NDArray[Any], *, lengths: bool = False
) -> npt.NDArray[np.int64]:
    """First byte of each token or span, or its length in bytes.

    Args:
        offsets: [D+1] where each segment's tokens begin.
        ends: [N] byte after each token, within its segment.
        lengths: Return lengths instead.
    """
    ends = ends.astype(np.int64)
    starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends.copy()
    first = offsets[:-1]
    starts[first[first < len(starts)]] = 0
    return ends - starts if lengths else starts


def mass_where_tokens_begin(source: Arrays, aligned: Arrays) -> Floats:
    """Probability in the entries of the source row whose token has the first byte of each target token.

    Args:
        source: token_offsets, byte_ends and tail_mass of the source store.
        aligned: token_offsets and byte_ends of the aligned store, the same segments.

    Returns:
        [N] probability; NaN in segments where the source has no token.
    """
    own, offsets = source["token_offsets"], aligned["token_offsets"]
    starts_N = token_starts(offsets, aligned["byte_ends"])
    segment_N = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    segment_R = np.repeat(np.arange(len(own) - 1), np.diff(own))
    ends_R = source["byte_ends"].astype(np.int64)
    # Bytes of all segments on one axis, each segment with more room than the longest needs.
    width = 1 + max(int(a.max()) for a in (ends_R, starts_N, np.zeros(1, np.int64)) if len(a))
    row_N = np.searchsorted(segment_R * width + ends_R, segment_N * width + starts_N, side="right")
    last_N = own[segment_N + 1] - 1
    has_N = last_N >= own[segment_N]
    stored_R = 1.0 - source["tail_mass"].astype(np.float64)
    stored_N = np.full(len(starts_N), np.nan)
    stored_N[has_N] = stored_R[np.minimum(row_N, last_N)[has_N]]
    return stored_N


# ------------------------------------------------------------------------------- the stores


def source_report(run: RunConfig, plan: Plan, source: str, *, num_worst: int) -> SourceReport:
    """Report on the aligned shards of one source.

    Args:
        run: The run file.
        plan: The run's plan.
        source: Name of the source.
        num_worst: Segments in the list of the worst, at most.

    Raises:
        MismatchError: Plan and stores do not belong together.
        CorruptionError: A store is damaged.
    """
    stored, aligned = stores_of(run, plan, source)
    done = [] if aligned is None else [s for s in plan.shards if s.index in aligned.commits]
    missing = sorted({s.index for s in plan.shards} - {s.index for s in done})
    report = SourceReport(len(plan.shards), missing, stored is not None)
    worst: list[tuple[float, int, dict[str, Any]]] = []
    if aligned is None:
        return report
    report.method = aligned.manifest.settings.get("method")
    aligned.require_shards(done)
    with Progress(f"read {source}", len(done), unit="shard") as progress:
        for record in done:
            segments = plan.segments(record)
            arrays = _checked(aligned, record.index, segments)
            mass = None
            if stored is not None and record.index in stored.commits:
                stored.require_shards([record])
                mass = mass_where_tokens_begin(_checked(stored, record.index, segments), arrays)
            for item in _add_shard(report, arrays, mass, segments, record.index):
                entry = (item["excess_nats_per_byte"], -item["row"], item)
                heapq.heappush(worst, entry)
                if len(worst) > num_worst:
                    heapq.heappop(worst)
            progress.add(1)
    report.worst = [item for _, _, item in sorted(worst, key=lambda entry: entry[:2])[::-1]]
    return report


def stores_of(
    run: RunConfig, plan: Plan, source: str
) -> tuple[StoreReader | None, StoreReader | None]:
    """The source store and the aligned store of a source, None for one that is not there."""
    try:
        aligned = open_aligned(run, plan, source)
    except MissingError:
        return None, None
    try:
        return open_stores(run, plan, source)
    except MissingError:
        return None, aligned


def _checked(reader: StoreReader, shard: int, segments: Sequence[Segment]) -> Arrays:
    """A shard, read as a whole so that every invariant is checked, and that it has these segments."""
    arrays = reader.read(shard)
    if arrays["segment_ids"].tolist() != [segment.index for segment in segments]:
        raise CorruptionError(
            "segments are not those of the plan",
            where=f"{reader.location.url}, shard {shard}, array segment_ids",
            hint=REPAIR,
        )
    return arrays


def _add_shard(
    report: SourceReport,
    arrays: Arrays,
    stored_mass: Floats | None,
    segments: Sequence[Segment],
    shard: int,
) -> Iterator[dict[str, Any]]:
    """Add a shard to the report, and yield the figures of each segment that has common spans."""
    names = sorted({segment.domain for segment in segments})
    number = {name: i for i, name in enumerate(names)}
    domains = np.array([number[segment.domain] for segment in segments], np.int64)
    sums, size_D, aligned_D, source_D = shard_sums(arrays, stored_mass, domains, len(names))
    for name, domain_sums in zip(names, sums, strict=True):
        report.domains.setdefault(name, DomainSums()).add(domain_sums)
    for d in np.flatnonzero(size_D > 0).tolist():
        size, aligned, own = float(size_D[d]), float(aligned_D[d]), float(source_D[d])
        place = round((aligned - own) / LN2 / size / BIN_BPB)
        report.histogram[min(max(place, -_MOST_BINS), _MOST_BINS)] += 1
        yield {
            "segment_id": segments[d].segment_id,
            "row": segments[d].index,
            "shard": shard,
            "domain": segments[d].domain,
            "common_bytes": int(size),
            "excess_nats": aligned - own,
            "excess_nats_per_byte": (aligned - own) / size,
            "aligned_bpb": aligned / LN2 / size,
            "source_bpb": own / LN2 / size,
        }


def build_report(run: RunConfig, sources: Sequence[str], *, num_worst: int) -> dict[str, Any]:
    """All figures of the report, as JSON-like values (the content of align.json).

    Raises:
        MissingError: No plan, or nothing is aligned yet.
        MismatchError: Plan and stores do not belong together.
        CorruptionError: A store is damaged.
    """
    plan = open_plan(run)
    reports = {source: source_report(run, plan, source, num_worst=num_worst) for source in sources}
    if not any(report.num_shards > len(report.missing) for report in reports.values()):
        raise MissingError(
            "nothing is aligned yet",
            where=", ".join(run.aligned_url(source) for source in sources),
            hint="run `logitfuse align run` first",
        )
    return {
        "name": run.name,
        "plan": plan.fingerprint,
        "sources": {source: report.figures() for source, report in reports.items()},
    }
