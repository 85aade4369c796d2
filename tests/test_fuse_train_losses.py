"""The sparse fusion loss against a dense float64 reference, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fuse_train.losses.losses import (
    SourceRows,
    head_loss,
    importance_cv2,
    row_coefficients,
    with_tail_policy,
)
from fuse_train.model.heads import Head
from fuse_train.selectors.pools import label_pool_nll

R, M, K, V, H = 23, 3, 5, 40, 8
POLICIES = ("bucket", "drop", "renormalise")


def problem(seed: int = 0, dtype: torch.dtype = torch.float64):
    """Random rows; some rows have fewer entries, some none."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(R, H, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, generator=g, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=g, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (R,), generator=g)
    ids = torch.stack([torch.randperm(V, generator=g)[:K] for _ in range(R * M)]).view(R, M, K)
    counts = torch.randint(0, K + 1, (R, M, 1), generator=g)
    present = torch.arange(K) < counts
    mass = torch.rand(R, M, K + 1, generator=g, dtype=torch.float64)
    probs = (mass / mass.sum(-1, keepdim=True))[..., :K] * present
    tail = 1 - probs.sum(-1)
    covered = counts[..., 0] > 0
    weights = torch.rand(R, M, generator=g, dtype=dtype) * covered
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    rows = SourceRows(ids.masked_fill(~present, -1).int(), probs.to(dtype), tail.to(dtype))
    return hidden, weight, bias, labels, rows, weights.requires_grad_(), covered


