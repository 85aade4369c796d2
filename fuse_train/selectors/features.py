"""Inputs of a selector: features of each source at each row, computed without the row's label.

Past features (past.py) come from the rows BEFORE i of the same segment: log-weights of hedges with
fixed share (what a Bayes mixture would use); the source's NLL so far, per byte and relative to the
other sources, lately, in all and after similar text; its NLL minus its own entropy (near 0 on text it
was trained for). Row features come from the distributions at row i themselves: the source's entropy,
and whether the others agree. Label i and its log-probability are never read.

In an aligned store row features still leak something of the label: a row exists because a real source
token begins there or reaches across, which depends on the text to come. On the demo, pools score 5 %
better with them; with the entropy of the source's own row instead, which cannot leak, 0.2 %; with that
and one bit, whether the real source token reaches across, 3 %. So `asn.features: past` is the default,
and scores of pools with `all` are too good.

Shape suffixes: N positions of a shard, M sources, F features, D segments, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from fuse_train.selectors.past import OF_SOURCE, SHARED, past_features, text_classes
from store_schema.layout import Arrays, Origin, row_sums
from store_schema.text.encoded import token_lengths

PAST_FEATURES = OF_SOURCE + SHARED
"""Features from earlier rows; the first columns."""

ROW_FEATURES = (
    "entropy",
    "top_probability",
    "tail_mass",
    "agreement",
    "same_top",
    "inside",
)
"""Features from the distributions of the row itself; the last columns."""

FEATURES = PAST_FEATURES + ROW_FEATURES

HEDGE_START = "hedge_0.5_0.03"
"""Feature of the hedge that an untrained network equals."""

ENTROPY_SCALE = 4.0
"""Nats by which a row's entropy is divided."""

Floats = npt.NDArray[np.float64]


def shard_features(
    sources: Sequence[Arrays],
    token_offsets: npt.NDArray[np.int64],
    byte_ends: npt.NDArray[np.uint32],
    texts: Sequence[bytes],
) -> npt.NDArray[np.float32]:
    """Features of every row of a shard, each scaled to about 1.

    Args:
        sources: Arrays of the aligned stores for the same shard.
        token_offsets: [D+1] rows of each segment.
        byte_ends: [N] end of each token in its segment.
        texts: UTF-8 of each segment.

    Returns:
        [N, M, F] float32. Rows that a source does not cover have its past features only.
    """
    covered_NM = np.stack([np.diff(s["entry_offsets"]) > 0 for s in sources], axis=1)
    logprobs_NM = np.stack([s["label_logprobs"].astype(np.float64) for s in sources], axis=1)
    of_row_NMF = _of_row(sources, covered_NM)
    past_NMF = past_features(
        logprobs_NM,
        of_row_NMF[:, :, ROW_FEATURES.index("entropy")] * ENTROPY_SCALE,
        covered_NM,
        token_lengths(byte_ends, token_offsets),
        text_classes(texts, token_offsets, byte_ends),
        token_offsets,
    )
    return np.concatenate([past_NMF, of_row_NMF.astype(np.float32)], axis=2)


def _of_row(sources: Sequence[Arrays], covered_NM: npt.NDArray[np.bool_]) -> Floats:
    """The features [N, M, F-P] of the row's own distributions."""
    num_rows, num_sources = covered_NM.shape
    out = np.zeros((num_rows, num_sources, len(ROW_FEATURES)))
    tops = []
    for m, arrays in enumerate(sources):
        offsets, logprobs = arrays["entry_offsets"], arrays["entry_logprobs"].astype(np.float64)
        first = offsets[:-1][covered_NM[:, m]]
        top_id = np.full(num_rows, -1, np.int64)
        top_id[covered_NM[:, m]] = arrays["entry_ids"][first]
        tops.append(top_id)
        tail = arrays["tail_mass"].astype(np.float64)
        floored = logprobs.clip(min=PROBABILITY_FLOOR)  # an entry of no probability adds nothing
        entropy = -row_sums(np.exp(floored) * floored, offsets)
        entropy -= tail * np.log(np.where(tail > 0, tail, 1.0))
        out[:, m, 0] = entropy / ENTROPY_SCALE
        out[covered_NM[:, m], m, 1] = np.exp(logprobs[first])
        out[:, m, 2] = tail
        out[:, m, 5] = arrays["origin"] == Origin.INSIDE
    others_NM = covered_NM.sum(1, keepdims=True) - covered_NM
    for other, arrays in enumerate(sources):
        rows_E = np.repeat(np.arange(num_rows), np.diff(arrays["entry_offsets"]))
        for m in range(num_sources):
            if m == other:
                continue
            hits = np.flatnonzero(arrays["entry_ids"] == tops[m][rows_E])
            out[rows_E[hits], m, 3] += np.exp(arrays["entry_logprobs"][hits])
            out[:, m, 4] += (tops[m] == tops[other]) & covered_NM[:, m]
    out[:, :, 3:5] /= np.maximum(others_NM, 1)[..., None]
    return out * covered_NM[..., None]
