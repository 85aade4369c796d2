"""Weights and pools by spans wherever they are used: sources whose tokens reach over several rows."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_train.config import TrainSection
from fuse_train.data.batch import collate
from fuse_train.data.stream import SampleStream, StreamOptions
from fuse_train.inputs import open_inputs
from fuse_train.loop.figures import COLLAPSE_SHARE, COLLAPSE_STEPS, CollapseWatch
from fuse_train.loop.objective import FusionObjective, StepTotals
from fuse_train.selector_fit.selector_training import (
    known_rows,
    new_selector,
    pool_nll,
    train_selector,
)
from fuse_train.selectors.asn import SharedScorer
from fuse_train.selectors.by_name import by_rule, learner
from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.pools import hold_over_spans, pool_nats
from fuse_train.selectors.selectors import StaticSelector
from store_schema.layout import Origin
from tests.aligned_factory import make_run
from tests.selector_views import changed_from, made_sources, view_of
from tests.test_fuse_train_selectors import M, stirred

ROWS = 10
BY_SPAN = {
    "hedge": lambda: by_rule("hedge", rate=0.7, share=0.05),
    "asn": stirred,
    "constant": lambda: stirred("constant"),
}


def begins_of(flags: list[bool]) -> torch.Tensor:
    return torch.tensor([[True, *flags]])


@pytest.mark.parametrize("name", BY_SPAN)
@given(flags=st.lists(st.booleans(), min_size=ROWS - 1, max_size=ROWS - 1), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_weights_are_those_of_the_spans_first_row(name, flags, seed) -> None:
    view = view_of(made_sources(ROWS, M, seed))
    view = replace(view, covered_BTM=torch.ones_like(view.covered_BTM))
    selector, begins = BY_SPAN[name](), begins_of(flags)
    by_row = selector(view)
    by_span = selector(replace(view, begins_BT=begins))
    torch.testing.assert_close(by_span, hold_over_spans(by_row, begins))


@pytest.mark.parametrize("name", ["hedge", "asn"])
def test_weights_by_span_are_not_those_by_row(name) -> None:
    view = view_of(made_sources(ROWS, M, 1))
    view = replace(view, covered_BTM=torch.ones_like(view.covered_BTM))
    selector, begins = BY_SPAN[name](), begins_of([False] * (ROWS - 1))
    assert not torch.equal(selector(view), selector(replace(view, begins_BT=begins)))
    by_position = stirred(granularity="position")
    assert torch.equal(by_position(view), by_position(replace(view, begins_BT=begins)))


@pytest.mark.parametrize("name", ["hedge", "asn"])
@given(
    flags=st.lists(st.booleans(), min_size=ROWS - 1, max_size=ROWS - 1),
    row=st.integers(1, ROWS - 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_a_label_changes_no_weights_in_its_span_or_before(name, flags, row, seed) -> None:
    sources, begins = made_sources(ROWS, M, seed), begins_of(flags)
    changed = [changed_from(a, row, seed + m, row_known=True) for m, a in enumerate(sources)]
    selector = BY_SPAN[name]()
    # What is covered does not depend on labels; made-up changes of entries must not either.
    before, after = (
        selector(replace(v, begins_BT=begins, covered_BTM=torch.ones_like(v.covered_BTM)))
        for v in (view_of(sources), view_of(changed))
    )
    stop = next((t for t in range(row + 1, ROWS) if begins[0, t]), ROWS)
    assert torch.equal(before[:, :stop], after[:, :stop])


# ---- batches, training, the whole loss -------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("spans"), shards={"train": 1, "valid": 1})


@pytest.fixture(scope="module")
def opened(run):
    return open_inputs(run, run.sections["train"])


@pytest.fixture(scope="module")
def batch(opened):
    """One batch whose spans end at every third row or so."""
    options = StreamOptions(0, 8, 8, shuffle_shards=1, cache_gib=1.0)
    (found,) = SampleStream(opened.samples, options, opened.domains).step_batches(0)
    g = torch.Generator().manual_seed(3)
    begins = torch.rand(found.labels_BT.shape, generator=g) < 0.35
    begins |= found.label_bytes_BT == 0  # as collate has it beyond a segment's end
    return replace(found, sources=replace(found.sources, begins_BT=begins))


def test_a_span_begins_where_no_source_is_inside_a_token(opened) -> None:
    shard = opened.samples.load(0, with_sources=True)
    rng = np.random.default_rng(0)
    inside = [rng.random(len(shard.token_ids)) < 0.4 for _ in shard.sources]
    sources = tuple(
        arrays | {"origin": np.where(one, Origin.INSIDE, Origin.BOUNDARY).astype("|u1")}
        for arrays, one in zip(shard.sources, inside, strict=True)
    )
    changed = replace(shard, sources=sources)
    found = collate([changed.sample(i) for i in range(3)], opened.domains).sources.begins_BT
    for i in range(3):
        rows = slice(*shard.token_offsets[i : i + 2])
        expected = ~np.any([one[rows] for one in inside], axis=0)
        got = found[i, : len(expected)].numpy().copy()
        expected[0] = got[0]  # the first row begins one, whatever stands there
        assert got.tolist() == expected.tolist()


def nats_of(selector, batch, begins) -> float:
    logs = batch.sources.label_logprobs_BTM.clamp(min=PROBABILITY_FLOOR)
    with torch.no_grad():
        return float(pool_nats(selector.gates(batch.sources.view), logs, begins).sum())


def test_selectors_train_on_pools_of_spans(batch, opened) -> None:
    """The first step's loss is that of the untrained gates, by spans."""
    section = AsnSection(pretrain_steps=1)
    stream = SimpleNamespace(batches=lambda first, steps: [[batch]], samples=opened.samples)
    told: list[float] = []
    train_selector(
        stream, section, learner("asn"), seed=0, on_step=lambda _, nats: told.append(nats)
    )
    selector = new_selector(section, learner("asn"), 0)
    rows = known_rows(batch.sources)
    assert told == [pytest.approx(nats_of(selector, batch, batch.sources.begins_BT) / rows)]
    assert told != [pytest.approx(nats_of(selector, batch, None) / rows)]


