"""The fused pass over the output head against float64, and against the simple way that it replaces."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.engines import transformers_engine
from extract.engines.transformers_engine import TransformersEngine
from extract.head import bf16_dot, fused_head
from extract.head.bf16_dot import WIDTH, has_bf16_dot
from extract.head.fused_head import MOST_ENTRIES, FusedHead
from extract.head.logit_rows import Entries, row_entries
from extract.head.output_head import OutputHead
from extract.head.vocabulary_pass import TILE, exp_of
from store_schema.text.tokenizer import SegmentTokenizer
from tests.engine_contract import encoded_samples, spec_of

needs_units = pytest.mark.skipif(not has_bf16_dot(), reason="needs AVX-512 BF16, and no AMX")

FLOAT32_NATS = 3e-5
"""What float32 sums of some hundred products of this size may be off by."""


def layer_of(weight_VH: torch.Tensor, bias_V: torch.Tensor | None = None) -> torch.nn.Linear:
    """An output layer of bf16 numbers."""
    layer = torch.nn.Linear(*reversed(weight_VH.shape), bias=bias_V is not None)
    layer.weight.data = weight_VH
    if bias_V is not None:
        layer.bias.data = bias_V
    return layer.bfloat16().requires_grad_(False)


def case(
    V: int, H: int, R: int, *, scale: float = 2.0, bias: bool = False, seed: int = 0
) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer, hidden states and labels; logits have about `scale` as standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, H, generator=generator) * scale / H**0.5
    hidden = torch.randn(R, H, generator=generator).bfloat16()
    labels = torch.randint(V, (R,), generator=generator)
    return layer_of(weight, torch.randn(V, generator=generator) if bias else None), hidden, labels


def logits_of(layer: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """[R, V] in float64."""
    bias = 0 if layer.bias is None else layer.bias.double()
    return hidden.double() @ layer.weight.double().t() + bias


def fused(
    layer: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, top_k: int
) -> Entries:
    head = FusedHead.of(layer, top_k)
    assert head is not None
    found = head.entries(hidden, labels)
    assert found is not None
    return found


def check(
    layer: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, top_k: int
) -> Entries:
    """Entries are those of float64: no id is left out that is clearly more probable than one kept."""
    ids, logprobs, of_labels = fused(layer, hidden, labels, top_k)
    exact = logits_of(layer, hidden).log_softmax(-1)
    nats = FLOAT32_NATS * max(1.0, float(logits_of(layer, hidden).abs().max()) / 20)
    assert (ids.dtype, logprobs.dtype, of_labels.dtype) == (
        torch.int32, torch.float32, torch.float32,
    )  # fmt: skip
    assert ids.shape == logprobs.shape == (len(hidden), top_k)
    chosen = exact.gather(1, ids.long())
    torch.testing.assert_close(logprobs.double(), chosen, rtol=0, atol=nats)
    torch.testing.assert_close(chosen, exact.topk(top_k).values, rtol=0, atol=2 * nats)
    torch.testing.assert_close(
        of_labels.double(), exact.gather(1, labels[:, None])[:, 0], rtol=0, atol=nats
    )
    assert (logprobs.diff(dim=-1) <= 0).all()
    assert all(len(set(row)) == top_k for row in ids.tolist())
    return ids, logprobs, of_labels


@needs_units
@settings(deadline=None)
@given(
    V=st.integers(1, 3 * TILE + 7),
    half=st.integers(1, 40),
    R=st.integers(1, WIDTH + 3),
    top_k=st.integers(1, 70),
    scale=st.sampled_from([0.0, 0.1, 2.0, 30.0]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    V: int, half: int, R: int, top_k: int, scale: float, bias: bool, seed: int
) -> None:
    """Flat rows and peaked rows, vocabularies that no tile divides, rows that fill no panel."""
    check(*case(V, 2 * half, R, scale=scale, bias=bias, seed=seed), min(top_k, V))


@needs_units
@settings(deadline=None, max_examples=50)
@given(levels=st.sampled_from([1, 2, 3]), top_k=st.integers(1, 40), seed=st.integers(0, 1000))
def test_ties(levels: int, top_k: int, seed: int) -> None:
    """Whole numbers are exact: where many logits are equal, the values are topk's all the same."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (500, 4), generator=generator).float()
    layer, hidden = layer_of(weight), torch.ones(3, 4).bfloat16()
    labels = torch.tensor([0, 250, 499])
    ids, logprobs, _ = check(layer, hidden, labels, top_k)
    exact = logits_of(layer, hidden)
    best = exact.topk(top_k).values
    assert torch.equal(exact.gather(1, ids.long()), best)
    torch.testing.assert_close(logprobs.diff(dim=-1).double(), best.diff(dim=-1), atol=1e-6, rtol=0)


