"""Paired bootstrap: confidence intervals of the difference between two models on the same text.

Both models are scored on the same units (documents), units are drawn with replacement within each
domain, and the difference is computed for each draw. Pairing removes the variance between easy and hard
documents, which is far larger than the difference. Intervals do not include the variance between
training seeds, which needs several runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_DRAWS_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True)
class DomainUnits:
    """Sums of the resampled units of one domain, the same units for every model.

    Args:
        nats: Model to [U] NLL in nats.
        num_bytes: [U] bytes that the NLL covers.
    """

    nats: Mapping[str, Floats]
    num_bytes: Floats

    def bpb(self, model: str) -> float:
        """Bits per byte over all units."""
        return float(self.nats[model].sum() / np.log(2) / self.num_bytes.sum())


@dataclass(frozen=True, slots=True)
class Change:
    """A relative change of bits per byte; negative is better.

    Args:
        value: bpb(model) / bpb(against) - 1.
        low: Lower end of the interval.
        high: Upper end of the interval.
        units: Number of units.
    """

    value: float
    low: float
    high: float
    units: int


def units_by_domain(
    nats: Mapping[str, Floats],
    num_bytes: Floats,
    domains: Sequence[str],
    unit_names: Sequence[str],
) -> dict[str, DomainUnits]:
    """Sum segments by unit, domain by domain.

    Args:
        nats: Model to [D] nats of each segment.
        num_bytes: [D] bytes; segments with 0 are left out.
        domains: [D] domain of each segment.
        unit_names: [D] what is resampled together, such as the document id.

    Returns:
        Domains in sorted order.
    """
    units = {}
    domain_of = np.asarray(domains)
    for domain in sorted(set(domains)):
        rows = np.flatnonzero((domain_of == domain) & (num_bytes > 0))
        _, unit = np.unique(np.asarray(unit_names)[rows], return_inverse=True)
        if len(rows):
            units[domain] = DomainUnits(
                {m: np.bincount(unit, nats[m][rows]).astype(np.float64) for m in nats},
                np.bincount(unit, num_bytes[rows]).astype(np.float64),
            )
    return units


def compare(
    units: Mapping[str, DomainUnits],
    model: str,
    against: str,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Relative change of bits per byte from `against` to `model`, by domain and in the mean.

    The mean is that of the domains' bits per byte, each domain with equal weight, so that a large
    domain does not hide a small one.

    Args:
        units: From `units_by_domain`.
        model: The model.
        against: The model that it is compared with.
        samples: Number of resamples.
        confidence: Two-sided level.
        seed: Seed of the resampling.

    Returns:
        JSON-like: `domains` {domain: Change}, `mean` Change, `worse` the domains whose whole
        interval is above 0 (interference beyond the noise of the text).
    """
    rng = np.random.default_rng(seed)
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    drawn, points = [], []
    by_domain: dict[str, Change] = {}
    for domain, unit in units.items():
        pair = np.stack([unit.nats[model], unit.nats[against]])
        draws = resampled_bpb(pair, unit.num_bytes, samples, rng)
        point = (unit.bpb(model), unit.bpb(against))
        drawn.append(draws)
        points.append(point)
        by_domain[domain] = _change(point, draws, quantiles, len(unit.num_bytes))
    mean_point = tuple(np.mean(points, axis=0))
    total = sum(change.units for change in by_domain.values())
    mean = _change(mean_point, np.mean(drawn, axis=0), quantiles, total)
    return {
        "model": model,
        "against": against,
        "domains": {domain: asdict(change) for domain, change in by_domain.items()},
        "mean": asdict(mean),
        "worse": [domain for domain, change in by_domain.items() if change.low > 0],
    }


def _change(
    point: Sequence[float], draws: Floats, quantiles: Sequence[float], units: int
) -> Change:
    low, high = np.quantile(draws[:, 0] / draws[:, 1] - 1, quantiles)
    return Change(float(point[0] / point[1] - 1), float(low), float(high), units)


def resampled_bpb(
    nats: Floats, num_bytes: Floats, samples: int, rng: np.random.Generator
) -> Floats:
    """Bits per byte of both models in each resample: [R, 2] from nats [2, U]."""
    count = len(num_bytes)
    step = max(1, _DRAWS_AT_ONCE // count)
    parts = []
    for start in range(0, samples, step):
        chosen = rng.integers(0, count, size=(min(step, samples - start), count))
        parts.append((nats[:, chosen].sum(-1) / num_bytes[chosen].sum(-1)).T)
    bpb: Floats = np.concatenate(parts) / np.log(2)
    return bpb
