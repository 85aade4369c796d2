"""Inputs of a selector: features of each source at each row, from earlier rows alone.

What is known before the segment begins is the prior of its domain (prior.py). All else comes from the
rows BEFORE row i of the same segment (past.py): log-weights of hedges with fixed
share (what a Bayes mixture would use); the source's NLL so far, per byte and relative to the other
sources, lately, in all and after similar text; its NLL minus its own entropy (near 0 on text it was
trained for). Of row i only the byte before it is read.

In an aligned store the distributions of row i (a source's entropy, whether the others agree) leak
something of the label: a row exists because a real source token begins there or reaches across, which
depends on the text to come. On the demo, pools seem 5 % better with features of them, but not when
they are scored by span (docs/training.md).

Shape suffixes: N positions of a shard, M sources, F features, D segments, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from fuse_train.selectors.past import OF_SOURCE, SHARED, past_features, text_classes
from store_schema.layout import Arrays, row_sums
from store_schema.text.encoded import token_lengths

FEATURES = OF_SOURCE + SHARED
"""Names of the columns."""

HEDGE_START = "prior_hedge_0.5_0.03"
"""Feature of the hedge that an untrained network equals."""

Floats = npt.NDArray[np.float64]


def shard_features(
    sources: Sequence[Arrays],
    token_offsets: npt.NDArray[np.int64],
    byte_ends: npt.NDArray[np.uint32],
    texts: Sequence[bytes],
    prior_DM: Floats,
) -> npt.NDArray[np.float32]:
    """Features of every row of a shard, each scaled to about 1.

    Args:
        sources: Arrays of the aligned stores for the same shard.
        token_offsets: [D+1] rows of each segment.
        byte_ends: [N] end of each token in its segment.
        texts: UTF-8 of each segment.
        prior_DM: Weights of the sources before a segment begins.

    Returns:
        [N, M, F] float32, also of rows that a source does not cover.
    """
    covered_NM = np.stack([np.diff(s["entry_offsets"]) > 0 for s in sources], axis=1)
    logprobs_NM = np.stack([s["label_logprobs"].astype(np.float64) for s in sources], axis=1)
    return past_features(
        logprobs_NM,
        np.stack([_entropies(s) for s in sources], axis=1),
        covered_NM,
        token_lengths(byte_ends, token_offsets),
        text_classes(texts, token_offsets, byte_ends),
        token_offsets,
        prior_DM,
    )


def _entropies(arrays: Arrays) -> Floats:
    """Nats [N] of each row's entries and tail; 0 where the row is not covered."""
    offsets, tail_N = arrays["entry_offsets"], arrays["tail_mass"].astype(np.float64)
    # An entry of no probability adds nothing.
    logprobs_E = arrays["entry_logprobs"].astype(np.float64).clip(min=PROBABILITY_FLOOR)
    entropy_N = -row_sums(np.exp(logprobs_E) * logprobs_E, offsets)
    entropy_N -= tail_N * np.log(np.where(tail_N > 0, tail_N, 1.0))
    return np.where(np.diff(offsets) > 0, entropy_N, 0.0)
