"""Two runs' interference compared: the ratio of their summed excess, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fuse_eval.interference.documents import DocumentDifferences
from store_schema.errors import MismatchError

Floats = npt.NDArray[np.float64]
SAME_TEXT = (
    "compare runs of one plan with the same sources and target tokenizer (`data_dir` shares one)"
)
_DRAWS_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True)
class ExcessRatio:
    """Ratio of one run's summed excess to another's.

    Args:
        nats: Summed excess of this run.
        against_nats: Summed excess of the other run.
        value: Their ratio, below 1 if this run interferes less; None if the other has no excess.
        low: Lower end of the interval.
        high: Upper end of the interval; None if it is unbounded.
    """

    nats: float
    against_nats: float
    value: float | None
    low: float | None
    high: float | None


def require_same_documents(
    ours: DocumentDifferences, theirs: DocumentDifferences, *, where: object, other: object
) -> None:
    """Refuse runs that were not evaluated on the same bytes of the same documents.

    Args:
        ours: Differences of this run.
        theirs: Differences of the other run.
        where: Name of this run, for the message.
        other: Name of the other run, for the message.

    Raises:
        MismatchError: Documents or their scored bytes differ.
    """
    here, there = (_sizes(differences) for differences in (ours, theirs))
    if here == there:
        return
    shared = here.keys() & there.keys()
    same = sum(here[name] == there[name] for name in shared)
    raise MismatchError(
        f"{other} was not evaluated on the same text as this run",
        where=where,
        expected=f"the same {len(here)} documents with the same bytes counted",
        got=f"{len(there)} documents, {len(shared)} of the same names, {same} of the same bytes",
        hint=SAME_TEXT,
    )


def _sizes(differences: DocumentDifferences) -> dict[tuple[str, str], int]:
    names = zip(differences.domains, differences.document_ids, strict=True)
    return dict(zip(names, differences.num_bytes.tolist(), strict=True))


def excess_ratio(
    ours: Floats,
    theirs: Floats,
    domains: Sequence[str],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> ExcessRatio:
    """Ratio of two sums over documents with a paired bootstrap interval.

    Documents are drawn with replacement within each domain, the same ones for both runs.

    Args:
        ours: [U] excess of this run in nats.
        theirs: [U] excess of the other run on the same documents.
        domains: [U] domain of each document.
        samples: Number of resamples.
        confidence: Two-sided level.
        seed: Seed of the resampling.
    """
    pair = np.stack([ours, theirs])
    drawn = _resampled_sums(pair, np.asarray(domains), samples, np.random.default_rng(seed))
    total, against = (float(value) for value in pair.sum(-1))
    # Excess in this run alone: ratio infinite. Excess in neither: 0 for the lower end, infinite above.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = drawn[0] / drawn[1]
    low = np.where((drawn[0] == 0) & (drawn[1] == 0), 0.0, ratio)
    high = np.where(drawn[1] == 0, np.inf, ratio)
    # No interpolation, which infinities do not allow.
    ends = (
        float(np.quantile(low, (1 - confidence) / 2, method="inverted_cdf")),
        float(np.quantile(high, (1 + confidence) / 2, method="inverted_cdf")),
    )
    return ExcessRatio(
        total,
        against,
        total / against if against else None,
        *(end if np.isfinite(end) else None for end in ends),
    )


def _resampled_sums(
    pair: Floats, domains: npt.NDArray[Any], samples: int, rng: np.random.Generator
) -> Floats:
    """[2, R] sums over the drawn documents of all domains."""
    sums = np.zeros((2, samples))
    for domain in np.unique(domains):
        values = pair[:, domains == domain]
        count = values.shape[1]
        step = max(1, _DRAWS_AT_ONCE // count)
        for start in range(0, samples, step):
            stop = min(start + step, samples)
            chosen = rng.integers(0, count, size=(stop - start, count))
            sums[:, start:stop] += values[:, chosen].sum(-1)
    return sums