def dense_reference(hidden, weight, bias, labels, rows, fusion, clm, policy, scale=1.0, cap=None):
    """The plain lines of the module, with a dense target per source over the vocabulary."""
    logits = (hidden @ weight.T + bias) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logq = logits.log_softmax(-1)
    total = (clm * -logq[torch.arange(len(labels)), labels]).sum()
    for m in range(rows.tail_RM.shape[1]):
        ids = rows.entry_ids_RMK[:, m].long()
        inside = ids >= 0
        p = torch.zeros(len(labels), V, dtype=logq.dtype)
        p.scatter_add_(1, ids.clamp(min=0), rows.entry_probs_RMK[:, m] * inside)
        is_entry = torch.zeros(len(labels), V, dtype=torch.bool)
        for r in range(len(labels)):
            is_entry[r, ids[r][inside[r]]] = True
        if policy == "renormalise":
            p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        ce = -(p * logq).sum(-1)
        if policy == "bucket":
            rest = (logq.exp() * ~is_entry).sum(-1)
            ce = ce - rows.tail_RM[:, m] * rest.log()
        total = total + (fusion[:, m] * ce).sum()
    return total


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 4.0)])
def test_value_and_gradients_equal_dense_reference(policy, scale, cap) -> None:
    hidden, weight, bias, labels, rows, weights, covered = problem()
    clm, fusion = row_coefficients(weights, covered, 0.3)
    expected = dense_reference(
        hidden, weight, bias, labels, rows, fusion, clm, policy, scale=scale, cap=cap
    )
    wrt = (hidden, weight, bias, weights)
    expected_grads = torch.autograd.grad(expected, wrt)
    clm, fusion = row_coefficients(weights, covered, 0.3)
    got = head_loss(
        hidden,
        Head(weight, bias, scale, cap),
        labels,
        clm,
        with_tail_policy(rows, policy),
        fusion,
        chunk_rows=7,
    ).total
    grads = torch.autograd.grad(got * 1.5, wrt)  # a factor, as after division by a count
    assert got.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs * 1.5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_float32_is_close_to_float64(policy) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias, labels, rows, weights, covered = problem(3)
        cast = [t.detach().float().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        clm, fusion = row_coefficients(weights.detach().to(dtype), covered, 0.3)
        loss = head_loss(
            cast[0],
            Head(cast[1], cast[2]),
            labels,
            clm,
            with_tail_policy(rows, policy),
            fusion,
            chunk_rows=1000,
        )
        results.append([loss.total, *torch.autograd.grad(loss.total, cast)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


def test_chunk_size_and_padding_do_not_matter() -> None:
    hidden, weight, bias, labels, rows, weights, covered = problem()
    clm, fusion = row_coefficients(weights, covered, 0.3)
    head = Head(weight, bias)
    whole = head_loss(hidden, head, labels, clm, rows, fusion, chunk_rows=10_000)
    more = torch.full((R, M, 3), -1, dtype=torch.int32)
    wider = SourceRows(
        torch.cat([rows.entry_ids_RMK, more], -1),
        torch.cat([rows.entry_probs_RMK, torch.zeros(R, M, 3, dtype=torch.float64)], -1),
        rows.tail_RM,
    )
    for chunk in (1, 4, R):
        part = head_loss(hidden, head, labels, clm, wider, fusion, chunk_rows=chunk)
        torch.testing.assert_close(part.total, whole.total)
        torch.testing.assert_close(part.ce_RM, whole.ce_RM)


def test_one_hot_source_without_tail_is_clm() -> None:
    hidden, weight, bias, labels, _, _, _ = problem()
    one_hot = SourceRows(
        labels[:, None, None].int(), torch.ones(R, 1, 1, dtype=torch.float64), torch.zeros(R, 1)
    )
    ones, zeros = torch.ones(R, 1, dtype=torch.float64), torch.zeros(R)
    fused = head_loss(hidden, Head(weight, bias), labels, zeros, one_hot, ones, chunk_rows=8)
    plain = head_loss(hidden, Head(weight, bias), labels, torch.ones(R), chunk_rows=8)
    torch.testing.assert_close(fused.total, plain.total)
    for a, b in zip(
        torch.autograd.grad(fused.total, (hidden, weight)),
        torch.autograd.grad(plain.total, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, labels, reduction="sum")
    torch.testing.assert_close(plain.total, expected)


def test_gradient_is_finite_when_entries_hold_everything() -> None:
    """The target's mass outside the entries underflows: bounded loss, bounded gradient."""
    hidden = torch.full((2, 1), 1.0, requires_grad=True)
    weight = torch.full((V, 1), -1e4)
    weight[:K] = 0.0
    weight.requires_grad_()
    ids = torch.arange(K, dtype=torch.int32).expand(2, 1, K)
    for tail in (0.0, 0.5):
        probs = torch.full((2, 1, K), (1 - tail) / K)
        rows = SourceRows(ids, probs, torch.full((2, 1), tail))
        loss = head_loss(
            hidden, Head(weight), torch.zeros(2).long(), torch.zeros(2), rows, torch.ones(2, 1),
            chunk_rows=2,
        )  # fmt: skip
        grads = torch.autograd.grad(loss.total, (hidden, weight))
        assert loss.total.isfinite()
        assert all(g.isfinite().all() for g in grads)
        assert weight.shape == grads[1].shape
        assert grads[1].abs().max() <= 2.0


def test_rows_without_source_are_pure_ground_truth() -> None:
    covered = torch.tensor([[True, False], [False, False]])
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    clm, fusion = row_coefficients(weights, covered, 0.25)
    assert clm.tolist() == [0.25, 1.0]
    assert fusion.tolist() == [[0.75, 0.0], [0.0, 0.0]]


def test_no_rows_at_all() -> None:
    hidden = torch.zeros(0, H, requires_grad=True)
    weight = torch.zeros(V, H, requires_grad=True)
    loss = head_loss(hidden, Head(weight), torch.zeros(0).long(), torch.zeros(0), chunk_rows=8)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert weight.grad is not None


def test_bfloat16_hidden_states_keep_float32_sums() -> None:
    hidden, weight, bias, labels, rows, weights, covered = problem(1, torch.float32)
    clm, fusion = row_coefficients(weights.detach(), covered, 0.3)
    args = (labels, clm, rows, fusion)
    exact = head_loss(hidden, Head(weight, bias), *args, chunk_rows=8).total
    small = hidden.detach().bfloat16().requires_grad_()
    rough = head_loss(small, Head(weight, bias), *args, chunk_rows=8)
    assert rough.total.dtype == torch.float32
    assert rough.total.item() == pytest.approx(exact.item(), rel=0.03)
    grad_hidden, grad_weight = torch.autograd.grad(rough.total, (small, weight))
    assert grad_hidden.dtype == torch.bfloat16
    assert grad_weight.dtype == torch.float32


def test_cv2_of_importance() -> None:
    assert importance_cv2(torch.tensor([2.0, 2.0, 2.0])).item() == 0.0
    assert importance_cv2(torch.tensor([5.0])).item() == 0.0
    assert importance_cv2(torch.tensor([3.0, 1.0])).item() == pytest.approx(0.25)
    assert importance_cv2(torch.tensor([3e-4, 1e-4])).item() == pytest.approx(0.25)  # of any size


def test_label_pool_nll_uses_known_sources_only() -> None:
    logprobs = torch.tensor([[0.5, 0.25], [0.5, float("nan")], [float("nan"), float("nan")]]).log()
    weights = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.5, 0.5]], requires_grad=True)
    nll = label_pool_nll(weights, logprobs)
    assert nll.tolist() == pytest.approx([-math.log(0.3), math.log(2), 0.0])
    (grad,) = torch.autograd.grad(nll.sum(), weights)
    assert grad.isfinite().all()
    assert grad[0, 0] < grad[0, 1]
    assert grad[2].tolist() == [0.0, 0.0]
