"""The content of evaluation.json: bits per byte, differences with intervals, interference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fuse_eval.config import EvaluateSection
from fuse_eval.findings import BEFORE, CONTROL, FUSED, mean_of
from fuse_eval.intervals import compare, units_by_domain
from store_schema.errors import InputError
from store_schema.plan.plan import Segment

PAIRS = ((FUSED, CONTROL), (FUSED, BEFORE), (CONTROL, BEFORE))


def evaluation_record(
    segments: Sequence[Segment],
    num_bytes: npt.NDArray[np.int64],
    nats: Mapping[str, npt.ArrayLike],
    section: EvaluateSection,
    *,
    seed: int,
) -> dict[str, Any]:
    """All results, JSON-like.

    Args:
        segments: [D] scored segments.
        num_bytes: [D] scored bytes of each.
        nats: Model to [D] NLL over those bytes, nats.
        section: Level, resamples and their unit.
        seed: Seed of the resampling.

    Raises:
        InputError: No byte can be scored at all.
    """
    names = [
        s.document_id if section.bootstrap_unit == "document" else s.segment_id for s in segments
    ]
    columns = {model: np.asarray(values, np.float64) for model, values in nats.items()}
    domains = [segment.domain for segment in segments]
    units = units_by_domain(columns, num_bytes.astype(np.float64), domains, names)
    if not units:
        raise InputError(
            "no byte of the split can be compared",
            where=f"split {section.split}",
            expected="segments in which all tokenizers of the run share a boundary",
        )
    bpb = {model: {d: unit.bpb(model) for d, unit in units.items()} for model in nats}
    sources = [model for model in nats if model not in (BEFORE, CONTROL, FUSED)]
    return {
        "split": section.split,
        "confidence": section.confidence,
        "bootstrap_unit": section.bootstrap_unit,
        "domains": _domain_sizes(segments, num_bytes, list(units)),
        "bpb": bpb,
        "mean_bpb": {model: mean_of(values) for model, values in bpb.items()},
        "comparisons": [
            compare(
                units,
                model,
                against,
                samples=section.bootstrap_samples,
                confidence=section.confidence,
                seed=seed,
            )
            for model, against in PAIRS
            if model in nats and against in nats
        ],
        "specialists": [_specialist(bpb, source) for source in sources],
    }


def _domain_sizes(
    segments: Sequence[Segment], num_bytes: npt.NDArray[np.int64], domains: Sequence[str]
) -> dict[str, dict[str, int]]:
    sizes = {}
    for domain in domains:
        rows = [i for i, segment in enumerate(segments) if segment.domain == domain]
        whole = sum(len(segments[i].text.encode()) for i in rows)
        counted = int(num_bytes[rows].sum())
        sizes[domain] = {
            "documents": len({segments[i].document_id for i in rows}),
            "segments": len(rows),
            "bytes": counted,
            "excluded_bytes": whole - counted,
        }
    return sizes


def _specialist(bpb: Mapping[str, Mapping[str, float]], source: str) -> dict[str, Any]:
    """A source against the target before training, in the domain of its name, else in its best."""
    changes = {
        domain: value / bpb[BEFORE][domain] - 1 if bpb[BEFORE][domain] else 0.0
        for domain, value in bpb[source].items()
    }
    domain = source if source in changes else min(changes, key=changes.__getitem__)
    return {"source": source, "domain": domain, "change": changes[domain]}
