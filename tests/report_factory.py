"""A finished run's figures, made up: what the report page is drawn from in tests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

HOSTILE = "<script>document.title='owned'</script>\"'&{{ 7*7 }}"


def evaluation(
    domains: tuple[str, ...] = ("code", "facts", "prose"),
    sources: tuple[str, ...] = ("code", "prose", "facts"),
) -> dict[str, Any]:
    """Content of evaluation.json."""
    models = ["target_before", "clm_control", "fused", *sources]
    bpb = {
        model: {
            d: round(2.6 - 0.12 * i - 0.2 * j + 0.05 * ((i * j) % 3), 5)
            for j, d in enumerate(domains)
        }
        for i, model in enumerate(models)
    }
    comparisons = []
    for model, against in [
        ("fused", "clm_control"),
        ("fused", "target_before"),
        ("clm_control", "target_before"),
    ]:
        changes = {}
        for i, domain in enumerate(domains):
            value = bpb[model][domain] / bpb[against][domain] - 1 + (0.06 if i == 1 else 0)
            changes[domain] = {
                "value": value,
                "low": value - 0.012,
                "high": value + 0.01,
                "units": 90,
            }
        mean = sum(c["value"] for c in changes.values()) / len(domains)
        comparisons.append(
            {
                "model": model,
                "against": against,
                "domains": changes,
                "mean": {"value": mean, "low": mean - 0.008, "high": mean + 0.007, "units": 270},
                "worse": [d for d, c in changes.items() if c["low"] > 0],
            }
        )
    return {
        "fingerprint": "0" * 32,
        "split": "test",
        "confidence": 0.95,
        "bootstrap_unit": "document",
        "domains": {
            d: {"documents": 90, "segments": 311, "bytes": 182_331, "excluded_bytes": 611}
            for d in domains
        },
        "bpb": bpb,
        "mean_bpb": {m: sum(v.values()) / len(v) for m, v in bpb.items()},
        "comparisons": comparisons,
        "interference": interference(domains),
        "specialists": [
            {"source": s, "domain": domains[i % len(domains)], "change": -0.2 + 0.12 * i}
            for i, s in enumerate(sources)
        ],
    }


def interference(domains: tuple[str, ...]) -> dict[str, Any]:
    """Of evaluation.json: two documents beyond the noise, one within, one too short."""
    counts = {"total": 90, "worse": 2, "undecided": 11, "worse_by_point": 31}
    excess = {
        "worse_nats": 8.25,
        "worse_bpb": 2.2e-05,
        "worse_by_point_nats": 41.5,
        "worse_by_point_bpb": 1.1e-4,
    }
    return {
        "model": "fused",
        "against": "clm_control",
        "confidence": 0.95,
        "min_blocks": 8,
        "block_correlation": 0.04,
        "documents": {key: value * len(domains) for key, value in counts.items()},
        "excess": {key: value * len(domains) for key, value in excess.items()},
        "domains": {d: {"documents": dict(counts), "excess": dict(excess)} for d in domains},
        "worst_documents": [
            {
                "document_id": f"{domains[i % len(domains)]}/file {i}.txt",
                "domain": domains[i % len(domains)],
                "bytes": 2048,
                "bpb": 1.25 - 0.1 * i,
                "against_bpb": 1.2 - 0.1 * i,
                "change": (1.25 - 0.1 * i) / (1.2 - 0.1 * i) - 1,
                "excess_nats": 71.0 - 10 * i,
                "p_value": None if verdict == "undecided" else 0.0004,
                "verdict": verdict,
            }
            for i, verdict in enumerate(("worse", "worse", "undecided", "within noise"))
        ],
    }


def pool(
    domains: tuple[str, ...] = ("code", "facts", "prose"),
    sources: tuple[str, ...] = ("code", "prose", "facts"),
) -> dict[str, Any]:
    """Content of pool.json."""

    def row(base: float) -> dict[str, float]:
        return {d: base + 0.11 * i for i, d in enumerate(domains)}

    return {
        "fingerprint": "1" * 32,
        "split": "test",
        "domains": {
            d: {"rows": 51_000, "bytes": 180_000, "common_rows": 44_100, "common_bytes": 151_000}
            for d in domains
        },
        "pool_bpb": {"uniform": row(2.1), "min_ce": row(1.93), "asn": row(1.9)},
        "hindsight": ["min_ce"],
        "alone_bpb": {s: row(2.2 + 0.2 * i) for i, s in enumerate(sources)},
        "target_bpb": row(2.4),
        "source_bpb": {s: row(2.15 + 0.2 * i) for i, s in enumerate(sources)},
        "without": {
            "uniform": {
                s: {"mean_bpb": 2.2, "change": 0.03 - 0.02 * i} for i, s in enumerate(sources)
            },
            "asn": {s: {"mean_bpb": 2.0, "change": 0.02 + 0.01 * i} for i, s in enumerate(sources)},
        },
    }


def summary(
    domains: tuple[str, ...] = ("code", "facts", "prose"),
    sources: tuple[str, ...] = ("code", "prose", "facts"),
    name: str = "demo",
) -> dict[str, Any]:
    """A finished run's summary, as `build_summary` gives it."""
    scored, estimate = evaluation(domains, sources), pool(domains, sources)
    seconds = {
        "corpus": 1.2, "plan": 6.4, "extract": 131.0, "align": 22.3, "pool": 14.8, "train": 143.9,
        "evaluate": 31.0,
    }  # fmt: skip
    peak = {stage: int((0.4 + 0.3 * i) * 2**30) for i, stage in enumerate(seconds)}
    alignment = {
        s: {
            "positions": 412_331.0,
            "boundary": 0.81 - 0.1 * i,
            "inside": 0.12,
            "none": 0.07 + 0.1 * i,
            "coverage": 0.93 - 0.1 * i,
            "mass_stored": 0.97 - 0.01 * i,
            "mass_aligned": 0.94 - 0.02 * i,
        }
        for i, s in enumerate(sources)
    }
    return {
        "name": name,
        "seed": 0,
        "bpb": scored["bpb"],
        "mean_bpb": scored["mean_bpb"],
        "interference": scored["interference"],
        "pool_bpb": estimate["pool_bpb"],
        "coverage": {s: a["coverage"] for s, a in alignment.items()},
        "seconds": seconds,
        "peak_rss_bytes": max(peak.values()),
        "peak_rss_bytes_by_stage": peak,
        "evaluation": scored,
        "pool": estimate,
        "alignment": alignment,
        "fingerprints": {"corpus": "a" * 32, "plan": "b" * 32, "store code": "c" * 32},
        "versions": {"logitfuse": "0.1.0", "python": "3.11.9", "torch": "2.13.0+cpu"},
        "settings": {
            "name": name,
            "seed": 0,
            "sources": {s: {"model": f"runs/demo/inputs/models/{s}"} for s in sources},
            "corpus": {"inputs": [{"path": "runs/demo/inputs/text/" + "long-" * 30 + ".jsonl"}]},
        },
    }


