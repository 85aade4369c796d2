"""Interference: what fusing makes worse, document by document, and how much of it is beyond the noise.

The fused model may be better than its control in the mean and still be worse on some of the text. Each
document is tested by itself: its blocks give the noise of its difference, and the level is corrected
for the number of documents.

Shape suffixes: K blocks, U documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fuse_eval.interference.blocks import Blocks

MIN_BLOCKS = 8
"""Fewest blocks from which a document's noise can be estimated."""
MAX_FREEDOM = 1000
"""Largest degrees of freedom; beyond it Student's t is practically normal."""
WORST_SHOWN = 10

WORSE, WITHIN, UNDECIDED = "worse", "within noise", "undecided"

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class DocumentDifferences:
    """How two models differ on each document of a split.

    Args:
        document_ids: [U] sorted within each domain.
        domains: [U] domain of each, in sorted order.
        num_bytes: [U] scored bytes; 0 if the tokenizers share no boundary.
        model_nats: [U] NLL of the model.
        against_nats: [U] NLL of the model that it is compared with.
        p_values: [U] one-sided p-values of "not worse"; NaN with too few blocks.
        correlation: Correlation of neighbouring blocks, which the p-values account for.
    """

    document_ids: tuple[str, ...]
    domains: tuple[str, ...]
    num_bytes: npt.NDArray[np.int64]
    model_nats: Floats
    against_nats: Floats
    p_values: Floats
    correlation: float

    @property
    def excess_nats(self) -> Floats:
        """[U] nats by which the model is worse, 0 where it is not."""
        return np.maximum(self.model_nats - self.against_nats, 0.0)

    def worse(self, confidence: float) -> Bools:
        """[U] which documents are worse beyond the noise.

        Args:
            confidence: 1 - false discovery rate: at most a share of 1 - confidence of the selected
                documents is expected to be wrong.
        """
        significant = np.zeros(len(self.p_values), np.bool_)
        tested = ~np.isnan(self.p_values)
        significant[tested] = adjusted(self.p_values[tested]) <= 1 - confidence
        return significant & (self.excess_nats > 0)


def document_differences(blocks: Blocks, model: str, against: str) -> DocumentDifferences:
    """Compare two models on each document.

    Args:
        blocks: Blocks of the split.
        model: The model.
        against: The model that it is compared with.
    """
    names = list(zip(blocks.domains, blocks.document_ids, strict=True))
    documents = sorted(set(names))
    place = {name: i for i, name in enumerate(documents)}
    unit_K = np.asarray([place[name] for name in names], np.int64)
    nats = [np.bincount(unit_K, blocks.nats[m]).astype(np.float64) for m in (model, against)]
    sized_K = np.flatnonzero(blocks.num_bytes > 0)
    order = sized_K[np.argsort(unit_K[sized_K], kind="stable")]
    edges = np.searchsorted(unit_K[order], np.arange(1, len(documents)))
    difference_K = blocks.nats[model] - blocks.nats[against]
    noises = [
        document_noise(difference_K[rows], blocks.num_bytes[rows])
        for rows in np.split(order, edges)
    ]
    correlation = block_correlation([noise.residuals for noise in noises if noise.decided])
    return DocumentDifferences(
        document_ids=tuple(document for _, document in documents),
        domains=tuple(domain for domain, _ in documents),
        num_bytes=np.bincount(unit_K, blocks.num_bytes).astype(np.int64),
        model_nats=nats[0],
        against_nats=nats[1],
        p_values=np.asarray([p_not_worse(noise, correlation) for noise in noises], np.float64),
        correlation=correlation,
    )


@dataclass(frozen=True, slots=True)
class DocumentNoise:
    """How a document's difference varies over its blocks.

    Args:
        total: Difference of the document in nats.
        residuals: [K] difference of each block minus its share, by bytes, of the total.
        blocks: Effective number of blocks: blocks of equal size with the same noise.
    """

    total: float
    residuals: Floats
    blocks: int

    @property
    def decided(self) -> bool:
        """Whether there are enough blocks to test the document."""
        return self.blocks >= MIN_BLOCKS