@needs_units
@pytest.mark.parametrize("far", [20.0, 300.0, 3000.0])
def test_labels_far_below_the_best(far: float) -> None:
    """And a best id so far above the others that they do not count."""
    weight = torch.zeros(400, 16)
    weight[7], weight[300] = far / 16, -far / 16
    labels = torch.tensor([300, 0, 7])
    _, logprobs, of_labels = check(layer_of(weight), torch.ones(3, 16).bfloat16(), labels, 2)
    assert of_labels[0] < -far
    assert logprobs[0, 0] == of_labels[2] > -1e-5


@needs_units
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_threads_change_nothing_but_rounding(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, hidden, labels = case(10 * TILE + 5, 32, 70)
    alone = fused(layer, hidden, labels, 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    together = [fused(layer, hidden, labels, 20) for _ in range(2)]
    for a, b, again in zip(alone, *together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
        assert torch.equal(b, again)


@needs_units
def test_more_threads_than_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    check(*case(TILE + 1, 8, 3), 5)


@needs_units
def test_rows_that_are_longer_than_a_step() -> None:
    check(*case(200, 2600, 5), 8)


@needs_units
def test_it_is_the_simple_way_up_to_rounding() -> None:
    layer, hidden, labels = case(5000, 256, 130, bias=True)
    simple = row_entries(OutputHead(layer, fp32=True).logits(hidden), labels, 64)
    ids, logprobs, of_labels = fused(layer, hidden, labels, 64)
    torch.testing.assert_close(logprobs, simple[1], rtol=0, atol=FLOAT32_NATS)
    torch.testing.assert_close(of_labels, simple[2], rtol=0, atol=FLOAT32_NATS)
    assert (ids == simple[0]).float().mean() > 0.99


@needs_units
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("token", [0, 3, TILE + 5])
def test_what_is_no_distribution_is_left_to_the_simple_way(bad: float, token: int) -> None:
    layer, hidden, labels = case(2 * TILE, 8, 3)
    head = FusedHead.of(layer, 4)
    assert head is not None
    layer.weight[token] = bad
    assert head.entries(hidden, labels) is None
    layer.weight[token] = 0
    assert head.entries(hidden, labels) is not None
    hidden[1, 2] = bad
    assert head.entries(hidden, labels) is None


@needs_units
def test_ids_that_a_bias_forbids() -> None:
    """They have no mass; where fewer than K others are left, the simple way says what is kept."""
    layer, hidden, labels = case(3 * TILE, 8, 3, bias=True)
    layer.bias[10:] = -torch.inf
    labels %= 10
    check(layer, hidden, labels, 10)
    forbidden = FusedHead.of(layer, 11)
    assert forbidden is not None
    assert forbidden.entries(hidden, labels) is None
    labels[0] = 20
    assert fused(layer, hidden, labels, 10)[2][0] == -torch.inf


@needs_units
def test_where_it_is_not_possible() -> None:
    layer, hidden, labels = case(2000, 8, 3)
    assert FusedHead.of(layer, MOST_ENTRIES) is not None
    assert FusedHead.of(layer, MOST_ENTRIES + 1) is None
    few = case(20, 8, 3)[0]
    assert FusedHead.of(few, 20) is not None
    assert FusedHead.of(few, 21) is None
    assert FusedHead.of(case(20, 7, 3)[0], 4) is None
    assert FusedHead.of(layer.float(), 4) is None
    assert FusedHead.of(layer.half(), 4) is None
    assert FusedHead.of(torch.nn.Sequential(layer.bfloat16()), 4) is None
    layer.weight.data = layer.weight.data.t().contiguous().t()
    assert FusedHead.of(layer, 4) is None
    other = FusedHead.of(few, 4)
    assert other is not None
    assert other.entries(hidden.float(), labels % 20) is None


def test_a_cpu_without_units_or_with_matrix_units_takes_the_simple_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for features, possible in [
        ({"avx512f"}, False), ({"avx512bf16"}, True), ({"avx512bf16", "amx-bf16"}, False),
    ]:  # fmt: skip
        monkeypatch.setattr(bf16_dot, "cpu_features", lambda found=features: frozenset(found))
        assert (FusedHead.of(case(20, 8, 3)[0], 4) is not None) == possible


def test_the_exponential() -> None:
    nats = np.concatenate([-np.geomspace(1e-9, 87, 2000), [0.0, -1.0, -0.34657359, -87.33]])
    found = np.array([exp_of(np.float32(x)) for x in nats], np.float64)
    np.testing.assert_allclose(found, np.exp(np.float32(nats).astype(np.float64)), rtol=6e-6)
    near = nats > -10
    np.testing.assert_allclose(found[near], np.exp(np.float32(nats[near]).astype(float)), rtol=1e-6)
    assert 0 < exp_of(np.float32(-1e30)) < 2e-38
    assert np.isnan(exp_of(np.float32(np.nan)))


class Watched(FusedHead):
    """Counts its calls."""

    calls: list[int] = []  # noqa: RUF012

    def entries(self, hidden_RH: torch.Tensor, labels_R: torch.Tensor) -> Entries | None:
        self.calls.append(len(hidden_RH))
        return super().entries(hidden_RH, labels_R)


@needs_units
def test_the_engine_uses_it_and_gives_the_same(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_head, "FusedHead", Watched)
    monkeypatch.setattr(Watched, "calls", [])
    found: list[dict[int, Any]] = []
    for options in ({}, {"estimator": "sampled"}, {"fp32_head": False}):
        spec = spec_of(tiny_models["code"], "transformers", dtype="bfloat16", **options)
        segments = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
        for possible in (True, False):
            if not possible:
                monkeypatch.setattr(transformers_engine, "_fused_head", lambda *_: None)
            Watched.calls.clear()
            found.append(dict(TransformersEngine(spec).score(segments)))
            assert bool(Watched.calls) == (possible and not options)
        monkeypatch.undo()
        monkeypatch.setattr(fused_head, "FusedHead", Watched)
    with_it, without = found[:2]
    for i, rows in with_it.items():
        np.testing.assert_allclose(rows.logprobs, without[i].logprobs, atol=1e-4)
        np.testing.assert_allclose(rows.label_logprobs, without[i].label_logprobs, atol=1e-4)


@needs_units
def test_nan_is_found_in_the_row_that_has_it(tiny_models: dict[str, Path]) -> None:
    """The rows beside it keep their entries, as without the fused pass."""
    layer, hidden, labels = case(300, 8, 5)
    hidden[2, 1] = torch.nan
    spec = spec_of(tiny_models["code"], "transformers", dtype="bfloat16", head_rows=3, top_k=4)
    engine = TransformersEngine(spec)
    engine._fused = FusedHead.of(layer, 4)
    engine._head = OutputHead(layer, fp32=True)
    item = transformers_engine.Input(
        None,
        np.concatenate([[0], labels.numpy()]),
        1,  # type: ignore[arg-type]
    )
    _, _, of_labels = engine._kept_rows(hidden, [(0, item)], 6)
    assert of_labels.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.skipif(sys.platform != "linux", reason="needs affinities of Linux")
def test_threads_may_use_the_cores_of_all_threads() -> None:
    """OpenMP binds the thread that runs Python to one core, which others would begin on."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("needs two cores")
    torch.set_num_threads(torch.get_num_threads())
    import threading

    seen: list[set[int]] = []
    go = threading.Event()
    other = threading.Thread(target=go.wait)
    other.start()  # keeps all cores
    try:
        os.sched_setaffinity(0, {min(before)})
        cores = fused_head._cores()
        assert cores == before

        def bound() -> None:
            fused_head._take_cores(cores)
            seen.append(os.sched_getaffinity(0))

        child = threading.Thread(target=bound)
        child.start()
        child.join()
        assert seen == [before]
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
        go.set()
        other.join()
