"""Forecast of fusing's gain over plain training: an n-gram model of the training text, mixed with the
target as it is before training, stands in for the trained control.

The difference between that mixture and its best mixture with the pool is how much the sources add to
training text and target on held-out text: a bound on the gain. What share of it a student reaches
depends on its size and steps (docs/evaluation.md has measurements).

Shape suffixes: S spans of text, N tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt

from fuse_train.gate.mixture import mixture_nats, mixture_weight
from store_schema.plan.plan import Segment
from store_schema.text.encoded import EncodedSegment
from store_schema.text.tokenizer import SegmentTokenizer

Floats = npt.NDArray[np.float64]

ORDER = 5
TOKENS_PER_DOMAIN = 1_000_000
"""Training tokens of a domain that are counted, the first ones; more take memory and change little."""
SHARE_TAKEN = 0.2
"""Share of the bound that is forecast; students reached between 0 and 0.37 (docs/evaluation.md)."""


class NgramModel:
    """Interpolated n-grams by Witten and Bell (1991): each order is interpolated with the next shorter
    one by the number of different tokens seen after its context, the shortest with the uniform one.

    Args:
        num_ids: Number of ids of the tokenizer.
        order: Longest n-gram, tokens.
    """

    def __init__(self, num_ids: int, order: int = ORDER) -> None:
        self._uniform = 1.0 / num_ids
        self._order = order
        self._after: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self.num_tokens = 0

    def add(self, context_ids: Sequence[int], ids: Sequence[int]) -> None:
        """Count the tokens of `ids`, each after up to `order - 1` before it."""
        for context, token in self._positions(context_ids, ids):
            for length in range(len(context) + 1):
                self._after[context[len(context) - length :]][token] += 1
        self.num_tokens += len(ids)

    def nats(self, context_ids: Sequence[int], ids: Sequence[int]) -> Floats:
        """NLL [N] of each token of `ids`."""
        positions = self._positions(context_ids, ids)
        return np.array([-log(self._probability(context, token)) for context, token in positions])

    def _positions(
        self, context_ids: Sequence[int], ids: Sequence[int]
    ) -> Iterable[tuple[tuple[int, ...], int]]:
        whole, first = (*context_ids, *ids), len(context_ids)
        for i, token in enumerate(ids, first):
            yield tuple(whole[max(i - self._order + 1, 0) : i]), token

    def _probability(self, context: tuple[int, ...], token: int) -> float:
        probability = self._uniform
        for length in range(len(context) + 1):
            seen = self._after.get(context[len(context) - length :])
            if seen is None:
                break
            total, kinds = seen.total(), len(seen)
            probability = (seen[token] + kinds * probability) / (total + kinds)
        return probability


def ngram_rows(
    train: Iterable[Segment], held_out: Sequence[Segment], tokenizer: SegmentTokenizer
) -> dict[str, Floats]:
    """NLL of held-out text under an n-gram model of its domain's training text.

    Args:
        train: Segments of the training split; only the first of each domain are counted.
        held_out: Segments of the split to score.
        tokenizer: The target's.

    Returns:
        {segment id: [N] nats}.
    """
    models: dict[str, NgramModel] = {}
    for segment in train:
        model = models.setdefault(segment.domain, NgramModel(tokenizer.vocab_size))
        if model.num_tokens < TOKENS_PER_DOMAIN:
            model.add(*_ids(tokenizer.encode([segment])[0]))
    none = NgramModel(tokenizer.vocab_size)
    rows = zip(held_out, tokenizer.encode(held_out), strict=True)
    return {s.segment_id: models.get(s.domain, none).nats(*_ids(encoded)) for s, encoded in rows}


def _ids(encoded: EncodedSegment) -> tuple[list[int], list[int]]:
    return list(map(int, encoded.context_ids)), encoded.token_ids.tolist()


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast of one domain, from NLLs over all its spans in nats.

    Args:
        control: Of the target mixed with the n-gram model, the estimate of plain training.
        bound: Of that, mixed with the pool.
    """

    control: float
    bound: float

    @property
    def most(self) -> float:
        """The bound on the gain, a share of the control's bits per byte."""
        # At least 0 except for rounding: the mixture may give the pool no weight.
        return max(1.0 - self.bound / self.control, 0.0) if self.control else 0.0

    @property
    def gain(self) -> float:
        """The forecast gain, a share of the control's bits per byte."""
        return SHARE_TAKEN * self.most


def forecasts(
    spans: Mapping[str, Floats], ngram_spans: Mapping[str, Floats]
) -> dict[str, Forecast]:
    """Forecast of each domain.

    Args:
        spans: {domain: [2, S] nats of target and pool}, from fuse_train's `span_nats`.
        ngram_spans: The same of the n-gram model and the pool.
    """
    made = {}
    for domain, (target_S, pool_S) in spans.items():
        ngram_S = ngram_spans[domain][0]
        control_S = mixture_nats(target_S, ngram_S, mixture_weight(target_S, ngram_S))
        bound_S = mixture_nats(control_S, pool_S, mixture_weight(control_S, pool_S))
        made[domain] = Forecast(float(control_S.sum()), float(bound_S.sum()))
    return made
