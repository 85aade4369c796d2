"""Past features: how each source has done on earlier rows, all sums over the same segment.

Shape suffixes: N positions of a shard, M sources, D segments, T rows of the longest, P features, C
classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fuse_train.selectors.hedge import PROBABILITY_FLOOR, log_weights, past_of

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

HEDGES = ((1.0, 1e-3), (1.0, 1e-2), (1.0, 1e-1), (0.5, 1e-2), (0.5, 3e-2), (0.5, 1e-1))
"""Rate and share of each hedge. The share is about once in a long segment, in a hundred rows, in ten;
half the rate of a Bayes mixture is better where no source is the true one."""

PRIOR_HEDGES = ((0.5, 3e-2), (1.0, 1e-2))
"""Of hedges that begin with the prior of the segment's domain (prior.py)."""

HEDGE_SCALE = 4.0
"""Nats by which the hedges' log-weights are divided."""

DECAYS = (0.7, 0.95)
"""Factors per row of exponentially decaying sums: windows of about 3 and 20 rows."""

CLASS_DECAYS = (0.5, 0.9)
"""The same for sums over rows of one class."""

LAGS = 3
"""Number of last rows whose figures are features by themselves."""

CLASSES = (
    *("start", "newline", "space", "digit", "lower", "upper", "quote", "opening", "closing"),
    *("stop", "operator", "other"),
)
"""Classes of the last byte before a row; bytes beyond ASCII are lower, since most are letters."""

OF_SOURCE = (
    *(f"hedge_{rate:g}_{share:g}" for rate, share in HEDGES),
    *(f"prior_hedge_{rate:g}_{share:g}" for rate, share in PRIOR_HEDGES),
    "prior",
    "nats_per_byte",
    *(f"nats_per_byte_{decay:g}" for decay in DECAYS),
    "advantage",
    *(f"advantage_{decay:g}" for decay in DECAYS),
    *(f"surplus_{decay:g}" for decay in DECAYS),
    *(f"class_advantage_{decay:g}" for decay in CLASS_DECAYS),
    *(f"nats_{lag}_before" for lag in range(1, LAGS + 1)),
    *(f"advantage_{lag}_before" for lag in range(1, LAGS + 1)),
    "coverage",
)
"""Features that differ from source to source."""

SHARED = ("log_row", "class_rows", *(f"after_{name}" for name in CLASSES))
"""Features that are the same for all sources: where in the text the row is."""


def _class_table() -> Integers:
    table = np.full(256, CLASSES.index("lower"))
    groups = {
        "newline": "\n", "space": " \t\r\f\v", "digit": "0123456789",
        "upper": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "quote": "\"'`", "opening": "([{<",
        "closing": ")]}>", "stop": ".,;:!?", "operator": "=+-*/%&|^~",
    }  # fmt: skip
    for byte in range(128):
        if not (chr(byte).islower() or chr(byte) == "_"):
            table[byte] = CLASSES.index("other")
    for name, characters in groups.items():
        table[[ord(c) for c in characters]] = CLASSES.index(name)
    return table


_CLASS_OF_BYTE = _class_table()


def text_classes(
    texts: Sequence[bytes], token_offsets: Integers, byte_ends: npt.NDArray[np.uint32]
) -> Integers:
    """Class [N] of the last byte before each row, in `CLASSES`.

    Args:
        texts: UTF-8 of each segment.
        token_offsets: [D+1] rows of each segment.
        byte_ends: [N] end of each token in its segment.
    """
    classes = np.zeros(len(byte_ends), np.int64)
    for text, start, stop in zip(texts, token_offsets[:-1], token_offsets[1:], strict=True):
        if stop == start or not text:
            continue
        begins = np.concatenate([[0], byte_ends[start : stop - 1].astype(np.int64)])
        last = np.frombuffer(text, np.uint8)[(begins - 1).clip(0, len(text) - 1)]
        classes[start:stop] = np.where(begins > 0, _CLASS_OF_BYTE[last], CLASSES.index("start"))
    return classes


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a shard as [T, D] and back; rows beyond a segment's end are padding.

    Args:
        at_TD: Row of the shard.
        real_TD: Whether there is one.
    """

    at_TD: Integers
    real_TD: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, token_offsets: Integers) -> Rows:
        """The rows of a shard's segments."""
        lengths = np.diff(token_offsets)
        row_T1 = np.arange(int(lengths.max(initial=0)))[:, None]
        real_TD = row_T1 < lengths
        return cls(np.where(real_TD, token_offsets[:-1] + row_T1, 0), real_TD)

    def spread(self, values: npt.NDArray[np.generic], fill: float = 0.0) -> Floats:
        """[N, ...] to [T, D, ...] float64."""
        out = np.full((*self.real_TD.shape, *values.shape[1:]), fill)
        out[self.real_TD] = values[self.at_TD[self.real_TD]]
        return out

    def gather(self, values: Floats) -> Floats:
        """[T, D, ...] to [N, ...]."""
        out = np.zeros((int(self.real_TD.sum()), *values.shape[2:]))
        out[self.at_TD[self.real_TD]] = values[self.real_TD]
        return out


