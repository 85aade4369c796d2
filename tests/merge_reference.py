"""Methods of merging in float64, written from their formulas, a whole tensor at a time.

K models, the tensor's own shape behind it
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fuse_train.merge.draws import uniform

Array = npt.NDArray[np.float64]


def linear(models: Array, weights: Sequence[float], *, normalize: bool = True) -> Array:
    total = np.tensordot(np.asarray(weights), models, 1)
    return total / np.sum(weights) if normalize else total


def slerp(models: Array, *, t: float = 0.5) -> Array:
    a, b = models
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    cosine = (a * b).sum() / ((norm_a if norm_a > 1e-8 else 1) * (norm_b if norm_b > 1e-8 else 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    omega = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def task_arithmetic(
    base: Array,
    models: Array,
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> Array:
    total = np.tensordot(np.asarray(weights), models - base, 1)
    return base + scale * (total / np.sum(weights) if normalize else total)


def with_elected_sign(
    base: Array,
    deltas: Array,
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> Array:
    """Merge of differences that were made sparse already."""
    merged = np.zeros(base.size)
    flat = deltas.reshape(len(deltas), -1)
    for i in range(base.size):
        parts = [w * d for w, d in zip(weights, flat[:, i], strict=True)]
        sign = 1 if sum(parts) >= 0 else -1
        own = [k for k, part in enumerate(parts) if np.sign(part) == sign]
        total = sum(parts[k] for k in own)
        weight = sum(weights[k] for k in own)
        merged[i] = scale * (total / weight if normalize and weight else total)
    return base + merged.reshape(base.shape)


def trimmed(deltas: Array, density: float) -> Array:
    """Of each the largest entries by magnitude; of equal ones the first."""
    kept = np.zeros_like(deltas).reshape(len(deltas), -1)
    for row, delta in zip(kept, deltas.reshape(len(deltas), -1), strict=True):
        count = max(1, int(density * delta.size))
        best = np.argsort(-np.abs(delta), kind="stable")[:count]
        row[best] = delta[best]
    return kept.reshape(deltas.shape)


def dropped(deltas: Array, keep: Array, *, name: str, seed: int, rescale: bool = True) -> Array:
    """Entries kept with probability `keep`, by the program's own draws."""
    found = np.zeros_like(deltas)
    for k, delta in enumerate(deltas):
        drawn = uniform(name, seed=seed, model=k, start=0, count=delta.size).numpy()
        kept = drawn.reshape(delta.shape) < keep[k].astype(np.float32)
        found[k] = np.where(kept, delta / keep[k] if rescale else delta, 0)
    return found


def magprune(deltas: Array, density: float, epsilon: float) -> Array:
    """Probability that each entry is kept."""
    found = np.zeros_like(deltas)
    for index in np.ndindex(deltas.shape[:-1]):
        row = np.abs(deltas[index])
        ranks = np.argsort(np.argsort(row, kind="stable"), kind="stable")
        share = ranks / (len(row) - 1) if len(row) > 1 else 0.5
        found[index] = density - epsilon + 2 * epsilon * share
    return found


def varm(base: Array, models: Array) -> Array:
    moved = [float(((model - base) ** 2).mean()) for model in models]
    shares = [m / sum(moved) if sum(moved) else 1 / len(moved) for m in moved]
    return sum(share * model for share, model in zip(shares, models, strict=True))


def sce(base: Array, models: Array, *, density: float, filters: bool = True) -> Array:
    deltas = models - base
    # The program selects by variances in float32; of nearly equal ones it may take another.
    variance = np.var((models.astype(np.float32) - base.astype(np.float32)), axis=0).ravel()
    selected = np.ones(base.size, bool)
    if density < 1:
        order = np.argsort(-variance, kind="stable")
        selected[:] = False
        selected[order[: int(density * np.count_nonzero(variance))]] = True
    picked = deltas * selected.reshape(base.shape)
    squares = [float((delta**2).sum()) for delta in picked]
    eta = [s / sum(squares) if sum(squares) else 1 / len(squares) for s in squares]
    flat = (picked if filters else deltas).reshape(len(deltas), -1)
    merged = np.zeros(base.size)
    for i in range(base.size):
        sign = 1 if flat[:, i].sum() >= 0 else -1
        own = [k for k, delta in enumerate(flat[:, i]) if np.sign(delta) == sign]
        weight = sum(eta[k] for k in own)
        merged[i] = sum(eta[k] * flat[k, i] for k in own) / weight if weight else 0
    return base + merged.reshape(base.shape)
