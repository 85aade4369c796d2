"""Branches for `bench-align-oracle`: chosen and computed by the stage's own code, from a small model.

Shape suffixes: V the source's vocabulary, B branches, R rows, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.oracle_pairs import TOP_K, OraclePair
from extract.branch_config import BranchOptions
from extract.branching.past_ends import past_ends
from extract.engines.protocol import Branches, DenseRows
from extract.engines.transformers_branches import BranchStates
from extract.scoring.brancher import Brancher
from store_schema.layout import Arrays
from store_schema.plan.plan import Segment
from store_schema.presets import Encoding
from store_schema.text.encoded import EncodedSegment

TOKENS_AT_ONCE = 1_024


class ModelEngine:
    """The part of an engine that gives branches, around a loaded model."""

    def __init__(self, model: Any) -> None:
        """`model` is a transformers model in float32."""
        self._states = BranchStates(self._forward, model, "source")
        self._model = model

    @torch.inference_mode()
    def branch(self, segments: Sequence[Branches]) -> Iterator[tuple[int, DenseRows]]:
        """See `Engine.branch`."""
        for i, asked in enumerate(segments):
            logits_RV = self._states.of(asked, TOKENS_AT_ONCE)
            best = logits_RV.double().log_softmax(-1).topk(TOP_K, dim=-1)
            logprobs_RK = best.values.float().numpy()
            yield i, DenseRows(best.indices.numpy(), logprobs_RK, np.zeros(len(logprobs_RK), "<f4"))

    def _forward(self, **inputs: Any) -> tuple[torch.Tensor, Any]:
        own = self._model(**inputs)
        return own.logits, own.past_key_values


def chance_past_ends(pair: OraclePair, text: Sequence[Segment]) -> npt.NDArray[np.float64]:
    """[V] how often the target goes on past the end of each source token."""
    read = zip(pair.source.encode(text), pair.target.encode(text), strict=True)
    return past_ends(read, pair.source.vocabulary.lengths)


def branched(
    pair: OraclePair,
    rows: Arrays,
    encoded: Sequence[EncodedSegment],
    chance_V: npt.NDArray[np.float64],
    options: BranchOptions,
) -> Arrays:
    """The rows of some segments with branches.

    Args:
        pair: Has the source's model.
        rows: Arrays of a source store.
        encoded: The segments as the source reads them.
        chance_V: From `chance_past_ends`.
        options: The budget.
    """
    brancher = Brancher(options, Encoding(), pair.source.vocabulary, chance_V)
    engine: Any = ModelEngine(pair.model)
    return brancher.with_branches(engine, encoded, rows, where="benchmark")