def test_pools_are_scored_by_spans(batch) -> None:
    """Only spans whose labels every source knows, each with the weights of its first row."""
    sources, weights = batch.sources, [0.5, 0.3, 0.2]
    logs, begins = sources.label_logprobs_BTM.double(), sources.begins_BT
    nats = dict.fromkeys(batch.domains, 0.0)
    rows = dict.fromkeys(batch.domains, 0)
    for b, length in enumerate((batch.label_bytes_BT > 0).sum(1).tolist()):
        starts = [t for t in range(length) if t == 0 or begins[b, t]]
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            span = logs[b, start:stop].sum(0)
            if span.isnan().any() or not sources.covered_BTM[b, start].any():
                continue
            used = torch.tensor(weights) * sources.covered_BTM[b, start]
            domain = batch.domains[batch.domains_B[b]]
            nats[domain] -= float(torch.log((used / used.sum() * span.exp()).sum()))
            rows[domain] += stop - start
    found = pool_nll(StaticSelector(weights), [batch])
    assert any(stop > 1 for stop in rows.values())
    for domain, sums in found.items():
        assert sums.nats == pytest.approx(nats[domain], rel=1e-5)
        assert sums.num_rows == rows[domain]


def test_the_targets_training_counts_pools_of_spans(batch, run) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.target.model)
    selector = SharedScorer(AsnSection())
    objective = FusionObjective(model, selector, TrainSection(feedback_weight=0.0))
    totals = StepTotals(batch.num_labels, known_rows(batch.sources))
    _, sums = objective(batch, totals)
    at = batch.label_rows()
    logs = batch.sources.label_logprobs_BTM.clamp(min=PROBABILITY_FLOOR)
    with torch.no_grad():
        gates = selector.gates(batch.sources.view)
        by_span = pool_nats(gates, logs, batch.sources.begins_BT)[at].sum()
        by_row = pool_nats(gates, logs, None)[at].sum()
    assert float(sums["pool"]) == pytest.approx(float(by_span), rel=1e-5)
    assert float(sums["pool"]) != pytest.approx(float(by_row), rel=1e-3)


def test_rows_that_nobody_covers_are_none_of_the_pools(batch) -> None:
    sources = batch.sources
    nobody = torch.zeros_like(sources.covered_BTM)
    labels = torch.zeros_like(sources.label_logprobs_BTM)
    assert known_rows(replace(sources, covered_BTM=nobody, label_logprobs_BTM=labels)) == 0
    one = nobody.clone()
    one[0, 2, 1] = True
    assert known_rows(replace(sources, covered_BTM=one, label_logprobs_BTM=labels)) == 1


def test_a_source_that_is_hardly_heard_is_named_once(caplog) -> None:
    watch = CollapseWatch()
    with caplog.at_level(logging.WARNING):
        for _ in range(COLLAPSE_STEPS - 1):
            watch.add({"a": 1 - COLLAPSE_SHARE / 2, "b": COLLAPSE_SHARE / 2})
        assert not caplog.records
        for _ in range(3):
            watch.add({"a": 1 - COLLAPSE_SHARE / 2, "b": COLLAPSE_SHARE / 2})
    (record,) = caplog.records
    assert "hardly uses b any more" in record.getMessage()
    used = CollapseWatch()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for step in range(3 * COLLAPSE_STEPS):
            used.add({"a": 1.0, "b": 3 * COLLAPSE_SHARE if step % 2 else 0.0})
    assert not caplog.records
