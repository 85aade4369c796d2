"""Mean scores of answers by domain, and paired differences between models. Pure functions.

Shapes: P prompts, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def mean_scores(scores_P: Floats, domains: Sequence[str]) -> dict[str, float]:
    """Mean score of one model by domain, in sorted order."""
    domain_P = np.asarray(domains)
    return {name: float(scores_P[domain_P == name].mean()) for name in sorted(set(domains))}


def difference(
    scores_P: Floats,
    against_P: Floats,
    domains: Sequence[str],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Mean score of one model minus another's on the same prompts, by domain and in the mean.

    Prompts are drawn with replacement within each domain (a paired bootstrap); the mean is that of the
    domains, each with equal weight.

    Args:
        scores_P: Scores of the model, [P].
        against_P: Scores of the model that it is compared with, [P].
        domains: Domain of each prompt, [P].
        samples: Number of resamples.
        confidence: Two-sided level.
        seed: Seed of the resampling.

    Returns:
        `domains` {domain: {value, low, high}}, `mean` {value, low, high}.
    """
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    rng = np.random.default_rng(seed)
    points, drawn = resampled_differences(scores_P - against_P, domains, samples, rng)
    mean_R = np.mean(list(drawn.values()), axis=0)
    return {
        "domains": {name: _change(points[name], drawn[name], ends) for name in points},
        "mean": _change(float(np.mean(list(points.values()))), mean_R, ends),
    }


def resampled_differences(
    apart_P: Floats, domains: Sequence[str], samples: int, rng: np.random.Generator
) -> tuple[dict[str, float], dict[str, Floats]]:
    """Mean difference by domain, and as many resamples of it, [R].

    Args:
        apart_P: Score of a model minus another's, [P].
        domains: Domain of each prompt, [P].
        samples: Number of resamples.
        rng: Draws prompts with replacement within their domain.
    """
    domain_P = np.asarray(domains)
    points, drawn = {}, {}
    for name in sorted(set(domains)):
        apart = apart_P[domain_P == name]
        points[name] = float(apart.mean())
        chosen = rng.integers(0, len(apart), size=(samples, len(apart)))
        drawn[name] = apart[chosen].mean(axis=1)
    return points, drawn


def _change(value: float, drawn_R: Floats, ends: tuple[float, float]) -> dict[str, float]:
    low, high = np.quantile(drawn_R, ends)
    return {"value": value, "low": float(low), "high": float(high)}
