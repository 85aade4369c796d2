"""Selector features: right figures, and nothing of the row's own label."""

from __future__ import annotations

import numpy as np
import pytest

from fuse_train.features import (
    DECAY,
    FEATURES,
    PAST_FEATURES,
    shard_features,
    token_bytes,
)
from tests.store_factory import arrays

COLUMN = {name: i for i, name in enumerate(FEATURES)}


def two_sources(rows=(4, 0, 6)):
    """Aligned arrays of two sources over the same tokens."""
    first = arrays("aligned", rows, vocab_size=50, seed=1)
    second = arrays("aligned", rows, vocab_size=50, seed=2)
    ends = np.concatenate([np.arange(1, n + 1) * 2 for n in rows]).astype("<u4")
    return [first, second], first["token_offsets"], ends


def test_features_of_a_row_do_not_depend_on_its_label() -> None:
    """Another label at row i may change figures after row i, never at or before it."""
    sources, offsets, ends = two_sources()
    before = shard_features(sources, offsets, ends)
    for row in (0, 1, 3, 4, 9):
        for source in sources:
            kept = source["label_logprobs"].copy()
            source["label_logprobs"][row] = -7.5
            after = shard_features(sources, offsets, ends)
            assert np.array_equal(after[: row + 1], before[: row + 1])
            segment_end = 4 if row < 4 else 10
            if row + 1 < segment_end:
                assert not np.array_equal(after[row + 1 :], before[row + 1 :])
            assert np.array_equal(after[segment_end:], before[segment_end:])
            source["label_logprobs"] = kept


def test_past_figures() -> None:
    sources, offsets, ends = two_sources((5,))
    features = shard_features(sources, offsets, ends)
    nats = -np.stack([s["label_logprobs"].astype(float) for s in sources], 1)  # row 0 unknown
    row = 4
    known = nats[1:row]
    np.testing.assert_allclose(
        features[row, :, COLUMN["nats_per_byte"]], known.sum(0) / (2 * len(known)), rtol=1e-5
    )
    fade = DECAY ** np.arange(len(known))[::-1, None]
    np.testing.assert_allclose(
        features[row, :, COLUMN["recent_nats_per_byte"]],
        (known * fade).sum(0) / (2 * fade.sum()),
        rtol=1e-5,
    )
    gain = (known.mean(1, keepdims=True) - known).sum(0)
    np.testing.assert_allclose(
        features[row, :, COLUMN["advantage"]],
        np.sign(gain) * np.log1p(abs(gain)) / 2,
        rtol=1e-4,
        atol=1e-6,
    )
    assert features[0, :, : len(PAST_FEATURES)].tolist() == [[0.0] * len(PAST_FEATURES)] * 2


def test_figures_of_the_row() -> None:
    sources, offsets, ends = two_sources()
    features = shard_features(sources, offsets, ends)
    for m, source in enumerate(sources):
        other = sources[1 - m]
        for row in range(10):
            part = slice(source["entry_offsets"][row], source["entry_offsets"][row + 1])
            probs = np.exp(source["entry_logprobs"][part].astype(float))
            got = dict(zip(FEATURES, features[row, m], strict=True))
            if not len(probs):
                assert features[row, m, len(PAST_FEATURES) :].tolist() == [0.0] * 6
                continue
            tail = float(source["tail_mass"][row])
            entropy = -(probs * np.log(probs)).sum() - (tail * np.log(tail) if tail else 0.0)
            assert got["entropy"] == pytest.approx(entropy / 4, rel=1e-4)
            assert got["top_probability"] == pytest.approx(probs[0])
            assert got["tail_mass"] == pytest.approx(tail)
            assert got["inside"] == float(source["origin"][row] == 2)
            theirs = slice(other["entry_offsets"][row], other["entry_offsets"][row + 1])
            ids = other["entry_ids"][theirs].tolist()
            mine = source["entry_ids"][part][0]
            agree = 0.0
            if mine in ids:
                agree = np.exp(other["entry_logprobs"][theirs][ids.index(mine)])
            assert got["agreement"] == pytest.approx(agree)
            assert got["same_top"] == float(bool(ids) and ids[0] == mine)


def test_token_bytes_start_anew_in_each_segment() -> None:
    ends = np.array([2, 5, 1, 1, 4], "<u4")
    assert token_bytes(np.array([0, 2, 2, 5]), ends).tolist() == [2, 3, 1, 0, 3]


def test_empty_shard() -> None:
    sources, offsets, ends = two_sources((0,))
    assert shard_features(sources, offsets, ends).shape == (0, 2, len(FEATURES))
