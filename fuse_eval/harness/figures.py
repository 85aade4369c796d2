"""Figures of the harness's results, and paired differences between models. Pure functions.

Shapes: D examples of a task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

NORMAL_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""

Metrics = dict[str, dict[str, Any]]
"""Metric and filter, such as `acc,none`, to {value, stderr, higher_is_better}."""


def metrics_of(result: Mapping[str, Any], better: Mapping[str, bool]) -> Metrics:
    """The metrics of one task or group in the harness's results.

    Args:
        result: `results[task]`: metrics by "name,filter", and "name_stderr,filter" beside them.
        better: `higher_is_better[task]` by the metric's name.

    Returns:
        Metrics; a stderr that the harness does not give is None.
    """
    found: Metrics = {}
    for key, value in result.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not _is_number(value):
            continue
        stderr = result.get(f"{name}_stderr,{filtered}")
        found[key] = {
            "value": float(value),
            "stderr": float(stderr) if _is_number(stderr) else None,
            "higher_is_better": bool(better.get(name, True)),
        }
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def example_scores(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Score of each example by its number, of a metric that is a number for each.

    Args:
        samples: `samples[task]` of the harness.
        metric: Metric and filter, such as `acc,none`.

    Returns:
        {} for metrics that are computed over all examples together.
    """
    name, _, filtered = metric.partition(",")
    found = {}
    for sample in samples:
        if sample.get("filter", filtered) == filtered and _is_number(sample.get(name)):
            found[str(sample["doc_id"])] = float(sample[name])
    return found


def paired_difference(
    ours: Mapping[str, float], theirs: Mapping[str, float]
) -> dict[str, float] | None:
    """Mean score minus another model's on the same examples, with its standard error.

    Both models answer the same questions, so the error is that of the differences, which is smaller
    than both models' own errors together.

    Args:
        ours: Score of each example.
        theirs: The other model's.

    Returns:
        `value`, `stderr`, `low` and `high` (95 %), `examples`; None with fewer than two in common.
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        return None
    apart_D = np.asarray([ours[name] - theirs[name] for name in common])
    value, stderr = float(apart_D.mean()), float(apart_D.std(ddof=1) / math.sqrt(len(common)))
    return {
        "value": value,
        "stderr": stderr,
        "low": value - NORMAL_95 * stderr,
        "high": value + NORMAL_95 * stderr,
        "examples": len(common),
    }
