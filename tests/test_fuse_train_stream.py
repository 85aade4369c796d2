"""Sample order, the one shift, and batches: pure functions of seed and plan."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse_train.data.batch import predicting_positions
from fuse_train.data.order import SampleOrder, SampleRef, process_slice
from fuse_train.data.samples import AlignedSamples
from fuse_train.data.stream import SampleStream, StreamOptions
from fuse_train.inputs import open_inputs
from fuse_train.selector_fit.selector_start import pretrain_stream
from fuse_train.selectors.features import FEATURES
from store_schema.errors import (
    ConfigError,
    CorruptionError,
    InputError,
    MismatchError,
    MissingError,
)
from store_schema.plan.plan import Plan
from store_schema.text.tokenizer import SegmentTokenizer
from tests.aligned_factory import make_run
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def inputs(run):
    return open_inputs(run, run.sections["train"])


def options(**changes) -> StreamOptions:
    given = {
        "seed": 0,
        "batch_segments": 8,
        "micro_batch_segments": 8,
        "shuffle_shards": 2,
        "cache_gib": 1.0,
    }
    return StreamOptions(**(given | changes))


def test_the_one_shift() -> None:
    """Row i meets the logits of the token before it; a first token without context meets none."""
    assert predicting_positions([0], [4]).tolist() == [[-1, 0, 1, 2]]
    assert predicting_positions([1], [3]).tolist() == [[0, 1, 2]]
    assert predicting_positions([3, 1], [2, 4]).tolist() == [[2, 3, -1, -1], [0, 1, 2, 3]]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.integers(0, 2**31 - 1),
    st.integers(1, 5),
)
def test_every_epoch_has_every_sample_once(sizes, seed, window) -> None:
    order = SampleOrder(sizes, seed=seed, window_shards=window)
    every = {SampleRef(i, j) for i, size in enumerate(sizes) for j in range(size)}
    for epoch in (0, 1):
        epoch_samples = order.samples(epoch * len(order), len(order))
        assert len(epoch_samples) == len(order)
        assert set(epoch_samples) == every


@given(st.integers(0, 200), st.integers(0, 40))
def test_order_is_found_at_any_position(start, count) -> None:
    whole = SampleOrder([5, 3, 8, 1], seed=3, window_shards=2).samples(0, 240)
    fresh = SampleOrder([5, 3, 8, 1], seed=3, window_shards=2)
    assert fresh.samples(start, count) == whole[start : start + count]


def test_windows_bound_the_shards_in_use() -> None:
    order = SampleOrder([4] * 20, seed=0, window_shards=3)
    for start in range(0, 72, 12):
        assert len({ref.shard for ref in order.samples(start, 12)}) == 3
    assert order.samples(0, 80) != order.samples(80, 80)
    assert order.samples(0, 80) != SampleOrder([4] * 20, seed=1, window_shards=3).samples(0, 80)


@given(st.integers(1, 64), st.integers(1, 8))
def test_processes_share_a_batch_without_gap_or_overlap(size, count) -> None:
    parts = [list(range(size))[process_slice(size, i, count)] for i in range(count)]
    assert [x for part in parts for x in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def batch_ids(stream, step) -> list[str]:
    return [name for batch in stream.step_batches(step) for name in batch.segment_ids]


def test_order_does_not_depend_on_processes_or_micro_batches(inputs) -> None:
    whole = SampleStream(inputs.samples, options(), inputs.domains)
    for count in (1, 3):
        for micro in (1, 3):
            parts = [
                SampleStream(
                    inputs.samples,
                    options(micro_batch_segments=micro),
                    inputs.domains,
                    process=(i, count),
                    cache=whole.cache,
                )
                for i in range(count)
            ]
            for step in (0, 5, 9):
                together = [name for part in parts for name in batch_ids(part, step)]
                assert sorted(together) == sorted(batch_ids(whole, step))


def test_prefetching_changes_nothing_and_ends_its_thread(inputs) -> None:
    import threading

    plain = SampleStream(inputs.samples, options(), inputs.domains)
    ahead = SampleStream(inputs.samples, options(prefetch_batches=2), inputs.domains)
    for expected, got in zip(plain.batches(3, 8), ahead.batches(3, 8), strict=True):
        assert torch.equal(expected[0].input_ids_BL, got[0].input_ids_BL)
    stopped = ahead.batches(0, 100)
    next(stopped)
    stopped.close()
    assert not [t for t in threading.enumerate() if t.name == "batches"]


def test_errors_of_the_prefetching_thread_are_told(inputs, monkeypatch) -> None:
    stream = SampleStream(inputs.samples, options(prefetch_batches=1), inputs.domains)

    def broken(step):
        raise CorruptionError("bad", where=f"step {step}")

    monkeypatch.setattr(stream, "step_batches", broken)
    with pytest.raises(CorruptionError, match="step 4"):
        list(stream.batches(4, 6))


def test_batch_holds_what_the_stores_hold(inputs) -> None:
    """Every figure of a batch, traced back to its store by segment and row."""
    stream = SampleStream(inputs.samples, options(), inputs.domains)
    (batch,) = stream.step_batches(1)
    sources = batch.sources
    refs = {r: stream.sample(r) for r in stream.step_refs(1)}
    by_name = {s.segment.segment_id: s for s in refs.values()}
    for b, name in enumerate(batch.segment_ids):
        sample = by_name[name]
        n, context = sample.num_tokens, len(sample.context_ids)
        assert context == 1
        fed = batch.input_ids_BL[b, : context + n - 1].tolist()
        assert fed == [*sample.context_ids, *sample.labels[:-1].tolist()]
        assert batch.labels_BT[b, :n].tolist() == sample.labels.tolist()
        assert int(batch.label_bytes_BT[b].sum()) == len(sample.segment.text.encode())
        assert batch.domains[batch.domains_B[b]] == sample.segment.domain
        assert bool((batch.predicted_by_BT[b, n:] == -1).all())
        assert bool((~sources.covered_BTM[b, n:]).all())
        for m, arrays in enumerate(sample.shard.sources):
            for i in (0, 1, n // 2, n - 1):
                row = sample.rows.start + i
                part = slice(arrays["entry_offsets"][row], arrays["entry_offsets"][row + 1])
                ids = arrays["entry_ids"][part].tolist()
                got = sources.entry_ids_BTMK[b, i, m].tolist()
                assert got == ids + [-1] * (len(got) - len(ids))
                probs = sources.entry_probs_BTMK[b, i, m, : len(ids)].numpy()
                np.testing.assert_allclose(probs, np.exp(arrays["entry_logprobs"][part]), rtol=1e-6)
                assert sources.tail_BTM[b, i, m] == arrays["tail_mass"][row]
                assert bool(sources.covered_BTM[b, i, m]) == bool(ids)
                np.testing.assert_equal(
                    sources.label_logprobs_BTM[b, i, m].item(), float(arrays["label_logprobs"][row])
                )
            bpb = arrays["source_nats"][sample.index] / arrays["source_bytes"][sample.index]
            assert sources.source_bpb_BM[b, m] == pytest.approx(bpb / np.log(2))


def test_ground_truth_alone_reads_no_entries(inputs, monkeypatch) -> None:
    read = []
    for reader in inputs.samples.stores.values():
        original = type(reader).read

        def spy(self, shard, names=None, original=original):
            read.append(tuple(names or ()))
            return original(self, shard, names)

        monkeypatch.setattr(type(reader), "read", spy)
        break
    stream = SampleStream(inputs.samples, options(), inputs.domains, with_sources=False)
    fused = SampleStream(inputs.samples, options(), inputs.domains)
    (plain,) = stream.step_batches(0)
    assert plain.sources is None
    assert all(names and "entry_ids" not in names for names in read)
    (batch,) = fused.step_batches(0)
    assert torch.equal(batch.input_ids_BL, plain.input_ids_BL)
    assert torch.equal(batch.predicted_by_BT, plain.predicted_by_BT)


def test_cache_keeps_a_window_and_no_more(inputs) -> None:
    stream = SampleStream(inputs.samples, options(cache_gib=0.0, shuffle_shards=1), inputs.domains)
    for step in range(8):
        stream.step_batches(step)
        assert len(stream.cache._held) <= 2


def test_end_of_document_is_a_label_of_ground_truth_alone(run) -> None:
    section = run.sections["train"].model_copy(update={"append_eos": True})
    opened = open_inputs(run, section)
    stream = SampleStream(opened.samples, options(), opened.domains)
    (batch,) = stream.step_batches(0)
    eos = opened.tokenizer.eos_id
    for b in range(len(batch.segment_ids)):
        n = int((batch.predicted_by_BT[b] >= 0).sum())
        assert batch.labels_BT[b, n - 1] == eos
        assert batch.label_bytes_BT[b, n - 1] == 0
        assert not batch.sources.covered_BTM[b, n - 1].any()
        assert eos not in batch.input_ids_BL[b].tolist()


def test_first_token_without_bos_is_no_row(tmp_path) -> None:
    made = make_run(tmp_path, bos=False, shards={"train": 1, "valid": 1})
    opened = open_inputs(made, made.sections["train"])
    stream = SampleStream(opened.samples, options(), opened.domains)
    (batch,) = stream.step_batches(0)
    assert bool((batch.predicted_by_BT[:, 0] == -1).all())
    assert bool((batch.predicted_by_BT[:, 1] == 0).all())


def test_pretraining_stream_shares_decoded_shards(inputs) -> None:
    stream = SampleStream(inputs.samples, options(), inputs.domains)
    other = pretrain_stream(stream, 4)
    (batch,) = other.step_batches(0)
    assert len(batch.segment_ids) == 4
    assert batch.sources.entry_ids_BTMK.shape[-1] == 0
    assert bool(batch.sources.covered_BTM.any())
    assert other.cache is stream.cache


def test_batches_without_features_are_the_same_otherwise(run, inputs) -> None:
    """They are made for selectors that look at them; what a target is trained on has none of them."""
    for name, looks in (("uniform", False), ("asn", True), ("constant", False)):
        section = run.sections["train"].model_copy(update={"selector": name})
        opened = open_inputs(run, section)
        (got,) = SampleStream(opened.samples, options(), opened.domains).step_batches(1)
        (whole,) = SampleStream(inputs.samples, options(), inputs.domains).step_batches(1)
        assert whole.sources.features_BTMF.shape[-1] == len(FEATURES)
        assert got.sources.features_BTMF.shape[-1] == (len(FEATURES) if looks else 0)
        assert torch.equal(got.labels_BT, whole.labels_BT)
        for field in dataclasses.fields(got.sources):
            one, other = getattr(got.sources, field.name), getattr(whole.sources, field.name)
            if looks or field.name != "features_BTMF":
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_stores_that_do_not_belong_are_refused(run, inputs, tmp_path) -> None:
    samples = inputs.samples
    with pytest.raises(ConfigError, match="no shard of the split"):
        AlignedSamples(samples.plan, samples.stores, samples.tokenizer, split="nope")
    with pytest.raises(ConfigError, match="no aligned store"):
        AlignedSamples(samples.plan, {}, samples.tokenizer, split="train")
    other = SegmentTokenizer(tiny_tokenizer("byte_level", vocab_size=301), name="other")
    with pytest.raises(MismatchError, match="another tokenizer"):
        AlignedSamples(samples.plan, samples.stores, other, split="train")
    made = make_run(tmp_path, segments_per_shard=3)
    foreign = open_inputs(made, made.sections["train"]).samples.stores
    with pytest.raises(MismatchError, match="plan"):
        AlignedSamples(samples.plan, foreign, samples.tokenizer, split="train")
    with pytest.raises(InputError, match="longer than the target"):
        AlignedSamples(
            samples.plan, samples.stores, samples.tokenizer, split="train", max_positions=4
        ).load(0, with_sources=False)


def test_what_the_plan_fits_is_its_own_target(inputs) -> None:
    """Another target's segments may be longer than plan.max_tokens says: they are measured."""
    samples = inputs.samples
    record = samples.plan.record
    for target, fits in ((samples.tokenizer.fingerprint, True), ("another", False)):
        update = {"settings": {"max_tokens": 4}, "tokenizers": {"target": target}}
        plan = Plan(samples.plan.location, record.model_copy(update=update))
        made = partial(AlignedSamples, plan, samples.stores, samples.tokenizer, split="train")
        if fits:
            made(max_positions=4)
            continue
        with pytest.raises(InputError, match="longer than the target"):
            made(max_positions=4)


def test_missing_shard_is_named(tmp_path) -> None:
    made = make_run(tmp_path, segments_per_shard=3)
    (tmp_path / "run/aligned/prose/commits/00002.json").unlink()
    with pytest.raises(MissingError, match=r"prose 1 of 4 shards \(2\)"):
        open_inputs(made, made.sections["train"])
