"""Figures of `make bench-presets` from answers and bits per byte: pure functions.

Shapes: P prompts of one seed, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.presets_variants import CONTROL, CONTROL_ALL, INFERENCE, PROGRESSIVE, TRAINING

SAMPLES, CONFIDENCE = 4000, 0.95


@dataclass(frozen=True, slots=True)
class Seen:
    """One variant at one seed.

    Args:
        right: [P] share of right of each held-out answer.
        domains: [P] of the prompts.
        bpb: Bits per byte of the given held-out answers by domain.
        lr: The learning rate that was best on valid text.
    """

    right: Sequence[float]
    domains: Sequence[str]
    bpb: Mapping[str, float]
    lr: float

    @property
    def accuracy(self) -> float:
        """Mean of the domains' shares of right answers."""
        return float(np.mean(list(self.by_domain.values())))

    @property
    def by_domain(self) -> dict[str, float]:
        """Share of right answers of each domain."""
        right, domains = np.asarray(self.right), np.asarray(self.domains)
        return {name: float(right[domains == name].mean()) for name in sorted(set(domains))}

    @property
    def mean_bpb(self) -> float:
        """Mean of the domains."""
        return float(np.mean(list(self.bpb.values())))


BySeed = Sequence[Mapping[str, Seen]]
"""Variants of each seed."""


def points_apart(seeds: BySeed, variant: str, against: str) -> dict[str, float]:
    """Right answers of one variant minus another's, in points: mean of seeds, with an interval.

    Prompts are drawn with replacement within domain and seed (a paired bootstrap). How far seeds lie
    apart is told by `low_seed` and `high_seed`.
    """
    rng = np.random.default_rng(0)
    values, draws = [], []
    for seen in seeds:
        one, other = seen[variant], seen[against]
        apart_P = np.asarray(one.right) - np.asarray(other.right)
        domains_P = np.asarray(one.domains)
        parts = [apart_P[domains_P == name] for name in sorted(set(one.domains))]
        values.append(100 * float(np.mean([part.mean() for part in parts])))
        drawn = [
            part[rng.integers(0, len(part), (SAMPLES, len(part)))].mean(axis=1) for part in parts
        ]
        draws.append(100 * np.mean(drawn, axis=0))
    low, high = np.quantile(np.mean(draws, axis=0), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return {
        "value": float(np.mean(values)), "low": float(low), "high": float(high),
        "low_seed": min(values), "high_seed": max(values),
    }  # fmt: skip


def mean_by_domain(seen: Sequence[Seen]) -> dict[str, float]:
    """Share of right answers of each domain, mean of the seeds."""
    return {
        domain: float(np.mean([one.by_domain[domain] for one in seen]))
        for domain in seen[0].by_domain
    }


def world_figures(seeds: BySeed) -> dict[str, Any]:
    """What the last line says of one kind of models."""
    names = list(seeds[0])
    found: dict[str, Any] = {
        "variants": {
            name: {
                "accuracy": float(np.mean([seen[name].accuracy for seen in seeds])),
                "accuracy_by_domain": mean_by_domain([seen[name] for seen in seeds]),
                "bpb": float(np.mean([seen[name].mean_bpb for seen in seeds])),
                "lr": [seen[name].lr for seen in seeds],
                **(
                    {"minus_control": points_apart(seeds, name, CONTROL)}
                    if name != CONTROL and CONTROL in names
                    else {}
                ),
            }
            for name in names
        }
    }
    if PROGRESSIVE in names and CONTROL in names:
        found["profuser_minus_control"] = points_apart(seeds, PROGRESSIVE, CONTROL)
    if PROGRESSIVE in names and CONTROL_ALL in names:
        found["profuser_minus_control_all_text"] = points_apart(seeds, PROGRESSIVE, CONTROL_ALL)
    single = [name for name in (INFERENCE, TRAINING) if name in names]
    if PROGRESSIVE in names and single:
        best = max(single, key=lambda name: found["variants"][name]["accuracy"])
        found["profuser_minus_best_single_mode"] = points_apart(seeds, PROGRESSIVE, best)
    return found