def past_features(
    logprobs_NM: Floats,
    entropy_NM: Floats,
    covered_NM: npt.NDArray[np.bool_],
    bytes_N: Integers,
    classes_N: Integers,
    token_offsets: Integers,
    prior_DM: Floats,
) -> npt.NDArray[np.float32]:
    """Features [N, M, P] of `OF_SOURCE` and `SHARED`, each scaled to about 1.

    Args:
        logprobs_NM: Log-probabilities of the labels, nats, NaN where not known.
        entropy_NM: Entropy of the distributions, nats.
        covered_NM: Whether the source has a distribution of the row.
        bytes_N: Bytes of each token.
        classes_N: From `text_classes`.
        token_offsets: [D+1] rows of each segment.
        prior_DM: Weights of the sources before a segment begins.
    """
    rows = Rows.of(token_offsets)
    known_NM = ~np.isnan(logprobs_NM)
    nats_NM = -np.where(known_NM, logprobs_NM, 0.0).clip(min=PROBABILITY_FLOOR)
    # Relative to the sources that know the label, so that a row that few know favours none.
    mean_N1 = nats_NM.sum(1, keepdims=True) / np.maximum(known_NM.sum(1, keepdims=True), 1)
    gain_NM = np.where(known_NM, mean_N1 - nats_NM, 0.0)
    judged_NM = known_NM & covered_NM
    surplus_NM = np.where(judged_NM, nats_NM - entropy_NM, 0.0)
    known_bytes_NM = np.where(known_NM, bytes_N[:, None], 0)
    parts_NMX = np.stack(
        [nats_NM, known_bytes_NM, gain_NM, surplus_NM, judged_NM, covered_NM], axis=2
    )
    parts_TDMX = rows.spread(parts_NMX)
    sums_K = [sums_before(parts_TDMX, decay) for decay in (1.0, *DECAYS)]
    nats, size, gain, surplus, judged, covered = np.moveaxis(np.stack(sums_K), -1, 0)
    row_T = np.arange(len(parts_TDMX))
    classes_TD = rows.spread(classes_N).astype(np.int64)
    by_class_TDMK, count_TD = sums_of_class(parts_TDMX[..., 2], classes_TD, CLASS_DECAYS)
    shape = gain.shape[1:]
    columns = [
        *(logs / HEDGE_SCALE for logs in _hedges(rows.spread(logprobs_NM), prior_DM)),
        np.broadcast_to(np.log(prior_DM) / HEDGE_SCALE, shape),
        *(nats / np.maximum(size, 1.0)),
        *(signed_log(gain) / 2),
        *(surplus[1:] / np.maximum(judged[1:], 1.0)),
        *(signed_log(np.moveaxis(by_class_TDMK, -1, 0)) / 2),
        *(lagged(parts_TDMX[..., 0], lag) / 4 for lag in range(1, LAGS + 1)),
        *(signed_log(lagged(parts_TDMX[..., 2], lag)) for lag in range(1, LAGS + 1)),
        covered[0] / np.maximum(row_T, 1)[:, None, None],
        np.broadcast_to(np.log1p(row_T)[:, None, None] / 6, shape),
        np.broadcast_to(np.log1p(count_TD)[..., None] / 4, shape),
        *(np.broadcast_to((classes_TD == c)[..., None], shape) for c in range(len(CLASSES))),
    ]
    out = np.empty((*logprobs_NM.shape, len(columns)), np.float32)
    at_N = rows.at_TD[rows.real_TD]
    for index, column in enumerate(columns):
        out[at_N, :, index] = column[rows.real_TD]
    return out


def sums_before(values_TDX: Floats, decay: float) -> Floats:
    """Sum over earlier rows, decaying by the factor `decay` per row; without the row itself."""
    out = np.zeros_like(values_TDX)
    for row in range(1, len(out)):
        np.multiply(out[row - 1], decay, out=out[row])
        out[row] += values_TDX[row - 1]
    return out


def sums_of_class(
    values_TDM: Floats, classes_TD: Integers, decays: Sequence[float]
) -> tuple[Floats, Floats]:
    """Decaying sums [T, D, M, K] over earlier rows of the row's class, and their count [T, D]."""
    num_rows, num_segments, num_sources = values_TDM.shape
    fade_K = np.asarray(decays)
    out = np.zeros((*values_TDM.shape, len(fade_K)))
    count_TD = np.zeros((num_rows, num_segments))
    state = np.zeros((num_segments, len(CLASSES), num_sources, len(fade_K)))
    seen_DC = np.zeros((num_segments, len(CLASSES)))
    every_D = np.arange(num_segments)
    for row in range(num_rows):
        now = (every_D, classes_TD[row])
        sums = state[now]
        out[row], count_TD[row] = sums, seen_DC[now]
        state[now] = sums * fade_K + values_TDM[row][..., None]
        seen_DC[now] += 1
    return out, count_TD


def lagged(values_TDM: Floats, lag: int) -> Floats:
    """The values of the row `lag` before; 0 where there is none."""
    out = np.zeros_like(values_TDM)
    out[lag:] = values_TDM[: max(len(out) - lag, 0)]
    return out


def signed_log(nats: Floats) -> Floats:
    """sign(x) * log(1 + |x|): over a segment sources differ by hundreds of nats."""
    size: Floats = np.log1p(np.abs(nats))
    return np.copysign(size, nats)


def _hedges(logprobs_TDM: Floats, prior_DM: Floats) -> list[Floats]:
    """Log-weights [T, D, M] of each hedge, those with a prior last."""
    past_DTM = past_of(torch.from_numpy(logprobs_TDM).transpose(0, 1))
    logs: list[Floats] = []
    for hedges, prior in ((HEDGES, None), (PRIOR_HEDGES, torch.from_numpy(prior_DM))):
        for rate in dict.fromkeys(rate for rate, _ in hedges):
            shares = [share for one, share in hedges if one == rate]
            logs_SDTM = log_weights(past_DTM, rate=rate, shares=shares, prior_BM=prior)
            logs += list(logs_SDTM.transpose(1, 2).numpy())
    return logs
