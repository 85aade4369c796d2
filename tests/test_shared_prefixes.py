"""Turns of a chat in one pass: whatever is scored or trained on so is what a pass of its own gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import fuse_train.data.batch as batch_module
import fuse_train.loop.likelihood as likelihood_module
from extract.engines.transformers_engine import TransformersEngine
from fuse_train.data.batch import collate
from fuse_train.data.order import SampleOrder
from fuse_train.data.samples import DecodedShard, Sample
from fuse_train.data.stream import SampleStream
from fuse_train.inputs import open_inputs, stream_options
from fuse_train.loop.likelihood import row_nats
from fuse_train.loop.objective import FusionObjective, StepTotals
from store_schema.plan.plan import Segment
from store_schema.text.prefixes import prefix_groups
from store_schema.text.tokenizer import SegmentTokenizer
from tests.aligned_factory import make_run
from tests.engine_contract import TOLERANCE_NATS, reference_logprobs, short_chats, spec_of
from tests.selector_views import build_selector

Ids = list[int]


def alone(inputs: Any) -> list[list[int]]:
    """Every input in a pass of its own."""
    return [[i] for i in range(len(inputs))]


@given(st.lists(st.lists(st.sampled_from([0, 1, 300]), max_size=5), max_size=12))
def test_groups_hold_all_that_begins_their_first(inputs: list[Ids]) -> None:
    groups = prefix_groups([np.array(ids, np.int64) for ids in inputs])
    assert sorted(i for group in groups for i in group) == list(range(len(inputs)))
    assert groups == sorted(groups)
    firsts = [inputs[first] for first, *_ in groups]
    for group, first in zip(groups, firsts, strict=True):
        for i in group:
            assert first[: len(inputs[i])] == inputs[i]
        # No pass is left that another one serves.
        assert sum(other[: len(first)] == first for other in firsts) == 1


@pytest.mark.parametrize("estimator", ["topk", "sampled"])
def test_a_chats_turns_are_scored_in_one_pass(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    options = {} if estimator == "topk" else {"estimator": "sampled", "sampled_head": 4}
    spec = spec_of(tiny_models["prose"], "transformers", **options)
    segments = short_chats(SegmentTokenizer.load(spec.ref, name="m"))
    engine = TransformersEngine(spec)
    fed: list[int] = []
    inner = engine._states

    def states(inputs: Any, T: int) -> torch.Tensor:
        fed.extend(map(len, inputs))
        return inner(inputs, T)

    monkeypatch.setattr(engine, "_states", states)
    rows = dict(engine.score(segments))
    assert sorted(rows) == list(range(len(segments)))
    assert len(fed) == -(-len(segments) // 3)
    for i, (labels, logprobs) in enumerate(reference_logprobs(spec.folder, segments)):
        np.testing.assert_allclose(rows[i].label_logprobs, labels, atol=TOLERANCE_NATS)
        [(_, own)] = engine.score([segments[i]])
        # The same entries too, drawn ones as well: draws are the segment's own.
        assert np.array_equal(rows[i].ids, own.ids)
        np.testing.assert_allclose(rows[i].logprobs, own.logprobs, atol=TOLERANCE_NATS)
        if estimator == "topk":
            chosen = np.take_along_axis(logprobs, rows[i].ids, axis=1)
            np.testing.assert_allclose(rows[i].logprobs, chosen, atol=TOLERANCE_NATS)


def test_evaluation_reads_a_chat_once(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SegmentTokenizer.load(spec_of(tiny_models["code"], "transformers").ref, name="m")
    segments = short_chats(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_models["code"]).double()
    together = row_nats(model, segments, batch_segments=2)
    monkeypatch.setattr(likelihood_module, "prefix_groups", alone)
    for one, own in zip(together, row_nats(model, segments), strict=True):
        np.testing.assert_allclose(one, own, rtol=1e-9, equal_nan=True)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = make_run(tmp_path_factory.mktemp("prefixes"))
    return run, open_inputs(run, run.sections["train"])


def as_turns(shard: DecodedShard, turns: int) -> list[Sample]:
    """A shard's samples, each after those before it."""
    contexts: list[tuple[int, ...]] = []
    for i in range(len(shard.segments)):
        labels = tuple(map(int, shard.sample(i - 1).labels)) if i % turns else ()
        contexts.append((*contexts[-1], *labels, 3) if i % turns else (5,))
    chats = replace(shard, context_ids=contexts)
    return [chats.sample(i) for i in range(len(shard.segments))]


