"""The ASN really learns: its pool on text it was not trained on beats every simple answer."""

from __future__ import annotations

import math

import pytest
import torch

from fuse_train.data.stream import SampleStream, StreamOptions
from fuse_train.inputs import open_inputs
from fuse_train.selector_fit.selector_training import (
    new_selector,
    pool_nll,
    split_batches,
    train_selector,
)
from fuse_train.selectors.by_name import by_rule, learner
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.selectors import StaticSelector
from tests.aligned_factory import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("selector"), segments_per_shard=24)


@pytest.fixture(scope="module")
def stream(run):
    opened = open_inputs(run, run.sections["train"])
    options = StreamOptions(0, 24, 24, shuffle_shards=4, cache_gib=1.0)
    return SampleStream(opened.samples, options, opened.domains, with_entries=False)


@pytest.fixture(scope="module")
def held_out(run):
    opened = open_inputs(run, run.sections["train"], split="test")
    return list(split_batches(opened.samples, opened.domains, batch_segments=7))


def mean_nats(selector, batches) -> float:
    sums = pool_nll(selector, batches).values()
    return sum(s.nats for s in sums) / sum(s.num_rows for s in sums)


def test_trained_pool_is_better_than_every_simple_one(stream, held_out) -> None:
    section = AsnSection(pretrain_steps=80, lr=1e-2)
    untrained = new_selector(section, learner("asn"), 0)
    history: list[float] = []
    trained = train_selector(
        stream, section, learner("asn"), seed=0, on_step=lambda _, nats: history.append(nats)
    )
    after = mean_nats(trained, held_out)
    single = [mean_nats(StaticSelector(torch.eye(3)[m].tolist()), held_out) for m in range(3)]
    # Untrained it is the hedge, which knows in addition what each source's domain is.
    hedge = mean_nats(by_rule("hedge", rate=0.5, share=0.03), held_out)
    assert mean_nats(untrained, held_out) < hedge - 0.05
    constant = train_selector(stream, section, learner("constant"), seed=0)
    assert after < hedge - 0.005
    assert after < mean_nats(untrained, held_out)
    assert after < min(single) - 0.1
    assert after < mean_nats(constant, held_out) - 0.1
    assert mean_nats(constant, held_out) < mean_nats(by_rule("uniform"), held_out) + 0.005
    assert sum(history[-10:]) < sum(history[:10])
    again = train_selector(stream, section, learner("asn"), seed=0)
    for a, b in zip(trained.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradient_reaches_every_layer(stream) -> None:
    """The public code of Fusion-X builds its network again at every loss: it never learns."""
    section = AsnSection(pretrain_steps=3)
    before = new_selector(section, learner("asn"), 0)
    after = train_selector(stream, section, learner("asn"), seed=0, feedback_weight=0.1)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_works_for_a_source_it_was_not_trained_with(run, held_out, tmp_path) -> None:
    """Trained on two sources, asked about three: the third's domain gains, the others keep."""
    two = make_run(tmp_path, sources={"code": "code", "prose": "prose"}, segments_per_shard=24)
    opened = open_inputs(two, two.sections["train"])
    options = StreamOptions(0, 24, 24, shuffle_shards=4, cache_gib=1.0)
    stream = SampleStream(opened.samples, options, opened.domains, with_entries=False)
    trained = train_selector(stream, AsnSection(pretrain_steps=60, lr=1e-2), learner("asn"), seed=0)
    pair = open_inputs(two, two.sections["train"], split="test")
    batches = list(split_batches(pair.samples, pair.domains))
    assert batches[0].sources.covered_BTM.shape[-1] == 2
    assert held_out[0].sources.covered_BTM.shape[-1] == 3

    def per_row(sums, domain) -> float:
        return sums[domain].nats / sums[domain].num_rows

    with_two, with_three = pool_nll(trained, batches), pool_nll(trained, held_out)
    assert per_row(with_three, "facts") < per_row(with_two, "facts") - 0.5
    for domain in ("code", "prose"):
        assert per_row(with_three, domain) < per_row(with_two, domain) + 0.05
    assert mean_nats(trained, held_out) < mean_nats(by_rule("uniform"), held_out)


def test_pool_sums_by_hand(held_out) -> None:
    sums = pool_nll(StaticSelector([0.5, 0.25, 0.25]), held_out)
    assert set(sums) == {"code", "prose", "facts"}
    domain, nats, rows, size, all_bytes = "prose", 0.0, 0, 0, 0
    for batch in held_out:
        known = batch.sources
        for b in range(len(batch.segment_ids)):
            if batch.domains[batch.domains_B[b]] != domain:
                continue
            for i in range(batch.labels_BT.shape[1]):
                all_bytes += int(batch.label_bytes_BT[b, i])
                logs = known.label_logprobs_BTM[b, i].tolist()
                if any(math.isnan(value) for value in logs):
                    continue
                p = [math.exp(value) for value in logs]
                nats -= math.log(0.5 * p[0] + 0.25 * p[1] + 0.25 * p[2])
                rows += 1
                size += int(batch.label_bytes_BT[b, i])
    assert sums[domain].nats == pytest.approx(nats, rel=1e-5)
    assert (sums[domain].num_rows, sums[domain].num_bytes) == (rows, size)
    assert sums[domain].all_bytes == all_bytes
    assert 0 < size < all_bytes


def test_hindsight_selectors_can_be_scored_too(held_out) -> None:
    assert mean_nats(by_rule("min_ce"), held_out) < mean_nats(by_rule("uniform"), held_out)
