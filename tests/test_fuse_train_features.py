"""Selector features: right figures, and nothing of the row's own label."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_train.selectors.features import (
    FEATURES,
    shard_features,
)
from fuse_train.selectors.hedge import log_weights, past_of
from fuse_train.selectors.past import (
    CLASS_DECAYS,
    CLASSES,
    DECAYS,
    HEDGE_SCALE,
    HEDGES,
    LAGS,
    OF_SOURCE,
    PRIOR_HEDGES,
    SHARED,
    text_classes,
)
from store_schema.text.encoded import token_lengths
from tests.store_factory import arrays

TEXT = b"def f(x):\n\treturn 'a' + 12 # caf\xc3\xa9 _B}; "


def two_sources(rows=(4, 0, 6), seed=1):
    """Aligned arrays of two sources over the same tokens, ends and texts of their segments."""
    first = arrays("aligned", rows, vocab_size=50, seed=seed)
    second = arrays("aligned", rows, vocab_size=50, seed=seed + 1)
    ends = np.concatenate([np.arange(1, n + 1) * 2 for n in rows]).astype("<u4")
    return [first, second], first["token_offsets"], ends, [TEXT[: 2 * n] for n in rows]


def prior_of(texts, seed=0):
    """Weights of the two sources before each segment, of sum 1."""
    return np.random.default_rng(seed).dirichlet([1, 1], len(texts))


def test_features_of_a_row_do_not_depend_on_its_label() -> None:
    """Another label at row i may change figures after row i, never at or before it."""
    sources, offsets, ends, texts = two_sources()
    prior = prior_of(texts)
    before = shard_features(sources, offsets, ends, texts, prior)
    for row in (0, 1, 3, 4, 9):
        for source in sources:
            kept = source["label_logprobs"].copy()
            source["label_logprobs"][row] = -7.5
            after = shard_features(sources, offsets, ends, texts, prior)
            assert np.array_equal(after[: row + 1], before[: row + 1])
            segment_end = 4 if row < 4 else 10
            if row + 1 < segment_end:
                assert not np.array_equal(after[row + 1 :], before[row + 1 :])
            assert np.array_equal(after[segment_end:], before[segment_end:])
            source["label_logprobs"] = kept


def signed(value: float) -> float:
    return math.copysign(math.log1p(abs(value)), value)


@given(st.lists(st.integers(0, 14), min_size=1, max_size=4), st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_past_figures_equal_plain_sums(rows, seed) -> None:
    """Every past column against its definition, row by row."""
    sources, offsets, ends, texts = two_sources(tuple(rows), seed)
    prior = prior_of(texts, seed)
    rng = np.random.default_rng(seed)
    for source in sources:
        source["label_logprobs"][rng.random(len(ends)) < 0.2] = np.nan
    got = shard_features(sources, offsets, ends, texts, prior)
    entropies = [[plain_entropy(source, row) for row in range(len(ends))] for source in sources]
    labels = np.stack([s["label_logprobs"].astype(float) for s in sources], 1)
    classes = text_classes(texts, offsets, ends)
    covered = np.stack([np.diff(s["entry_offsets"]) > 0 for s in sources], 1)
    for d, (start, stop) in enumerate(pairwise(offsets)):
        past = past_of(torch.tensor(labels[None, start:stop]))
        given_BM = torch.from_numpy(prior[d : d + 1])
        hedges = {
            f"hedge_{rate:g}_{share:g}": log_weights(past, rate=rate, shares=(share,))[0, 0]
            for rate, share in HEDGES
        }
        for rate, share in PRIOR_HEDGES:
            logs = log_weights(past, rate=rate, shares=(share,), prior_BM=given_BM)
            hedges[f"prior_hedge_{rate:g}_{share:g}"] = logs[0, 0]
        hedges["prior"] = given_BM.log().expand(len(past[0]), -1)
        for row in range(start, stop):
            for m in range(2):
                want = plain_past(entropies, labels, classes, covered, start, row, m)
                for name, logs in hedges.items():
                    want[name] = float(logs[row - start, m]) / HEDGE_SCALE
                have = dict(zip(FEATURES, got[row, m].tolist(), strict=True))
                assert set(want) == set(FEATURES)
                for name, value in want.items():
                    assert have[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def plain_entropy(source, row) -> float:
    """Nats of a row's entries and tail."""
    part = slice(source["entry_offsets"][row], source["entry_offsets"][row + 1])
    probs = np.exp(source["entry_logprobs"][part].astype(float))
    tail = float(source["tail_mass"][row]) if len(probs) else 0.0
    return -(probs * np.log(probs)).sum() - (tail * np.log(tail) if tail else 0.0)