def document_noise(nats: Floats, num_bytes: npt.NDArray[np.int64]) -> DocumentNoise:
    """Residuals of a document's blocks.

    The difference in bits per byte is the ratio of two sums over blocks, nats and bytes, so its
    noise is that of each block's nats against its share of the bytes. Blocks of unequal size count
    as (sum of bytes)^2 / (sum of bytes^2) equal ones.

    Args:
        nats: [K] difference of the document's blocks, in the order of the text.
        num_bytes: [K] bytes of each, above 0.

    Source:
        Cochran, Sampling Techniques (1977), chapter 6, variance of a ratio estimate.
    """
    if not len(nats):
        return DocumentNoise(0.0, np.empty(0), 0)
    sizes = num_bytes.astype(np.float64)
    total = math.fsum(nats)
    blocks = round(sizes.sum() ** 2 / (sizes**2).sum())
    return DocumentNoise(total, nats - total / sizes.sum() * sizes, blocks)


def block_correlation(residuals: Sequence[Floats]) -> float:
    """Correlation of a block with the next one, over all documents together.

    One document alone is too short to estimate it. Residuals from a document's own mean make it too
    low by (1 + 4 x correlation) / K on average, which is corrected.

    Args:
        residuals: [K] residuals of each document, in the order of the text; K is at least 5.

    Source:
        Marriott and Pope (1954), Bias in the Estimation of Autocorrelations.
    """
    seen = share = 0.0
    for one in residuals:
        if (one != 0).any():
            pairs = len(one) - 1
            seen += pairs * float(one[1:] @ one[:-1] / (one @ one) + 1 / len(one))
            share += pairs * (1 - 4 / len(one))
    return seen / share if share else 0.0


def p_not_worse(noise: DocumentNoise, correlation: float = 0.0) -> float:
    """One-sided p-value of a document's difference in bits per byte being 0 or below.

    Correlated neighbouring blocks increase the variance by the factor 1 + 2 x correlation; a negative
    correlation does not decrease it. With skewed residuals, as from large gains on a few blocks and
    small losses on many, Student's t rejects too often: the smaller of t and its form corrected for
    skewness is taken.

    Args:
        noise: Noise of the document.
        correlation: From `block_correlation`.

    Returns:
        NaN with fewer than MIN_BLOCKS blocks.

    Source:
        Hall (1992), On the Removal of Skewness by Transformation, for the corrected form.
    """
    if not noise.decided:
        return math.nan
    n = len(noise.residuals)
    variance = n / (n - 1) * float(noise.residuals @ noise.residuals)
    if variance == 0:
        return float(noise.total <= 0)
    t = noise.total / math.sqrt(variance * max(1.0, 1 + 2 * correlation))
    return student_tail(min(t, _without_skew(t, noise.residuals)), noise.blocks - 1)


def _without_skew(t: float, residuals: Floats) -> float:
    """Hall's transformation of t, with the sample skewness corrected for its bias."""
    n = len(residuals)
    skew = float((residuals**3).mean() / (residuals**2).mean() ** 1.5)
    lean = skew * math.sqrt(n * (n - 1)) / (n - 2) / math.sqrt(n)
    return t + lean * t**2 / 3 + lean**2 * t**3 / 27 + lean / 6


def student_tail(t: float, freedom: int) -> float:
    """Probability that Student's t exceeds `t`.

    Args:
        t: The statistic.
        freedom: Integer degrees of freedom, at most MAX_FREEDOM are used.

    Source:
        Abramowitz and Stegun (1964), 26.7.3 and 26.7.4: closed forms, accurate to 1e-15 absolutely.
    """
    freedom = min(freedom, MAX_FREEDOM)
    angle = math.atan2(t, math.sqrt(freedom))
    cos2 = freedom / (freedom + t * t)
    i = np.arange(1, (freedom - freedom % 2) // 2)
    if freedom % 2 == 0:
        inside = math.sin(angle) * (1 + np.cumprod((2 * i - 1) / (2 * i) * cos2).sum())
    else:
        rest = 1 + np.cumprod(2 * i / (2 * i + 1) * cos2).sum() if freedom > 1 else 0.0
        inside = 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * rest)
    return min(max(0.5 * (1 - float(inside)), 0.0), 1.0)


