"""Every divergence, with every option, against its definition in dense float64 lines."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_train.divergences import DIVERGENCES
from fuse_train.divergences.classes import Classes, interpolated
from fuse_train.divergences.divergence import Divergence
from fuse_train.losses.losses import SourceRows, head_loss, with_temperature
from fuse_train.model.heads import Head
from tests.dense_loss import dense_total

NAMES = DIVERGENCES.names()
H, V = 6, 30


def problem(seed: int, num_rows: int = 9, num_sources: int = 3, k: int = 5):
    g = torch.Generator().manual_seed(seed)
    double = {"generator": g, "dtype": torch.float64}
    hidden = torch.randn(num_rows, H, **double).requires_grad_()
    weight = torch.randn(V, H, **double).requires_grad_()
    labels = torch.randint(V, (num_rows,), generator=g)
    shape = (num_rows, num_sources, k)
    ids = torch.rand(*shape[:2], V, generator=g).argsort(-1)[..., :k]
    counts = torch.randint(1, k + 1, (*shape[:2], 1), generator=g)
    present = torch.arange(k) < counts
    mass = torch.rand(*shape[:2], k + 1, **double) + 1e-3
    mass[..., :k] *= present
    mass = mass / mass.sum(-1, keepdim=True)
    rows = SourceRows(ids.masked_fill(~present, -1), mass[..., :k], mass[..., k])
    clm = torch.rand(num_rows, **double)
    fusion = torch.rand(*shape[:2], **double).requires_grad_()
    return hidden, weight, labels, clm, rows, fusion


def compare(kind: Divergence, seed: int, *, chunk_rows: int = 4, **head) -> None:
    hidden, weight, labels, clm, rows, fusion = problem(seed)
    expected = dense_total(hidden, weight, labels, clm, rows, fusion, kind, **head)
    wrt = (hidden, weight, fusion)
    expected_grads = torch.autograd.grad(expected, wrt)
    got = head_loss(
        hidden,
        Head(weight, None, head.get("scale", 1.0), head.get("cap")),
        labels,
        clm,
        rows,
        fusion,
        divergence=kind,
        chunk_rows=chunk_rows,
    )
    assert got.total.item() == pytest.approx(expected.item(), rel=1e-10)
    for ours, theirs in zip(torch.autograd.grad(got.total, wrt), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [None, 0.0, 0.35, 1.0])
def test_value_and_gradient_equal_the_definition(name, temperature, share) -> None:
    if name == "uld" and share == 0.0:
        share = 0.01  # the target against itself: |x| has no slope at 0
    compare(Divergence(name, 0.3, temperature, share), seed=7)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    beta=st.floats(0.05, 0.95),
    temperature=st.floats(0.9, 5.0),
    share=st.none() | st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
    chunk_rows=st.integers(1, 12),
    scale=st.sampled_from([1.0, 0.4]),
    cap=st.sampled_from([None, 3.0]),
)
def test_every_option_equals_the_definition(
    name, beta, temperature, share, seed, chunk_rows, scale, cap
) -> None:
    if name == "uld" and share is not None:
        share = max(share, 0.01)  # |x| has no slope at 0
    kind = Divergence(name, beta, temperature, share)
    compare(kind, seed, chunk_rows=chunk_rows, scale=scale, cap=cap)


def full_classes(p: torch.Tensor, q: torch.Tensor) -> Classes:
    """All but the last of the classes as entries, the last as tail."""
    return Classes(
        p[..., :-1].double(),
        p[..., -1].double(),
        q[..., :-1].double(),
        q[..., :-1].double().log(),
        q[..., -1].double(),
    )


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "uld"])
def test_zero_where_both_agree_and_above_it_elsewhere(name) -> None:
    g = torch.Generator().manual_seed(1)
    p, q = (torch.rand(20, 1, 6, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    value, slope = Divergence(name, 0.5).value_and_slope(full_classes(p, p))
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
    assert bool((Divergence(name, 0.5).value_and_slope(full_classes(p, q))[0] > 1e-4).all())


def test_jsd_is_bounded_and_symmetric_in_the_middle() -> None:
    p = torch.tensor([[[0.98, 0.01, 0.01]]], dtype=torch.float64)
    q = torch.tensor([[[0.01, 0.01, 0.98]]], dtype=torch.float64)
    one, _ = Divergence("jsd", 0.5).value_and_slope(full_classes(p, q))
    two, _ = Divergence("jsd", 0.5).value_and_slope(full_classes(q, p))
    assert one.item() == pytest.approx(two.item())
    assert 0.5 < one.item() < math.log(2)


def test_taid_goes_from_the_target_to_the_source() -> None:
    p = torch.tensor([[[0.7, 0.0, 0.3]]], dtype=torch.float64)
    q = torch.tensor([[[0.2, 0.5, 0.3]]], dtype=torch.float64)
    classes = full_classes(p, q)
    source = interpolated(classes, 1.0)
    torch.testing.assert_close(source.p_RMK, classes.p_RMK)
    torch.testing.assert_close(source.tail_RM, classes.tail_RM)
    half = interpolated(classes, 0.5)
    weight = torch.tensor([math.sqrt(0.14), 0.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(half.p_RMK[0, 0], (weight / weight.sum())[:2])


def test_a_source_without_distributions_has_no_effect_under_taid() -> None:
    """Dropped tail, no entry: all classes are 0, and no NaN comes of it."""
    none, one = torch.zeros(1, 1, 2), torch.ones(1, 1)
    nothing = Classes(none, 0 * one, none, none, one)
    mixed = interpolated(nothing, 0.5)
    assert mixed.p_RMK.tolist() == [[[0.0, 0.0]]]
    assert mixed.tail_RM.tolist() == [[0.0]]


@pytest.mark.parametrize("name", NAMES)
def test_impossible_entries_and_sure_targets_stay_finite(name) -> None:
    """Entries of probability 0, and a target whose mass outside the entries underflows."""
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.full((V, 1), -1e4)
    weight[:3] = 0.0
    weight.requires_grad_()
    ids = torch.arange(3).expand(2, 1, 3)
    rows = SourceRows(
        ids, torch.tensor([[[0.5, 0.0, 0.0]]]).expand(2, 1, 3), torch.full((2, 1), 0.5)
    )
    for share in (None, 0.5):
        kind = Divergence(name, 0.5, source_share=share)
        loss = head_loss(
            hidden, Head(weight), torch.zeros(2).long(), torch.zeros(2), rows, torch.ones(2, 1),
            divergence=kind,
        )  # fmt: skip
        grads = torch.autograd.grad(loss.total, (hidden, weight))
        assert loss.total.isfinite()
        assert all(bool(g.isfinite().all()) for g in grads)


def test_temperature_softens_and_keeps_the_sum() -> None:
    ids = torch.tensor([[[4, 7, -1]], [[-1, -1, -1]]])
    rows = SourceRows(ids, torch.tensor([[[0.64, 0.04, 0.0]], [[0.0, 0.0, 0.0]]]),
                      torch.tensor([[0.32], [1.0]]))  # fmt: skip
    soft = with_temperature(rows, 2.0)
    roots = torch.tensor([0.8, 0.2, math.sqrt(0.32)])
    expected = torch.tensor([0.8, 0.2, 0.0]) / roots.sum()
    torch.testing.assert_close(soft.entry_probs_RMK[0, 0], expected)
    torch.testing.assert_close(soft.tail_RM[:, 0], torch.tensor([roots[2] / roots.sum(), 1.0]))
    assert with_temperature(rows, 1.0) is rows