def plain_past(entropies, labels, classes, covered, start, row, m) -> dict[str, float]:
    """Past columns of one row and source, but for the hedges."""

    def nats(i):
        return 0.0 if math.isnan(labels[i, m]) else -labels[i, m]

    def gain(i):
        known = [-v for v in labels[i] if not math.isnan(v)]
        return 0.0 if math.isnan(labels[i, m]) else sum(known) / len(known) + labels[i, m]

    def fading(values, decay):
        return sum(value * decay**age for age, value in enumerate(reversed(values)))

    before = range(start, row)
    size = [0 if math.isnan(labels[i, m]) else 2 for i in before]
    judged = [float(covered[i, m] and not math.isnan(labels[i, m])) for i in before]
    surplus = [(nats(i) - entropies[m][i]) * j for i, j in zip(before, judged, strict=True)]
    alike = [gain(i) for i in before if classes[i] == classes[row]]
    made = {
        "coverage": sum(covered[i, m] for i in before) / max(row - start, 1),
        "log_row": math.log1p(row - start) / 6,
        "class_rows": math.log1p(len(alike)) / 4,
    }
    for name, decay in (("", 1.0), *((f"_{d:g}", d) for d in DECAYS)):
        total = fading([nats(i) for i in before], decay)
        made[f"nats_per_byte{name}"] = total / max(fading(size, decay), 1)
        made[f"advantage{name}"] = signed(fading([gain(i) for i in before], decay)) / 2
        if name:
            made[f"surplus{name}"] = fading(surplus, decay) / max(fading(judged, decay), 1)
    for decay in CLASS_DECAYS:
        made[f"class_advantage_{decay:g}"] = signed(fading(alike, decay)) / 2
    for lag in range(1, LAGS + 1):
        there = row - lag >= start
        made[f"nats_{lag}_before"] = nats(row - lag) / 4 if there else 0.0
        made[f"advantage_{lag}_before"] = signed(gain(row - lag)) if there else 0.0
    return made | {f"after_{n}": float(classes[row] == c) for c, n in enumerate(CLASSES)}


def test_classes_of_the_byte_before() -> None:
    text = "a\n 1Z_'(]?=#é".encode()
    ends = np.arange(1, len(text) + 1).astype("<u4")
    named = [CLASSES[c] for c in text_classes([text], np.array([0, len(text)]), ends)]
    assert named == [
        "start", "lower", "newline", "space", "digit", "upper", "lower", "quote", "opening",
        "closing", "stop", "operator", "other", "lower",
    ]  # fmt: skip
    again = text_classes([text, b"", text], np.array([0, 2, 2, 4]), np.array([1, 2, 1, 2], "<u4"))
    assert [CLASSES[c] for c in again] == ["start", "lower", "start", "lower"]


def test_columns_have_their_places() -> None:
    assert FEATURES == OF_SOURCE + SHARED
    assert len(set(FEATURES)) == len(FEATURES)
    sources, offsets, ends, texts = two_sources()
    prior = prior_of(texts)
    shared = shard_features(sources, offsets, ends, texts, prior)[:, :, len(OF_SOURCE) :]
    assert shared.shape[2] == len(SHARED)
    assert np.array_equal(shared[:, 0], shared[:, 1])


def test_token_lengths_start_again_in_each_segment() -> None:
    ends = np.array([2, 5, 1, 1, 4], "<u4")
    assert token_lengths(ends, np.array([0, 2, 2, 5])).tolist() == [2, 3, 1, 0, 3]


def test_empty_shard() -> None:
    sources, offsets, ends, texts = two_sources((0,))
    prior = prior_of(texts)
    assert shard_features(sources, offsets, ends, texts, prior).shape == (0, 2, len(FEATURES))