def steps(
    domains: tuple[str, ...] = ("code", "facts", "prose"),
    sources: tuple[str, ...] = ("code", "prose", "facts"),
    count: int = 620,
) -> dict[str, list[dict[str, Any]]]:
    """The trainer's step logs."""
    rng = np.random.default_rng(0)
    found: dict[str, list[dict[str, Any]]] = {}
    for model, floor in [("fused", 3.1), ("clm_control", 3.25)]:
        lines = []
        for step in range(1, count + 1):
            clm = floor + 2.2 * math.exp(-step / 130) + float(rng.normal(0, 0.12))
            line: dict[str, Any] = {"step": step, "loss": clm, "clm": clm, "lr": 1e-3}
            if model == "fused":
                raw = {s: 1.0 + 0.8 * math.sin(step / 200 + i) for i, s in enumerate(sources)}
                total = sum(raw.values())
                line |= {
                    "fusion": clm + 0.4,
                    "pool": 2.4 + 0.3 * math.exp(-step / 60),
                    "feedback": 0.05,
                    "weights": {s: w / total for s, w in raw.items()},
                    "fusion_weights": {
                        d: 0.7 * math.exp(-i * step / 400) for i, d in enumerate(domains)
                    },
                    "weights_by_domain": {
                        d: {
                            s: 0.7 if i == j else 0.3 / (len(sources) - 1)
                            for j, s in enumerate(sources)
                        }
                        for i, d in enumerate(domains)
                    },
                }
            if step % 50 == 0:
                line["valid_bpb"] = {d: 1.7 + clm / 20 + 0.1 * i for i, d in enumerate(domains)}
            lines.append(line)
        found[model] = lines
    return found
