"""Our reading of other systems' recipes: their published sizes, real bytes, and hand-made rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.store_recipes import (
    BUDGET,
    RECOMMENDED,
    DistillKit,
    as_bytes,
    best_entries,
    best_least_tail,
    from_bfloat16,
    fusellm,
    fusellm_bytes_per_position,
    fusellm_with_tail,
    id_bits,
    pack_ids,
    to_bfloat16,
    unpack_ids,
)
from store_schema.encoding.fidelity import measure, with_least_tail

QWEN_VOCAB_SIZE = 151_936
RECIPES = {"recommended": RECOMMENDED, "budget": BUDGET}


def full_rows(num_rows: int, vocab_size: int, seed: int = 0, sharpness: float = 3.0):
    """Full log-probabilities, float32."""
    logits_RV = np.random.default_rng(seed).normal(size=(num_rows, vocab_size)) * sharpness
    return torch.log_softmax(torch.from_numpy(logits_RV), -1).float().numpy()


@pytest.mark.parametrize(("recipe", "expected"), [(RECOMMENDED, 344), (BUDGET, 127)])
def test_sizes_are_the_published_ones(recipe: DistillKit, expected: int) -> None:
    assert recipe.bytes_per_position(QWEN_VOCAB_SIZE) == expected
    packed_RC = recipe.pack(full_rows(3, QWEN_VOCAB_SIZE))
    assert packed_RC.shape == (3, expected)
    assert len(packed_RC.tobytes()) == 3 * expected


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("vocab_size", [32_768, 32_769, 131_072])
def test_real_bytes_are_as_many_as_the_formula_says(name: str, vocab_size: int) -> None:
    packed_RC = RECIPES[name].pack(full_rows(2, vocab_size))
    assert packed_RC.shape[1] == RECIPES[name].bytes_per_position(vocab_size)


def test_fusellm_sizes() -> None:
    assert fusellm_bytes_per_position(32_768, packed_ids=True) == 39  # 150 bits and ten halves
    assert fusellm_bytes_per_position(QWEN_VOCAB_SIZE, packed_ids=True) == 43
    assert fusellm_bytes_per_position(32_768, packed_ids=False) == 60


@pytest.mark.parametrize(
    ("vocab_size", "bits"), [(2, 1), (32_768, 15), (32_769, 16), (151_936, 18), (262_144, 18)]
)
def test_id_bits(vocab_size: int, bits: int) -> None:
    assert id_bits(vocab_size) == bits
    ids_RK = np.random.default_rng(0).integers(0, vocab_size, (5, 13)).astype(np.uint32)
    ids_RK[0, :2] = 0, vocab_size - 1
    packed_RC = pack_ids(ids_RK, bits)
    assert packed_RC.shape == (5, -(-13 * bits // 8))
    np.testing.assert_array_equal(unpack_ids(packed_RC, bits, 13), ids_RK)


def test_bfloat16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([-np.exp(rng.normal(size=2000) * 4), np.arange(-9, 0, 2**-7)])
    values = values.astype(np.float32)  # the grid above has ties, which go to the even neighbour
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), expected)


def test_best_entries_fall() -> None:
    full_RV = full_rows(4, 300)
    ids_RK, logs_RK = best_entries(full_RV, 20)
    expected_RK = np.sort(full_RV, axis=1)[:, ::-1][:, :20]
    np.testing.assert_array_equal(logs_RK, expected_RK)
    np.testing.assert_array_equal(np.take_along_axis(full_RV, ids_RK.astype(int), 1), logs_RK)


@pytest.mark.parametrize("name", RECIPES)
def test_a_row_that_the_terms_can_follow_comes_back(name: str) -> None:
    """What is left is bfloat16 at the exact entries and float32 at the others."""
    recipe, size = RECIPES[name], 4_096
    rank = np.arange(size)
    logits = -np.sqrt(np.maximum(rank - recipe.num_exact, 0) / 8) - 0.02 * rank
    order = np.random.default_rng(0).permutation(size)
    full_RV = torch.log_softmax(torch.from_numpy(logits[None]), -1).float().numpy()[:, order]
    rows = recipe.compress(full_RV)
    ids_E = rows.entry_ids_E.astype(int)
    assert len(ids_E) == recipe.num_entries
    true_E = full_RV[0, ids_E]
    np.testing.assert_array_equal(np.sort(true_E)[::-1], true_E)
    error_E = np.abs(rows.entry_logprobs_E - true_E)
    exact = recipe.num_exact
    assert error_E[:exact].max() <= np.abs(true_E[:exact]).max() * 2**-8
    assert error_E[exact:].max() < 5e-5
    assert rows.tail_mass_R[0] == pytest.approx(1 - np.exp(rows.entry_logprobs_E).sum(), abs=1e-12)


def test_the_fit_is_plain_least_squares() -> None:
    """Over the rank of the entries that are not exact, with every term, in float32 in the end."""
    full_RV = full_rows(3, 4_096)
    rows = RECOMMENDED.compress(full_RV)
    logs_RK = best_entries(full_RV, 128)[1].astype(np.float64)
    rank = np.arange(112) / 111
    terms = np.stack([rank**0, rank, rank**2, rank**3, rank**4, np.sqrt(rank)], axis=1)
    for row in range(3):
        fit = terms @ np.linalg.lstsq(terms, logs_RK[row, 16:], rcond=None)[0]
        stored = rows.entry_logprobs_E.reshape(3, 128)[row, 16:]
        np.testing.assert_allclose(stored, fit, atol=1e-4)
        assert np.abs(fit - logs_RK[row, 16:]).max() > 1e-3  # the row is no polynomial


def test_only_the_bytes_reach_the_reader() -> None:
    full_RV = full_rows(2, 1_000)
    packed_RC = BUDGET.pack(full_RV)
    ids_RK, logs_RK = best_entries(full_RV, 50)
    np.testing.assert_array_equal(unpack_ids(packed_RC[:, :63], 10, 50), ids_RK)
    exact_R1 = np.ascontiguousarray(packed_RC[:, 63:65]).view("<u2")
    np.testing.assert_array_equal(exact_R1, to_bfloat16(logs_RK[:, :1]))
    packed_RC[:, 65:] = as_bytes(np.array([[-7.0, 0.0, 0.0]] * 2, "<f4"))
    rows = BUDGET.unpack(packed_RC, 1_000)
    np.testing.assert_array_equal(rows.entry_logprobs_E.reshape(2, 50)[:, 1:], -7.0)


def test_mass_past_one_is_scaled_and_leaves_no_tail() -> None:
    """One sure token: a fit that must start right after it overshoots."""
    logits = np.concatenate([[20.0], -np.sqrt(np.arange(999.0))])
    full_RV = torch.log_softmax(torch.from_numpy(logits[None]), -1).float().numpy()
    packed_RC = BUDGET.pack(full_RV)
    packed_RC[:, 65:] = as_bytes(np.array([[0.5, -3.0, 0.0]], "<f4"))
    rows = BUDGET.unpack(packed_RC, 1_000)
    assert rows.tail_mass_R[0] == 0
    assert np.exp(rows.entry_logprobs_E).sum() == pytest.approx(1, abs=1e-12)
    # A fit above 0 is read as 0: no entry is more likely than a sure one.
    np.testing.assert_allclose(rows.entry_logprobs_E[0], rows.entry_logprobs_E[1], atol=1e-6)
    assert measure(full_RV, rows).num_infinite == 1


def test_the_gift_of_distillkit_is_its_best_constant() -> None:
    full_RV = full_rows(40, 2_000, sharpness=5.0)
    rows = BUDGET.compress(full_RV)
    assert (rows.tail_mass_R == 0).any()
    best = best_least_tail(full_RV, rows)

    def kl_nats(least: float) -> float:
        return measure(full_RV, with_least_tail(rows, least)).means().kl_nats

    assert best > 1e-9
    assert kl_nats(best) <= min(kl_nats(best / 10**0.5), kl_nats(best * 10**0.5))
    assert best_least_tail(full_rows(4, 2_000, sharpness=0.1), BUDGET.compress(
        full_rows(4, 2_000, sharpness=0.1)
    )) == pytest.approx(1e-9)  # fmt: skip


def test_fusellm_as_published_is_the_softmax_over_ten_with_its_best_epsilon() -> None:
    full_RV = full_rows(30, 500)
    rows = fusellm(full_RV)
    ids_RK, logs_RK = best_entries(full_RV, 10)
    np.testing.assert_array_equal(rows.entry_ids_E.reshape(-1, 10), ids_RK)
    epsilon = rows.tail_mass_R[0]
    assert 0 < epsilon < 1
    np.testing.assert_allclose(rows.tail_mass_R, epsilon)
    halves_RK = logs_RK.astype(np.float16).astype(np.float64)
    softmax_RK = np.exp(halves_RK) / np.exp(halves_RK).sum(1, keepdims=True)
    stored_RK = np.exp(rows.entry_logprobs_E.reshape(-1, 10))
    np.testing.assert_allclose(stored_RK, softmax_RK * (1 - epsilon), rtol=1e-9)
    base = measure(full_RV, rows).means().kl_nats
    assert np.isfinite(base)
    for other in (0.97 * epsilon, 1.03 * epsilon):
        again = stored_RK / (1 - epsilon) * (1 - other)
        moved = type(rows)(
            rows.entry_ids_E,
            np.log(again).ravel(),
            rows.offsets_R1,
            np.full_like(rows.tail_mass_R, other),
        )
        assert measure(full_RV, moved).means().kl_nats > base


def test_fusellm_with_tail_keeps_its_mass() -> None:
    full_RV = full_rows(30, 500)
    rows = fusellm_with_tail(full_RV)
    logs_RK = best_entries(full_RV, 10)[1]
    halves_RK = logs_RK.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(rows.tail_mass_R, 1 - np.exp(halves_RK).sum(1), atol=1e-12)
    np.testing.assert_array_equal(rows.entry_logprobs_E.reshape(-1, 10), halves_RK)
    assert measure(full_RV, rows).kl_nats < measure(full_RV, fusellm(full_RV)).kl_nats


def test_the_least_tail_makes_every_recipe_finite() -> None:
    full_RV = full_rows(20, 32_768, sharpness=12.0)
    for stored in (RECOMMENDED.compress(full_RV), fusellm_with_tail(full_RV)):
        least = best_least_tail(full_RV, stored)
        assert measure(full_RV, with_least_tail(stored, least)).num_infinite == 0
    assert measure(full_RV, fusellm_with_tail(full_RV)).num_infinite > 0
    assert measure(full_RV, fusellm(full_RV)).num_infinite == 0
    assert RECOMMENDED.bytes_per_position(32_768) == 296
    assert fusellm_bytes_per_position(32_768, packed_ids=True) == 39
