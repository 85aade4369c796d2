"""Checks that a loaded model is causal: changing later text must not change earlier predictions.

A model that sees later text (an encoder, or bidirectional attention) returns rows with valid sums and
shapes, but they are not next-token predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from extract.engines.protocol import Engine, EngineSpec, first_known
from store_schema.errors import ModelError
from store_schema.text.tokenizer import EncodedSegment

PROBE_TOKENS = 32
LEAST_TOKENS = 4
MAX_NATS = 0.1
"""Maximal mean change of a label's log-probability. Rounding stays below 0.02 in bfloat16; a model that
sees later text changes by nats."""


def require_causal(engine: Engine, spec: EngineSpec, segments: Sequence[EncodedSegment]) -> None:
    """Score one beginning of a text with two continuations and compare its log-probabilities.

    Args:
        engine: The loaded model.
        spec: That the engine was opened with.
        segments: Text of the run; the longest is used, and nothing is checked if that is too short.

    Raises:
        ModelError: Later text changes earlier predictions.
    """
    longest = max(segments, key=lambda segment: len(segment.token_ids), default=None)
    if longest is None or len(longest.token_ids) < LEAST_TOKENS:
        return
    ids = longest.token_ids[:PROBE_TOKENS]
    half = len(ids) // 2
    other = ids.copy()
    other[half:] = (ids[half:] + 1) % spec.vocab_size
    pair = [EncodedSegment(longest.context_ids, text, np.zeros_like(text)) for text in (ids, other)]
    rows = dict(engine.score(pair))
    known = half - first_known(longest)
    first, second = (rows[i].label_logprobs[:known].astype(np.float64) for i in range(2))
    moved = np.abs(first - second)
    if known and bool(np.isfinite(moved).all()) and moved.mean() > MAX_NATS:
        raise ModelError(
            f"{spec.source} is not a causal language model: later text changes earlier predictions",
            where=spec.folder,
            expected=f"a change of at most {MAX_NATS} nats a token, from rounding",
            got=f"{moved.mean():.3g}",
            hint="if its attention is bidirectional, use a causal model; if it is causal, the engine "
            "computes wrong results on this machine: set extract.engine to the other one",
        )
