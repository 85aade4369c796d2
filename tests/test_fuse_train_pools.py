"""Pools by spans: equal to a plain loop, and a proper score that no selector can cheat."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_train.selectors.pools import (
    first_rows,
    hold_over_spans,
    label_pool_nll,
    pool_nats,
    span_sums,
)


@st.composite
def cases(draw):
    size = (draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.random(size) * (rng.random(size) < 0.8)
    total = weights.sum(-1, keepdims=True)
    weights = np.where(total > 0, weights / np.where(total > 0, total, 1), 0)
    labels = -rng.exponential(2.0, size)
    labels[rng.random(size) < 0.15] = np.nan
    return weights, labels, rng.random(size[:2]) < 0.5


@given(cases())
@settings(max_examples=150, deadline=None)
def test_pool_of_spans_equals_the_plain_loop(case) -> None:
    weights, labels, begins = case
    got = pool_nats(torch.tensor(weights), torch.tensor(labels), torch.tensor(begins))
    want = np.zeros(begins.shape)
    for b, t in np.ndindex(begins.shape):
        if t and not begins[b, t]:
            continue
        stop = t + 1
        while stop < begins.shape[1] and not begins[b, stop]:
            stop += 1
        terms = [(w, labels[b, t:stop, m].sum()) for m, w in enumerate(weights[b, t])]
        known = [(w, value) for w, value in terms if w > 0 and not math.isnan(value)]
        if known:
            mass = sum(w * math.exp(value) for w, value in known) / sum(w for w, _ in known)
            want[b, t] = -math.log(mass)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)


@given(cases())
@settings(max_examples=50, deadline=None)
def test_where_every_row_begins_a_span_it_is_row_by_row(case) -> None:
    weights, labels, begins = map(torch.tensor, case)
    rows = label_pool_nll(weights.flatten(0, 1), labels.flatten(0, 1)).view(begins.shape)
    torch.testing.assert_close(pool_nats(weights, labels, torch.ones_like(begins)), rows)
    torch.testing.assert_close(pool_nats(weights, labels, None), rows)


def test_held_and_sums() -> None:
    begins = torch.tensor([[False, False, True, False, True]])
    assert first_rows(begins).tolist() == [[0, 0, 2, 2, 4]]
    values = torch.arange(5.0)[None, :, None]
    assert hold_over_spans(values, begins).flatten().tolist() == [0, 0, 2, 2, 4]
    assert hold_over_spans(values, None) is values
    assert span_sums(values[..., 0], begins).tolist() == [[1, 0, 5, 0, 4]]


def test_hearing_who_pays_no_longer_gains_nothing() -> None:
    """Source 0 pays for its token of two rows at once, source 1 row by row."""
    labels = torch.tensor([[[-6.0, -1.0], [0.0, -3.0]]])
    cheat = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    rows = pool_nats(cheat, labels, torch.ones(1, 2, dtype=torch.bool)).sum()
    spans = pool_nats(cheat, labels, torch.tensor([[True, False]])).sum()
    assert float(rows) == 1.0  # less than any source needs for the text
    assert float(spans) == 4.0


def test_gradient_reaches_the_weights_of_first_rows_alone() -> None:
    weights = torch.full((1, 4, 2), 0.5, requires_grad=True)
    labels = torch.tensor([[[-1.0, -2.0], [-3.0, float("nan")], [-1.0, -1.5], [-1.0, -2.0]]])
    begins = torch.tensor([[True, False, True, False]])
    pool_nats(weights, labels, begins).sum().backward()
    assert weights.grad is not None
    assert bool(weights.grad.isfinite().all())
    assert bool((weights.grad[0, [1, 3]] == 0).all())
    assert weights.grad[0, 2, 0] < weights.grad[0, 2, 1]
