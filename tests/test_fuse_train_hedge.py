"""Hedge: equal to a plain loop, and its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fuse_train.selectors.by_name import by_rule
from fuse_train.selectors.hedge import PROBABILITY_FLOOR, log_weights, past_of
from fuse_train.selectors.selectors import SourceView


def plain(past, rate: float, share: float, prior=None) -> list[list[float]]:
    """Weights of one segment's rows, one row and one source at a time."""
    num_sources = len(past[0])
    weights = prior or [1.0 / num_sources] * num_sources
    rows = []
    for i, labels in enumerate(past):
        known = [m for m in range(num_sources) if not math.isnan(labels[m])]
        if known:
            # The largest gain is taken out first: exp(-1000) would be 0 for every source.
            top = max(labels[m] for m in known)
            gain = {m: math.exp(rate * (labels[m] - top)) for m in known}
            awake = sum(weights[m] for m in known)
            mixed = sum(weights[m] * gain[m] for m in known) / awake
            weights = [w * gain.get(m, mixed) for m, w in enumerate(weights)]
            total = sum(weights)
            weights = [w / total for w in weights]
        if i and num_sources > 1 and prior:
            part = min(1.0, share * num_sources / (num_sources - 1))
            weights = [(1 - part) * w + part * p for w, p in zip(weights, prior, strict=True)]
        elif i and num_sources > 1:
            weights = [
                (1 - share) * w + share * sum(o for j, o in enumerate(weights) if j != m)
                / (num_sources - 1)
                for m, w in enumerate(weights)
            ]  # fmt: skip
        rows.append(weights)
    return rows


@st.composite
def pasts(draw):
    num_rows, num_sources = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = -rng.exponential(draw(st.sampled_from([0.1, 3.0, 30.0])), (num_rows, num_sources))
    labels[rng.random(labels.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = np.nan
    return labels


@given(pasts(), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.0, 1e-3, 0.1, 0.9]))
@settings(max_examples=150, deadline=None)
def test_equals_the_plain_loop(labels, rate, share) -> None:
    past = past_of(torch.tensor(labels)[None])
    got = log_weights(past, rate=rate, shares=(share,))[0, 0].exp()
    want = plain(past[0].tolist(), rate, share)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-250)


@given(
    pasts(),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from([0.0, 1e-3, 0.1, 0.9]),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_with_a_prior_it_equals_the_plain_loop(labels, rate, share, seed) -> None:
    past = past_of(torch.tensor(labels)[None])
    prior = np.random.default_rng(seed).dirichlet(np.ones(labels.shape[1]), 1)
    given_BM = torch.from_numpy(prior)
    got = log_weights(past, rate=rate, shares=(share,), prior_BM=given_BM)[0, 0].exp()
    want = plain(past[0].tolist(), rate, share, prior[0].tolist())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-250)


@given(pasts(), st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 1e-3, 0.1]))
@settings(max_examples=100, deadline=None)
def test_an_equal_prior_is_none(labels, rate, share) -> None:
    past = past_of(torch.tensor(labels)[None])
    num_sources = labels.shape[1]
    assume(num_sources == 1 or share * num_sources / (num_sources - 1) <= 1)
    equal = torch.full((1, num_sources), 1 / num_sources, dtype=torch.float64)
    got = log_weights(past, rate=rate, shares=(share,), prior_BM=equal).exp()
    want = log_weights(past, rate=rate, shares=(share,)).exp()
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-9, atol=1e-250)


def test_segments_and_shares_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    past = past_of(torch.tensor(-rng.exponential(2.0, (4, 9, 3))))
    past[1, 3] = torch.nan
    past[2, 5, 1] = torch.nan
    both = log_weights(past, shares=(0.0, 0.05))
    for b in range(4):
        for s, share in enumerate((0.0, 0.05)):
            alone = log_weights(past[b : b + 1], shares=(share,))[0, 0]
            torch.testing.assert_close(both[s, b], alone)


def nats(labels, weights) -> float:
    return float(-(np.log((np.exp(labels) * weights).sum(-1))).sum())


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_bayes_mixture_is_the_mean_of_the_sources_likelihoods(seed, num_sources, num_rows) -> None:
    """With rate 1 and no share the pool's probability of a segment is the sources' mean."""
    labels = -np.random.default_rng(seed).exponential(1.0, (num_rows, num_sources))
    weights = log_weights(past_of(torch.tensor(labels)[None]))[0, 0].exp().numpy()
    mean = math.log(num_sources) - np.logaddexp.reduce(labels.sum(0))
    assert nats(labels, weights) == pytest.approx(mean, rel=1e-9)
    assert nats(labels, weights) <= -labels.sum(0).max() + math.log(num_sources) + 1e-9


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(4, 60), st.floats(1e-3, 0.5))
@settings(max_examples=60, deadline=None)
def test_regret_of_one_switch_is_bounded(seed, num_sources, num_rows, share) -> None:
    rng = np.random.default_rng(seed)
    labels = -rng.exponential(2.0, (num_rows, num_sources))
    first, second = rng.choice(num_sources, 2, replace=False)
    switch = int(rng.integers(1, num_rows))
    best = -labels[:switch, first].sum() - labels[switch:, second].sum()
    past = past_of(torch.tensor(labels)[None])
    weights = log_weights(past, shares=(share,))[0, 0].exp().numpy()
    regret = math.log(num_sources) + math.log(num_sources - 1) - math.log(share)
    regret -= (num_rows - 2) * math.log(1 - share)
    assert nats(labels, weights) <= best + regret + 1e-9


def test_a_source_can_come_back_only_with_a_share() -> None:
    labels = np.full((60, 2), -0.1)
    labels[:30, 1] = -40.0
    labels[30:, 0] = -40.0
    past = past_of(torch.tensor(labels)[None])
    logs = log_weights(past, shares=(0.0, 0.01))[:, 0]
    assert logs[0, 40, 1] < -700  # exp of it would be 0: kept as a logarithm
    assert logs[1, 33, 1].exp() > 0.98
    impossible = past_of(torch.tensor([[[-math.inf, -1.0]]] * 1).repeat(1, 3, 1))
    bounded = log_weights(impossible)[0, 0]
    assert bool(bounded.isfinite().all())
    assert bounded[2, 0] == pytest.approx(2 * PROBABILITY_FLOOR + 2, rel=1e-6)


def test_hedge_selector_takes_its_rates_and_leaves_out_who_does_not_cover() -> None:
    rng = np.random.default_rng(1)
    labels = torch.tensor(-rng.exponential(1.0, (2, 6, 3)))
    covered = torch.tensor(rng.random((2, 6, 3)) < 0.6)
    covered[..., 0] = True
    seen = SourceView(covered, torch.zeros(2, 6, 3, 1), torch.ones(2, 3), past_of(labels))
    got = by_rule("hedge", rate=0.5, share=0.02)(seen)
    want = log_weights(past_of(labels), rate=0.5, shares=(0.02,))[0].exp() * covered
    torch.testing.assert_close(got.double(), want / want.sum(-1, keepdim=True))
