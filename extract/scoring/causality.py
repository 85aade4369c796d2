"""Whether a loaded model predicts from what stands before alone: what comes later is changed, and
nothing before it may move.

A model that sees later text (an encoder, attention that was made bidirectional) gives rows that are
of another thing than the store says, off by nats, and no sum or shape is wrong with them.
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
"""Mean change of a label's log-probability. Two texts in one batch differ by rounding alone, below 0.02
in bfloat16; a model that reads on changes by nats."""


def require_causal(engine: Engine, spec: EngineSpec, segments: Sequence[EncodedSegment]) -> None:
    """Score the beginning of a text twice, with two ends.

    Args:
        engine: The loaded model.
        spec: What it was opened by.
        segments: Text of the run, the longest of which is taken; nothing is done with too short ones.

    Raises:
        ModelError: What comes later changes what stands before.
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
            f"{spec.source} is no causal language model: later text changes what it says before it",
            where=spec.folder,
            expected=f"at most {MAX_NATS} nats a token, for rounding",
            got=f"{moved.mean():.3g}",
            hint="its attention is bidirectional: give the causal model of that family; or the engine "
            "does not compute it rightly on this machine: set extract.engine to the other one",
        )
