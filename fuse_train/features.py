"""What a selector may look at: figures of each source at each row that do not hold the row's label.

Row i's figures come from the rows BEFORE i of the same segment (how well the source has predicted
them, per byte) and from the distributions at row i themselves (how sure the source is, whether the
others agree). The log-probability of label i, and label i, are never read.

One caveat of the data, not of this file: an aligned distribution is corrected at its own label (the
chain product of design.md, Align 2) and exists only where boundaries meet, so its entropy and tail
are not wholly ignorant of the label. `asn.features: past` leaves them out.

Shape suffixes: N positions of a shard, M sources, F features, D segments, T rows, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from store_schema.layout import Arrays, Origin, row_sums

PAST_FEATURES = (
    "nats_per_byte",
    "recent_nats_per_byte",
    "advantage",
    "recent_advantage",
    "coverage",
    "log_row",
)
"""From the rows before; the first columns."""

ROW_FEATURES = (
    "entropy",
    "top_probability",
    "tail_mass",
    "agreement",
    "same_top",
    "inside",
)
"""From the distributions of the row itself; the other columns."""

FEATURES = PAST_FEATURES + ROW_FEATURES

DECAY = 0.7
"""Weight that a row keeps after one more row, in the recent figures: about three rows count."""

Floats = npt.NDArray[np.float64]


def shard_features(
    sources: Sequence[Arrays],
    token_offsets: npt.NDArray[np.int64],
    byte_ends: npt.NDArray[np.uint32],
) -> npt.NDArray[np.float32]:
    """Features of every row of a shard, each scaled to about 1.

    Args:
        sources: Arrays of the aligned stores for the same shard.
        token_offsets: [D+1] rows of each segment.
        byte_ends: [N] end of each token in its segment.

    Returns:
        [N, M, F] float32. Rows that a source does not cover have its past features only.
    """
    num_rows = len(byte_ends)
    covered_NM = np.stack([np.diff(s["entry_offsets"]) > 0 for s in sources], axis=1)
    features = np.zeros((num_rows, len(sources), len(FEATURES)), np.float32)
    nats_NM = -np.stack([s["label_logprobs"].astype(np.float64) for s in sources], axis=1)
    bytes_N = token_bytes(token_offsets, byte_ends).astype(np.float64)
    features[:, :, : len(PAST_FEATURES)] = _past(nats_NM, covered_NM, bytes_N, token_offsets)
    features[:, :, len(PAST_FEATURES) :] = _of_row(sources, covered_NM)
    return features


def token_bytes(
    token_offsets: npt.NDArray[np.int64], byte_ends: npt.NDArray[np.uint32]
) -> npt.NDArray[np.int64]:
    """[N] bytes of each token, from ends that start anew in each segment."""
    sizes = np.diff(byte_ends.astype(np.int64), prepend=0)
    starts = token_offsets[:-1][np.diff(token_offsets) > 0]
    sizes[starts] = byte_ends[starts]
    return sizes


def _past(
    nats_NM: Floats,
    covered_NM: npt.NDArray[np.bool_],
    bytes_N: Floats,
    token_offsets: npt.NDArray[np.int64],
) -> Floats:
    """The past features [N, M, P]: sums over the earlier rows of the segment."""
    known_NM = ~np.isnan(nats_NM)
    nats_NM = np.where(known_NM, nats_NM, 0.0)
    known_bytes_NM = np.where(known_NM, bytes_N[:, None], 0.0)
    # Against the mean of the sources that know the label: a row that few know favours nobody.
    mean_N1 = nats_NM.sum(1, keepdims=True) / np.maximum(known_NM.sum(1, keepdims=True), 1)
    gain_NM = np.where(known_NM, mean_N1 - nats_NM, 0.0)
    parts_NMX = np.stack([nats_NM, known_bytes_NM, gain_NM, covered_NM], axis=2)
    total_NMX = _sums_before(parts_NMX, token_offsets, 1.0)
    recent_NMX = _sums_before(parts_NMX[:, :, :3], token_offsets, DECAY)
    lengths = np.diff(token_offsets)
    row_N = np.arange(len(nats_NM)) - np.repeat(token_offsets[:-1], lengths)
    return np.stack(
        [
            total_NMX[..., 0] / np.maximum(total_NMX[..., 1], 1.0),
            recent_NMX[..., 0] / np.maximum(recent_NMX[..., 1], 1.0),
            _signed_log(total_NMX[..., 2]) / 2,
            _signed_log(recent_NMX[..., 2]) / 2,
            total_NMX[..., 3] / np.maximum(row_N, 1)[:, None],
            np.broadcast_to(np.log1p(row_N)[:, None] / 6, nats_NM.shape),
        ],
        axis=2,
    )


def _signed_log(nats: Floats) -> Floats:
    """Compressed, not cut: over a segment sources end hundreds of nats apart."""
    size: Floats = np.log1p(np.abs(nats))
    return np.copysign(size, nats)


def _sums_before(values_NMX: Floats, token_offsets: npt.NDArray[np.int64], decay: float) -> Floats:
    """Sum over the earlier rows of the segment, each fading by `decay` per row; row i is left out."""
    lengths = np.diff(token_offsets)
    sums = np.zeros_like(values_NMX)
    state = np.zeros((len(lengths), *values_NMX.shape[1:]))
    for row in range(int(lengths.max(initial=0))):
        alive = np.flatnonzero(lengths > row)
        at = token_offsets[alive] + row
        sums[at] = state[alive]
        state[alive] = state[alive] * decay + values_NMX[at]
    return sums


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
        entropy = -row_sums(np.exp(logprobs) * logprobs, offsets)
        entropy -= tail * np.log(np.where(tail > 0, tail, 1.0))
        out[:, m, 0] = entropy / 4
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