@pytest.mark.parametrize("pack_tokens", [None, 128])
def test_a_chats_turns_train_in_one_pass(
    opened: Any, monkeypatch: pytest.MonkeyPatch, pack_tokens: int | None
) -> None:
    run, inputs = opened
    section = run.sections["train"].model_copy(update={"selector": "uniform"})
    samples = as_turns(inputs.samples.load(0, with_sources=True), 3)[:7]
    model = AutoModelForCausalLM.from_pretrained(run.target.model).double()

    def trained(batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
        objective = FusionObjective(model, build_selector(section, inputs.domains), section)
        loss, _ = objective(batch, StepTotals(100, 100))
        model.zero_grad()
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}

    together = collate(samples, inputs.domains, pack_tokens=pack_tokens)
    monkeypatch.setattr(batch_module, "prefix_groups", alone)
    apart = collate(samples, inputs.domains)
    assert len(apart.input_ids_BL) == 7
    assert together.input_ids_BL.count_nonzero() < 0.6 * apart.input_ids_BL.count_nonzero()
    loss, gradients = trained(together)
    own_loss, own = trained(apart)
    assert loss == pytest.approx(own_loss, rel=1e-6)
    for name, gradient in own.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=6),
    st.integers(0, 99),
    st.integers(1, 3),
)
def test_whole_chats_stay_together_and_in_order(units: list[Ids], seed: int, window: int) -> None:
    sizes = [len(found) for found in units]
    order = SampleOrder(
        sizes, seed=seed, window_shards=window, units=lambda shard: np.array(sorted(units[shard]))
    )
    for epoch in (0, 1):
        refs = order.samples(epoch * len(order), len(order))
        assert len(set(refs)) == len(order)
        names = [(ref.shard, sorted(units[ref.shard])[ref.segment]) for ref in refs]
        seen = list(dict.fromkeys(names))
        assert names == [name for name in seen for _ in range(names.count(name))]
        for name in seen:
            turns = [r.segment for r, n in zip(refs, names, strict=True) if n == name]
            assert turns == sorted(turns)


def test_another_pass_has_other_chats_first() -> None:
    order = SampleOrder(
        [12, 12], seed=0, window_shards=1, units=lambda shard: np.repeat(np.arange(6), 2)
    )
    first, second = order.samples(0, 24), order.samples(24, 24)
    assert set(first) == set(second)
    assert first != second


def test_the_stream_keeps_turns_of_one_chat_together(opened: Any, monkeypatch: Any) -> None:
    run, inputs = opened
    plan = inputs.samples.plan
    inner = type(plan).segments

    def chats(self: Any, shard: Any) -> list[Segment]:
        found = inner(self, shard)
        return [
            replace(s, document_id=f"chat-{s.index // 3}/turn-{s.index % 3}", context="{}")
            for s in found
        ]

    section = run.sections["train"].model_copy(update={"chats": "whole"})
    options = replace(stream_options(run, section), batch_segments=6, micro_batch_segments=3)
    with monkeypatch.context() as patch:
        patch.setattr(type(plan), "segments", chats)
        stream = SampleStream(inputs.samples, options, inputs.domains, with_sources=False)
        for step in range(4):
            for batch in stream.step_batches(step):
                numbers = [int(name.split("-")[1].split("#")[0]) for name in batch.segment_ids]
                assert numbers == [numbers[0] - numbers[0] % 3 + i for i in range(3)]


def test_what_is_a_turn_of_a_chat() -> None:
    turn = Segment(0, "a/turn-1#0", "a/turn-1", "d", "train", 0, 1, True, "{}", "x")
    assert turn.chat_id == "a"
    assert replace(turn, document_id="b/turn-0/turn-2/thought").chat_id == "b/turn-0"
    assert replace(turn, context=None).chat_id is None
    assert replace(turn, document_id="a").chat_id is None
