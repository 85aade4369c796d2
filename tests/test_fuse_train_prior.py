"""Priors of domains: equal to a plain loop, of the training split alone, in the features."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_train.data.domain_prior import DomainPrior
from fuse_train.inputs import open_inputs
from fuse_train.selectors.asn import SharedScorer
from fuse_train.selectors.features import FEATURES, HEDGE_START
from fuse_train.selectors.hedge import log_weights
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.past import HEDGE_SCALE
from fuse_train.selectors.prior import RATE, ROUNDS, domain_priors
from fuse_train.selectors.selectors import covered_softmax
from store_schema.store.reader import StoreReader
from tests.aligned_factory import make_run
from tests.selector_views import made_sources, view_of


def plain_weights(nats, start) -> list[float]:
    """EM on a list of segments, one by one."""
    weights = list(start)
    for _ in range(ROUNDS):
        counts = [len(start) * p for p in start]
        for segment in nats:
            best = min(segment)
            parts = [w * np.exp(RATE * (best - n)) for w, n in zip(weights, segment, strict=True)]
            counts = [c + p / sum(parts) for c, p in zip(counts, parts, strict=True)]
        weights = [c / (len(nats) + len(start)) for c in counts]
    return weights


@given(st.integers(0, 12), st.integers(2, 4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_priors_equal_a_plain_loop(num_segments, num_sources, seed) -> None:
    rng = np.random.default_rng(seed)
    nats_SM = rng.exponential(rng.choice([0.5, 50.0, 5000.0]), (num_segments, num_sources))
    domains_S = rng.integers(0, 3, num_segments)
    got = domain_priors(nats_SM, domains_S, 3)
    everything = plain_weights(nats_SM.tolist(), [1 / num_sources] * num_sources)
    for domain in range(3):
        want = plain_weights(nats_SM[domains_S == domain].tolist(), everything)
        np.testing.assert_allclose(got[domain], want, rtol=1e-9)
    np.testing.assert_allclose(got.sum(1), 1)
    assert (got > 0).all()


def test_the_best_source_of_a_domain_has_most_of_its_prior() -> None:
    better, worse = np.full(200, 3.0), np.full(200, 9.0)
    nats_SM = np.concatenate([np.stack([better, worse], 1), np.stack([worse, better], 1)])
    priors = domain_priors(nats_SM, np.repeat([0, 1], 200), 3)
    assert priors[0, 0] > 0.95
    assert priors[1, 1] > 0.95
    assert priors[2].tolist() == pytest.approx([0.5, 0.5])  # no segment: as all text
    # One segment is no reason to leave the others out.
    assert domain_priors(nats_SM[:1], np.array([0]), 1)[0, 1] > 0.2


def test_untrained_asn_begins_with_the_prior() -> None:
    rate, share = map(float, HEDGE_START.removeprefix("prior_hedge_").split("_"))
    prior = np.random.default_rng(0).dirichlet(np.ones(3))
    seen = view_of(made_sources(12, 3, 2), prior.tolist())
    logs_SBTM = log_weights(
        seen.past_logprobs_BTM, rate=rate, shares=(share,), prior_BM=torch.from_numpy(prior)[None]
    )
    want_BTM = covered_softmax(logs_SBTM[0], seen.covered_BTM)
    torch.testing.assert_close(SharedScorer(AsnSection(cut="none"))(seen), want_BTM)


def test_the_prior_is_of_the_training_split_and_in_the_features(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    section = run.sections["train"]
    valid = open_inputs(run, section, split="valid").samples
    plan, stores = valid.plan, valid.stores
    segments, nats = [], []
    for shard in plan.splits()["train"]:
        read = [reader.read(shard.index) for reader in stores.values()]
        labels = np.stack([arrays["label_logprobs"] for arrays in read], 1).astype(float)
        labels[np.isnan(labels).any(1)] = 0.0
        offsets = read[0]["token_offsets"]
        nats += [-labels[a:b].sum(0) for a, b in pairwise(offsets)]
        segments += plan.segments(shard)
    domains = sorted({segment.domain for segment in segments})
    numbers = np.array([domains.index(segment.domain) for segment in segments])
    want = domain_priors(np.array(nats), numbers, len(domains))
    shard = valid.load(0, with_sources=True)
    rows = [domains.index(segment.domain) for segment in shard.segments]
    np.testing.assert_allclose(valid.prior.of(shard.segments), want[rows], rtol=1e-6)
    assert shard.features_NMF is not None
    column = shard.features_NMF[shard.token_offsets[:-1], :, FEATURES.index("prior")]
    np.testing.assert_allclose(column, np.log(want[rows]) / HEDGE_SCALE, rtol=1e-5)


def test_shards_that_a_source_lacks_are_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, shards={"train": 2, "valid": 1})
    inputs = open_inputs(run, run.sections["train"])
    plan, stores = inputs.plan, inputs.samples.stores
    (first, second) = plan.splits()["train"]
    name = next(iter(stores))
    commit = next(Path(stores[name].location.url).glob(f"commits/{second.index:05d}*"))
    commit.unlink()
    partial = stores | {name: StoreReader.open(stores[name].location)}
    segments = plan.segments(first)
    found = DomainPrior(plan, partial, "train").of(segments)
    alone = _only(plan, first)
    np.testing.assert_array_equal(found, DomainPrior(alone, stores, "train").of(segments))
    for shard in Path(stores[name].location.url).glob("commits/*"):
        shard.unlink()
    none = stores | {name: StoreReader.open(stores[name].location)}
    equal = DomainPrior(plan, none, "train").of(segments)
    assert np.unique(equal).tolist() == [1 / len(stores)]


def _only(plan, shard):
    """The plan with one shard of the training split."""

    class Only:
        def __getattr__(self, key):
            return getattr(plan, key)

        def splits(self):
            return {"train": [shard]}

    return Only()


def test_one_source_needs_no_prior(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    inputs = open_inputs(run, run.sections["train"])
    one = dict([next(iter(inputs.samples.stores.items()))])
    segments = inputs.plan.segments(inputs.samples.shards[0])
    assert (DomainPrior(inputs.plan, one, "train").of(segments) == 1).all()
