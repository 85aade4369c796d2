"""The benchmark's dense way is FuseLLM's loss, and ours equals it where it does the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import dense_fusion, train_steps
from fuse_train.losses.losses import SourceRows, head_loss, with_tail_policy
from fuse_train.model.heads import Head

B, T, K, V, H, M = 2, 5, 4, 30, 6, 3


def sources(g):
    return [
        dense_fusion.StoredLogits(
            torch.rand(B, T, V, generator=g).argsort(-1)[..., :K],
            torch.randn(B, T, K, generator=g),
            2 * torch.rand(B, generator=g),
        )
        for _ in range(M)
    ]


def test_targets_are_softmaxes_over_the_stored_entries() -> None:
    stored = sources(torch.Generator().manual_seed(0))
    for source, target in zip(stored, dense_fusion.collate(stored, V), strict=True):
        assert target.shape == (B, T, V)
        torch.testing.assert_close(target.sum(-1), torch.ones(B, T))
        assert int((target > 0).sum()) == B * T * K
        b, t = 1, 3
        best = source.ids_BTK[b, t, source.logits_BTK[b, t].argmax()]
        assert int(target[b, t].argmax()) == int(best)


def test_ours_equals_the_dense_way_on_renormalised_entries() -> None:
    """AvgCE's weights as the selector's, the tail lost as a softmax loses it: the same gradients."""
    g = torch.Generator().manual_seed(1)
    stored = sources(g)
    hidden = torch.randn(B * T, H, generator=g, requires_grad=True)
    weight = torch.randn(V, H, generator=g, requires_grad=True)
    labels = torch.randint(V, (B, T), generator=g)
    ce_MB = torch.stack([s.ce_B for s in stored])
    logits = (hidden @ weight.T).view(B, T, V)
    dense = dense_fusion.loss(logits, labels, dense_fusion.collate(stored, V), ce_MB, 0.9)
    ids = torch.stack([s.ids_BTK.view(-1, K) for s in stored], 1)
    probs = torch.stack([s.logits_BTK.view(-1, K).exp() for s in stored], 1)
    probs = 0.7 * probs / probs.sum(-1, keepdim=True)  # as stored: some mass is elsewhere
    rows = with_tail_policy(SourceRows(ids, probs, torch.full((B * T, M), 0.3)), "renormalise")
    weights_BM = torch.softmax(torch.exp(-ce_MB), 0).T
    fusion = 0.1 * weights_BM.repeat_interleave(T, 0)
    ours = head_loss(
        hidden, Head(weight), labels.flatten(), torch.full((B * T,), 0.9), rows, fusion
    ).total / (B * T)
    assert ours.item() == pytest.approx(dense.item(), rel=1e-5)
    wrt = (hidden, weight)
    for a, b in zip(torch.autograd.grad(ours, wrt), torch.autograd.grad(dense, wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_all_ways_of_the_benchmark_run_and_fused_ones_agree() -> None:
    size = train_steps.Size(
        vocab_size=200, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2,
        num_kv_heads=2, num_segments=2, num_tokens=6, num_entries=5,
    )  # fmt: skip
    device = torch.device("cpu")
    for part in (train_steps.loss_ways, train_steps.head_ways):
        for way in part(size, device).values():
            way()
    ways = train_steps.step_ways(size, device)
    ways.pop("on")(train_steps.make_batch(size, seed=3))
    losses = {name: way() for name, way in ways.items() if name != "prepare"}
    assert all(loss > 0 for loss in losses.values())
    ids = train_steps.source_rows(train_steps.make_batch(size)).entry_ids_RMK
    assert int(ids.max()) < 200
    assert all(len(set(row)) == 5 for row in ids.flatten(0, 1).tolist())
