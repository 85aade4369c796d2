"""Fidelity against a slow dense reference, and its gradients against the fusion loss itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fuse_train.losses import losses
from fuse_train.model.heads import Head
from store_schema.encoding.fidelity import (
    LEAST_REST,
    POLICIES,
    FidelitySums,
    StoredRows,
    measure,
    with_least_tail,
)
from store_schema.errors import InputError

R, V = 37, 60
PRIORS = ("even", "unigram")


def log_softmax(logits_RV):
    top_R1 = logits_RV.max(1, keepdims=True)
    return logits_RV - top_R1 - np.log(np.exp(logits_RV - top_R1).sum(1, keepdims=True))


def problem(seed: int = 0):
    """Full rows, a student, a prior, and stored rows with 0 to 12 entries that are a little off."""
    rng = np.random.default_rng(seed)
    full_RV = log_softmax(rng.normal(size=(R, V)) * rng.uniform(0.5, 6, (R, 1)))
    student_RV = log_softmax(0.6 * full_RV + rng.normal(size=(R, V)))
    counts_R = rng.integers(0, 13, R)
    counts_R[:2] = 0, 12
    ids, logs, tails = [], [], []
    for row, count in enumerate(counts_R):
        best = np.argsort(-full_RV[row])[:count]
        kept = np.append(full_RV[row, best], np.log1p(-np.exp(full_RV[row, best]).sum() + 1e-9))
        kept = log_softmax(kept[None] + rng.normal(size=count + 1) * 0.1)[0]
        ids.append(best)
        logs.append(kept[:-1])
        tails.append(np.exp(kept[-1]))
    offsets_R1 = np.concatenate([[0], np.cumsum(counts_R)])
    rows = StoredRows(np.concatenate(ids), np.concatenate(logs), offsets_R1, np.array(tails))
    return full_RV, student_RV, rng.uniform(0.1, 3, V) ** 3, rows


def rows_of(ids, logprobs, tail):
    """One stored row."""
    return StoredRows(np.array(ids), np.array(logprobs), np.array([0, len(ids)]), np.array([tail]))


def with_offsets(offsets):
    """Rows with one entry and offsets that need not fit it."""
    tails = np.full(len(offsets) - 1, 0.5)
    return StoredRows(np.array([1]), np.log([0.5]), np.array(offsets), tails)


def dense_rows(rows, prior_V):
    """[R, V] the stored distribution with its tail spread."""
    stored_RV = np.zeros((len(rows), V))
    for row in range(len(rows)):
        entries = slice(*rows.offsets_R1[row : row + 2])
        other_V = prior_V.astype(np.float64).copy()
        other_V[rows.entry_ids_E[entries]] = 0
        stored_RV[row] = rows.tail_mass_R[row] * other_V / other_V.sum()
        stored_RV[row, rows.entry_ids_E[entries]] = np.exp(rows.entry_logprobs_E[entries])
    return stored_RV


def loss_gradients(student_RV, rows, policy):
    """[R, V] gradient of the trainer's own loss with respect to the student's logits."""
    counts_R = np.diff(rows.offsets_R1)
    width = max(1, counts_R.max())
    ids = torch.full((len(rows), 1, width), -1)
    probs = torch.zeros((len(rows), 1, width), dtype=torch.float64)
    for row, count in enumerate(counts_R):
        entries = slice(*rows.offsets_R1[row : row + 2])
        ids[row, 0, :count] = torch.as_tensor(rows.entry_ids_E[entries].astype(np.int64))
        probs[row, 0, :count] = torch.as_tensor(np.exp(rows.entry_logprobs_E[entries]))
    sources = losses.SourceRows(ids, probs, torch.as_tensor(rows.tail_mass_R)[:, None])
    logits_RV = torch.tensor(student_RV, requires_grad=True)
    identity = Head(torch.eye(student_RV.shape[1], dtype=torch.float64), None, 1.0, None)
    loss = losses.head_loss(
        logits_RV,
        identity,
        torch.zeros(len(rows), dtype=torch.int64),
        torch.zeros(len(rows), dtype=torch.float64),
        losses.with_tail_policy(sources, policy),
        torch.ones((len(rows), 1), dtype=torch.float64),
        chunk_rows=16,
    )
    torch.autograd.backward(loss.total)
    return logits_RV.grad.numpy()


def vector_figures(full, stored):
    """Angle in degrees, and relative norm error, of two vectors."""
    norms = np.linalg.norm(full), np.linalg.norm(stored)
    cosine = (full * stored).sum() / (norms[0] * norms[1])
    return math.degrees(math.acos(cosine)), abs(norms[1] - norms[0]) / norms[0]


@pytest.mark.parametrize("spread", PRIORS)
def test_distances_are_those_of_the_dense_distributions(spread: str) -> None:
    full_RV, _, prior_V, rows = problem()
    given_V = None if spread == "even" else prior_V
    found = measure(full_RV, rows, prior_V=given_V).means()
    stored_RV = dense_rows(rows, np.ones(V) if given_V is None else prior_V)
    np.testing.assert_allclose(stored_RV.sum(1), 1, rtol=1e-12)
    p_RV = np.exp(full_RV)
    assert found.kl_nats == pytest.approx((p_RV * (full_RV - np.log(stored_RV))).sum(1).mean())
    assert found.total_variation == pytest.approx(np.abs(p_RV - stored_RV).sum(1).mean() / 2)
    assert found.entries_per_row == len(rows.entry_ids_E) / R
    assert found.tail_mass == pytest.approx(rows.tail_mass_R.mean())
    assert (found.num_rows, found.num_infinite) == (R, 0)
    assert math.isnan(found.gradient_angle_degrees)
    assert math.isnan(found.row_norm_error)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_of_the_fusion_loss(policy) -> None:
    full_RV, student_RV, _, rows = problem()
    found = measure(full_RV, rows, student_logprobs_RV=student_RV, tail_policy=policy).means()
    full = np.exp(student_RV) - np.exp(full_RV)
    stored = loss_gradients(student_RV, rows, policy)
    expected = vector_figures(full, stored)
    assert found.gradient_angle_degrees == pytest.approx(expected[0], rel=1e-9)
    assert found.gradient_norm_error == pytest.approx(expected[1], rel=1e-9)
    weight_R = np.linalg.norm(full, axis=1)
    by_row = [
        vector_figures(*pair) if np.any(pair[1]) else (90.0, 1.0)
        for pair in zip(full, stored, strict=True)
    ]
    assert found.row_angle_degrees == pytest.approx(
        np.average([a for a, _ in by_row], weights=weight_R)
    )
    assert found.row_norm_error == pytest.approx(
        np.average([e for _, e in by_row], weights=weight_R)
    )


def test_a_student_with_nothing_outside_the_entries_is_clamped_as_the_loss_clamps_it() -> None:
    assert LEAST_REST == losses.MIN_TAIL
    student = log_softmax(np.array([[30.0, 28.0, 1.0, 0.0]]))
    full = log_softmax(np.array([[2.0, 1.0, 0.0, 0.0]]))
    rows = rows_of([0, 1], full[0, :2], 1 - np.exp(full[0, :2]).sum())
    assert np.exp(student[0, 2:]).sum() < LEAST_REST
    found = measure(full, rows, student_logprobs_RV=student).means()
    stored = loss_gradients(student, rows, "bucket")
    angle, norm_error = vector_figures(np.exp(student) - np.exp(full), stored)
    assert found.gradient_angle_degrees == pytest.approx(angle)
    assert found.gradient_norm_error == pytest.approx(norm_error)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_keep_everything_are_exact(policy) -> None:
    full_RV, student_RV, prior_V, _ = problem()
    ids_RV = np.argsort(-full_RV, axis=1)
    logs_RV = np.take_along_axis(full_RV, ids_RV, 1)
    rows = StoredRows(ids_RV.ravel(), logs_RV.ravel(), np.arange(R + 1) * V, np.zeros(R))
    found = measure(
        full_RV, rows, prior_V=prior_V, student_logprobs_RV=student_RV, tail_policy=policy
    ).means()
    assert found.kl_nats == pytest.approx(0, abs=1e-12)
    assert found.total_variation == pytest.approx(0, abs=1e-12)
    assert found.gradient_angle_degrees == pytest.approx(0, abs=1e-5)
    assert found.row_angle_degrees == pytest.approx(0, abs=1e-5)
    assert found.gradient_norm_error == pytest.approx(0, abs=1e-12)


def test_a_tail_spread_by_the_truth_itself_costs_nothing() -> None:
    full_RV, _, _, _ = problem()
    best = np.argsort(-full_RV[0])[:5]
    rows = rows_of(best, full_RV[0, best], 1 - np.exp(full_RV[0, best]).sum())
    assert measure(full_RV[:1], rows, prior_V=np.exp(full_RV[0])).means().kl_nats == pytest.approx(
        0, abs=1e-12
    )
    assert measure(full_RV[:1], rows).means().kl_nats > 0.01


def test_no_tail_makes_kl_infinite_and_is_counted() -> None:
    full_RV, _, _, rows = problem()
    whole = measure(full_RV[1:2], rows[1:2])
    best = np.argsort(-full_RV[0])[:3]
    no_tail = rows_of(best, np.log([0.5, 0.3, 0.2]), 0.0)
    sums = measure(full_RV[:1], no_tail) + whole
    found = sums.means()
    assert (found.kl_nats, found.num_infinite, found.num_rows) == (math.inf, 1, 2)
    assert found.finite_kl_nats == whole.means().kl_nats
    difference = np.exp(full_RV[0]) - np.isin(np.arange(V), best[0]) * 0.5
    difference -= np.isin(np.arange(V), best[1]) * 0.3 + np.isin(np.arange(V), best[2]) * 0.2
    assert sums.total_variation - whole.total_variation == pytest.approx(
        np.abs(difference).sum() / 2
    )
    # A full row that has nothing outside either is no such row.
    certain = np.where(np.isin(np.arange(V), best), np.log(1 / 3), -np.inf)[None]
    assert measure(certain, no_tail).means().kl_nats == pytest.approx(
        -np.log(3) - np.log([0.5, 0.3, 0.2]).mean()
    )


def test_an_entry_of_no_probability_makes_kl_infinite_where_there_should_be_some() -> None:
    full_RV, _, _, _ = problem()
    rows = rows_of([3, 4], [np.log(0.5), -np.inf], 0.5)
    assert measure(full_RV[:1], rows).num_infinite == 1
    without = log_softmax(np.where(np.arange(V) == 4, -1e9, full_RV[:1]))
    assert measure(without, rows).num_infinite == 0


def test_ids_that_are_impossible_in_the_full_row_add_nothing() -> None:
    full = np.full((1, V), -np.inf)
    full[0, :4] = np.log([0.4, 0.3, 0.2, 0.1])
    found = measure(full, rows_of([0, 1], full[0, :2], 0.3)).means()
    share = 0.3 / (V - 2)
    assert found.kl_nats == pytest.approx(0.2 * np.log(0.2 / share) + 0.1 * np.log(0.1 / share))
    assert found.total_variation == pytest.approx(((0.3 - 2 * share) + (V - 4) * share) / 2)


def test_chunks_add_up() -> None:
    full_RV, student_RV, prior_V, rows = problem()
    parts = [slice(0, 5), slice(5, 6), slice(6, 6), slice(6, R)]
    total = sum(
        (
            measure(full_RV[s], rows[s], prior_V=prior_V, student_logprobs_RV=student_RV[s])
            for s in parts
        ),
        FidelitySums(),
    )
    whole = measure(full_RV, rows, prior_V=prior_V, student_logprobs_RV=student_RV)
    np.testing.assert_allclose(
        dataclasses.astuple(total.means()), dataclasses.astuple(whole.means()), rtol=1e-12
    )


def test_nothing_measured_is_not_a_number() -> None:
    found = FidelitySums().means()
    assert found.num_rows == 0
    assert math.isnan(found.kl_nats)
    assert math.isnan(found.gradient_angle_degrees)


def test_float32_inputs_of_a_large_vocabulary() -> None:
    """More ids than a chunk's share of a core's cache, in the dtypes that stores and models give."""
    rng = np.random.default_rng(0)
    size = 131_072
    full_RV = log_softmax(rng.normal(size=(3, size)) * 3).astype(np.float32)
    ids_RK = np.argsort(-full_RV, axis=1)[:, :50].astype(np.uint32)
    logs_RK = np.take_along_axis(full_RV, ids_RK, 1)
    tail_R = (1 - np.exp(logs_RK.astype(np.float64)).sum(1)).astype(np.float32)
    rows = StoredRows(ids_RK.ravel(), logs_RK.ravel(), np.arange(4, dtype=np.int64) * 50, tail_R)
    found = measure(full_RV, rows).means()
    p_RV = np.exp(full_RV.astype(np.float64))
    np.put_along_axis(p_RV, ids_RK.astype(np.int64), 0.0, 1)  # entries are exact and add nothing
    spread_R1 = tail_R.astype(np.float64)[:, None] / (size - 50)
    log_ratio_RV = np.where(p_RV > 0, full_RV.astype(np.float64) - np.log(spread_R1), 0)
    assert found.kl_nats == pytest.approx((p_RV * log_ratio_RV).sum(1).mean(), rel=1e-9)


def test_least_tail_moves_only_rows_that_have_less() -> None:
    full_RV, _, _, rows = problem()
    mended = with_least_tail(rows, 0.05)
    short_R = (rows.tail_mass_R < 0.05) & (np.diff(rows.offsets_R1) > 0)
    assert 0 < short_R.sum() < R
    np.testing.assert_array_equal(mended.tail_mass_R, np.where(short_R, 0.05, rows.tail_mass_R))
    np.testing.assert_allclose(mended.entry_mass() + mended.tail_mass_R, 1, rtol=1e-12)
    kept_E = ~np.repeat(short_R, np.diff(rows.offsets_R1))
    np.testing.assert_array_equal(mended.entry_logprobs_E[kept_E], rows.entry_logprobs_E[kept_E])
    best = np.argsort(-full_RV[0])[:3]
    no_tail = rows_of(best, np.log([0.5, 0.3, 0.2]), 0.0)
    assert math.isfinite(measure(full_RV[:1], with_least_tail(no_tail, 1e-9)).means().kl_nats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": rows_of([1], [math.log(0.5)], 0.4)}, "a stored row does not sum to 1 in row 0"),
        ({"rows": rows_of([1], [math.nan], 0.4)}, "a stored row does not sum to 1 in row 0"),
        ({"rows": rows_of([V], [math.log(0.5)], 0.5)}, "entry ids outside the vocabulary"),
        ({"rows": rows_of([-1], [math.log(0.5)], 0.5)}, "entry ids outside the vocabulary"),
        ({"full": problem()[0][:2]}, "stored rows do not fit the full ones"),
        ({"rows": with_offsets([1, 2])}, "offsets do not rise from 0"),
        ({"rows": with_offsets([0, 2])}, "offsets do not rise from 0"),
        ({"rows": with_offsets([0, 2, 1]), "full": problem()[0][:2]}, "offsets do not rise"),
        ({"full": problem()[0][:1] + 0.1}, "a full distribution does not sum to 1 in row 0"),
        ({"prior_V": np.ones(V - 1)}, "a prior of the wrong shape"),
        ({"prior_V": np.zeros(V)}, "a prior that is not positive everywhere"),
        ({"student_logprobs_RV": np.zeros((1, V - 1))}, "a student of the wrong shape"),
        ({"student_logprobs_RV": np.zeros((1, V))}, "a student's distribution does not sum to 1"),
    ],
)
def test_what_cannot_be_measured_is_named(change, message: str) -> None:
    options = {"full": problem()[0][:1], "rows": rows_of([1], [math.log(0.5)], 0.5)} | change
    with pytest.raises(InputError, match=message):
        measure(options.pop("full"), options.pop("rows"), **options)