def adjusted(p_values: Floats) -> Floats:
    """Adjusted p-values: selecting those up to q has a false discovery rate of at most q.

    Source:
        Benjamini and Hochberg (1995), Controlling the False Discovery Rate.
    """
    order = np.argsort(p_values)
    scaled = p_values[order] * len(p_values) / np.arange(1, len(p_values) + 1)
    out = np.empty(len(p_values))
    out[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return out


def interference_record(
    differences: DocumentDifferences, model: str, against: str, confidence: float
) -> dict[str, Any]:
    """The part `interference` of evaluation.json, JSON-like.

    Args:
        differences: From `document_differences`.
        model: The model.
        against: The model that it is compared with.
        confidence: As in `DocumentDifferences.worse`.

    Returns:
        `documents` and `excess` over the split, `domains` {domain: the same}, and `worst_documents`.
        Bits per byte of an excess are over all bytes of the split, so that domains add up.
    """
    worse = differences.worse(confidence)
    every = np.ones(len(worse), np.bool_)
    domain_of = np.asarray(differences.domains)
    return {
        "model": model,
        "against": against,
        "confidence": confidence,
        "min_blocks": MIN_BLOCKS,
        "block_correlation": differences.correlation,
        **_figures(differences, worse, every),
        "domains": {
            domain: _figures(differences, worse, domain_of == domain)
            for domain in dict.fromkeys(differences.domains)
        },
        "worst_documents": _worst(differences, worse),
    }


def _figures(differences: DocumentDifferences, worse: Bools, chosen: Bools) -> dict[str, Any]:
    """Counts and sums over the chosen documents."""
    excess = differences.excess_nats
    scale = math.log(2) * max(int(differences.num_bytes.sum()), 1)
    beyond, point = (float(excess[chosen & rows].sum()) for rows in (worse, excess > 0))
    return {
        "documents": {
            "total": int(chosen.sum()),
            "worse": int((chosen & worse).sum()),
            "undecided": int(np.isnan(differences.p_values[chosen]).sum()),
            "worse_by_point": int((excess[chosen] > 0).sum()),
        },
        "excess": {
            "worse_nats": beyond,
            "worse_bpb": beyond / scale,
            "worse_by_point_nats": point,
            "worse_by_point_bpb": point / scale,
        },
    }


def _worst(differences: DocumentDifferences, worse: Bools) -> list[dict[str, Any]]:
    """The worst documents: those worse beyond the noise first, then by excess."""
    excess = differences.excess_nats
    order = np.lexsort((-excess, ~worse))
    order = order[excess[order] > 0][:WORST_SHOWN]
    return [_document(differences, int(i), bool(worse[i])) for i in order]


def _document(differences: DocumentDifferences, i: int, worse: bool) -> dict[str, Any]:
    undecided = math.isnan(differences.p_values[i])
    scale = math.log(2) * max(int(differences.num_bytes[i]), 1)
    return {
        "document_id": differences.document_ids[i],
        "domain": differences.domains[i],
        "bytes": int(differences.num_bytes[i]),
        "bpb": float(differences.model_nats[i] / scale),
        "against_bpb": float(differences.against_nats[i] / scale),
        "change": _change(differences.model_nats[i], differences.against_nats[i]),
        "excess_nats": float(differences.excess_nats[i]),
        "p_value": None if undecided else float(differences.p_values[i]),
        "verdict": WORSE if worse else UNDECIDED if undecided else WITHIN,
    }


def _change(model: float, against: float) -> float | None:
    """Relative change; None if `against` is 0."""
    return float(model / against - 1) if against > 0 else None
