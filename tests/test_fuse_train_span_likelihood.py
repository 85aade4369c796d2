"""The likelihood of spans against plain loops in float64, values and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fuse_train.data.batch import collate
from fuse_train.data.samples import AlignedSamples
from fuse_train.data.span_batch import has_spans
from fuse_train.losses.span_likelihood import SpanBatch, span_loss, span_rows
from tests.aligned_factory import make_run

NAN = math.nan


def reference(nll_R, weights_RM, spans: SpanBatch, at, temperature):
    """The sum over spans, one by one, differentiable to NLL and weights."""
    total = torch.zeros((), dtype=torch.float64)
    index, logprobs = spans.index_BTM, spans.logprobs_BTM
    row_of = {
        (b, t): r for r, (b, t) in enumerate(zip(at[0].tolist(), at[1].tolist(), strict=True))
    }
    for b in range(index.shape[0]):
        for m in range(index.shape[2]):
            for span in sorted({int(i) for i in index[b, :, m] if i >= 0}):
                rows = [t for t in range(index.shape[1]) if index[b, t, m] == span]
                source = float(logprobs[b, rows[0], m])
                if math.isnan(source) or any((b, t) not in row_of for t in rows):
                    continue
                here = [row_of[b, t] for t in rows]
                p = math.exp(source / temperature)
                q = (-nll_R[here].sum() / temperature).exp()
                distance = p * (math.log(p) - q.log()) + (1 - p) * (math.log(1 - p) - (1 - q).log())
                total = total + weights_RM[here, m].mean() * distance
    return total


def problem(seed: int):
    """Two segments of 7 and 5 rows, three sources; the first row of segment 0 has no label."""
    g = torch.Generator().manual_seed(seed)
    index = torch.full((2, 8, 3), -1, dtype=torch.int32)
    logprobs = torch.full((2, 8, 3), NAN)
    for b, length in enumerate((7, 5)):
        for m in range(3):
            steps = torch.rand(length, generator=g) < 0.6
            steps[0] = False
            index[b, :length, m] = steps.cumsum(0)
            nats = -6 * torch.rand(length, generator=g) - 0.01
            nats[torch.rand(length, generator=g) < 0.2] = NAN
            logprobs[b, :length, m] = nats[index[b, :length, m].long()]
    index[1, :, 2], logprobs[1, :, 2] = -1, NAN  # a source that does not cover it
    here = index[:, :, 0] >= 0
    here[0, 0] = False
    at = torch.nonzero(here, as_tuple=True)
    nll = (4 * torch.rand(len(at[0]), generator=g, dtype=torch.float64) + 0.05).requires_grad_()
    weights = torch.rand(len(at[0]), 3, generator=g, dtype=torch.float64).requires_grad_()
    return SpanBatch(index, logprobs), at, nll, weights


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_value_and_slopes_equal_plain_loops(seed, temperature) -> None:
    spans, at, nll, weights = problem(seed)
    expected = reference(nll, weights, spans, at, temperature)
    by_nll, by_weight = torch.autograd.grad(expected, (nll, weights))
    value, slope = span_loss(nll, weights, span_rows(spans, at), temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected.item() > 0
    torch.testing.assert_close(slope, by_nll, rtol=1e-5, atol=1e-12)
    (ours,) = torch.autograd.grad(value, weights)
    torch.testing.assert_close(ours, by_weight, rtol=1e-5, atol=1e-12)


def test_a_target_that_agrees_has_no_loss_and_no_slope() -> None:
    index = torch.tensor([[[0], [0], [1]]], dtype=torch.int32)
    logprobs = torch.tensor([[[-3.0], [-3.0], [-1.0]]])
    at = (torch.zeros(3).long(), torch.arange(3))
    rows = span_rows(SpanBatch(index, logprobs), at)
    value, slope = span_loss(torch.tensor([1.0, 2.0, 1.0]), torch.ones(3, 1), rows, 100.0)
    assert value.item() == pytest.approx(0.0, abs=1e-9)
    assert slope.abs().max().item() < 1e-9
    # The target is less sure of the first span than the source: lower NLLs there are wanted.
    _, slope = span_loss(torch.tensor([2.0, 2.0, 1.0]), torch.ones(3, 1), rows, 100.0)
    assert slope[0].item() == slope[1].item() > 0
    assert slope[2].item() == pytest.approx(0.0, abs=1e-9)


def test_certain_spans_stay_finite() -> None:
    index, at = torch.zeros((1, 1, 1), dtype=torch.int32), (torch.zeros(1).long(),) * 2
    for source in (0.0, -1000.0):
        for nll in (0.0, 1e-9, 1000.0):
            rows = span_rows(SpanBatch(index, torch.full((1, 1, 1), source)), at)
            value, slope = span_loss(torch.tensor([nll]), torch.ones(1, 1), rows, 100.0)
            assert value.isfinite()
            assert slope.isfinite().all()


def test_no_span_at_all() -> None:
    nothing = SpanBatch(torch.full((1, 2, 1), -1, dtype=torch.int32), torch.full((1, 2, 1), NAN))
    at = (torch.zeros(2).long(), torch.arange(2))
    value, slope = span_loss(torch.ones(2), torch.ones(2, 1), span_rows(nothing, at), 100.0)
    assert value.item() == 0.0
    assert slope.tolist() == [0.0, 0.0]


def test_collated_spans_are_those_of_the_store(tmp_path) -> None:
    from fuse_train.inputs import open_inputs

    run = make_run(tmp_path, shards={"train": 1, "valid": 1})
    plain = open_inputs(run, run.sections["train"]).samples
    kept = AlignedSamples(plain.plan, plain.stores, plain.tokenizer, split="train", with_spans=True)
    shard = kept.load(0, with_sources=True)
    samples = [shard.sample(i) for i in (3, 0, 5)]
    spans = collate(samples, ["code", "facts", "prose"]).spans
    assert spans is not None
    for b, sample in enumerate(samples):
        n = sample.num_tokens
        assert bool((spans.index_BTM[b, n:] == -1).all())
        assert bool((spans.index_BTM[b, :n] == 0).all())  # the factory has one span a segment
        for m, reader in enumerate(kept.stores.values()):
            arrays = reader.read(0, ("span_logprobs",))
            expected = np.repeat(arrays["span_logprobs"][sample.index], n)
            np.testing.assert_array_equal(spans.logprobs_BTM[b, :n, m].numpy(), expected)
    without = plain.load(0, with_sources=True).sample(0)
    assert not has_spans(without)
    assert collate([without], ["code", "facts", "prose"]).spans is None
