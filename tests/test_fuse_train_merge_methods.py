"""Methods of merging: against float64, what holds whatever the weights, and the parts they share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse_train.merge import MERGES
from fuse_train.merge.deltas import elected
from fuse_train.merge.draws import uniform
from fuse_train.merge.kind import Block
from fuse_train.merge.largest import find_largest
from fuse_train.merge.recipe import parse_recipe
from store_schema.config import StrictModel
from store_schema.errors import ConfigError
from tests import merge_reference as reference

NAME = "model.layers.0.mlp.up_proj.weight"
SEED = 7
WITH_BASE = [kind.name for kind in MERGES if kind.needs_base]


def merged(
    method: str,
    models: torch.Tensor,
    base: torch.Tensor | None = None,
    weights: tuple[float, ...] | None = None,
    block: int | None = None,
    seed: int = SEED,
    **options: Any,
) -> torch.Tensor:
    """One tensor merged, in blocks of `block` elements (whole rows where the method needs them)."""
    given = {"method": method, "seed": seed}
    if options:
        given[method] = options
    recipe = parse_recipe(given)
    kind, shape = recipe.kind, models.shape[1:]
    total, row = math.prod(shape), shape[-1]
    step = block or total
    if kind.whole_rows:
        step = max(1, step // row) * row
    blocks = [
        Block(
            name=NAME,
            start=start,
            row_length=row,
            models_KE=models.reshape(len(models), -1)[:, start : start + step],
            base_E=base.reshape(-1)[start : start + step] if kind.needs_base else None,
            weights_K=torch.tensor(weights or (1.0,) * len(models)),
            seed=seed,
        )
        for start in range(0, total, step)
    ]
    measured = kind.measure(blocks, recipe.options)
    parts = [kind.merge(one, measured, recipe.options) for one in blocks]
    assert all(part.dtype == torch.float32 for part in parts)
    return torch.cat(parts).view(shape)


def made(
    k: int = 3, shape: tuple[int, ...] = (24, 40), seed: int = 0, spread: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A base and models that were trained from it, as far as numbers go."""
    drawn = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=drawn)
    return base, base + spread * torch.randn((k, *shape), generator=drawn)


def close(got: torch.Tensor, expected: Any, tolerance: float = 2e-6) -> None:
    scale = float(np.abs(expected).max())
    assert float(np.abs(got.double().numpy() - expected).max()) <= tolerance * scale


WEIGHTS = (0.7, 1.2, 0.4)


@pytest.mark.parametrize("shape", [(24, 40), (57,), (3, 8, 10)])
def test_linear_is_the_weighted_mean(shape: tuple[int, ...]) -> None:
    _, models = made(shape=shape)
    close(
        merged("linear", models, weights=WEIGHTS),
        reference.linear(models.double().numpy(), WEIGHTS),
    )
    close(
        merged("linear", models, weights=WEIGHTS, normalize=False),
        reference.linear(models.double().numpy(), WEIGHTS, normalize=False),
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_slerp_is_the_arc(t: float, spread: float) -> None:
    _, models = made(2, spread=spread)
    close(merged("slerp", models, t=t), reference.slerp(models.double().numpy(), t=t))
    if t in (0.0, 1.0):
        close(merged("slerp", models, t=t), models[int(t)].double().numpy())


def test_slerp_of_what_has_no_angle() -> None:
    one = torch.randn(4, 5)
    nothing = torch.zeros(4, 5)
    close(merged("slerp", torch.stack([one, nothing]), t=0.25), _slerp([one, nothing], 0.25))
    assert torch.equal(merged("slerp", torch.stack([nothing, nothing])), nothing)
    close(merged("slerp", torch.stack([one, -one]), t=0.25), 0.5 * one.double().numpy())
    close(merged("slerp", torch.stack([one, one]), t=0.25), one.double().numpy())


def _slerp(models: list[torch.Tensor], t: float) -> Any:
    return reference.slerp(torch.stack(models).double().numpy(), t=t)


@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic_adds_differences(normalize: bool) -> None:
    base, models = made()
    got = merged("task_arithmetic", models, base, WEIGHTS, scale=0.4, normalize=normalize)
    arrays = (base.double().numpy(), models.double().numpy())
    close(got, reference.task_arithmetic(*arrays, WEIGHTS, scale=0.4, normalize=normalize))


@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_ties_trims_elects_and_merges(density: float, normalize: bool) -> None:
    base, models = made()
    got = merged("ties", models, base, WEIGHTS, density=density, scale=1.5, normalize=normalize)
    deltas = reference.trimmed((models - base).double().numpy(), density)
    expected = reference.with_elected_sign(
        base.double().numpy(), deltas, WEIGHTS, scale=1.5, normalize=normalize
    )
    close(got, expected)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("rescale", [False, True])
def test_dare_drops_and_rescales(density: float, rescale: bool) -> None:
    base, models = made()
    deltas = (models - base).double().numpy()
    keep = np.full(deltas.shape, density)
    left = reference.dropped(deltas, keep, name=NAME, seed=SEED, rescale=rescale)
    got = merged("dare_linear", models, base, WEIGHTS, density=density, rescale=rescale)
    close(got, base.double().numpy() + np.tensordot(np.asarray(WEIGHTS), left, 1))
    got = merged("dare_ties", models, base, WEIGHTS, density=density, rescale=rescale)
    close(got, reference.with_elected_sign(base.double().numpy(), left, WEIGHTS, normalize=False))


@pytest.mark.parametrize("shape", [(24, 40), (57,), (3, 8, 10), (9, 1)])
@pytest.mark.parametrize("rescale", [False, True])
def test_della_drops_by_rank(shape: tuple[int, ...], rescale: bool) -> None:
    base, models = made(shape=shape)
    deltas = (models - base).double().numpy()
    keep = reference.magprune((models - base).numpy(), 0.4, 0.2).astype(np.float64)
    left = reference.dropped(deltas, keep, name=NAME, seed=SEED, rescale=rescale)
    got = merged("della", models, base, WEIGHTS, density=0.4, epsilon=0.2, rescale=rescale)
    close(got, reference.with_elected_sign(base.double().numpy(), left, WEIGHTS), 5e-6)
    whole = merged("della", models, base, WEIGHTS, density=1.0)
    close(whole, reference.with_elected_sign(base.double().numpy(), deltas, WEIGHTS))


def test_varm_weighs_by_what_moved() -> None:
    base, models = made()
    models[1] = base + 5 * (models[1] - base)
    close(
        merged("varm", models, base), reference.varm(base.double().numpy(), models.double().numpy())
    )
    close(merged("varm", base.expand(3, -1, -1).clone(), base), base.double().numpy())


@pytest.mark.parametrize("density", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("select_for", ["all", "weights"])
@pytest.mark.parametrize("spread", [1e-5, 0.1])
def test_sce_selects_calculates_and_erases(density: float, select_for: str, spread: float) -> None:
    base, models = made(4, spread=spread)
    models[1] = base + 3 * (models[1] - base)
    got = merged("sce", models, base, density=density, select_for=select_for)
    arrays = (base.double().numpy(), models.double().numpy())
    expected = reference.sce(*arrays, density=density, filters=select_for == "all")
    close(got, expected)
    moved = float(np.abs(expected - arrays[0]).max())
    assert moved == 0 or float(np.abs(got.double().numpy() - expected).max()) < 0.02 * moved


def test_sce_leaves_what_it_does_not_select() -> None:
    base, models = made()
    got = merged("sce", models, base, density=0.1)
    assert int((got != base).sum()) == base.numel() // 10
    got = merged("sce", models, base, density=0.1, select_for="weights")
    assert int((got != base).sum()) > 0.9 * base.numel()


# ------------------------------------------------------------------------ whatever the weights are

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 12))
SEEDS = st.integers(0, 10_000)


@given(shape=SHAPES, seed=SEEDS, block=st.integers(5, 40), bf16=st.booleans())
@pytest.mark.parametrize("method", MERGES.names())
def test_blocks_of_any_size_give_the_same(
    method: str, shape: tuple[int, int], seed: int, block: int, bf16: bool
) -> None:
    base, models = made(2, shape, seed)
    if bf16:  # differences of rounded weights are often equal to one another
        base, models = base.bfloat16().float(), models.bfloat16().float()
    whole, parts = merged(method, models, base), merged(method, models, base, block=block)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


@given(shape=SHAPES, seed=SEEDS, k=st.integers(2, 4))
@pytest.mark.parametrize("method", MERGES.names())
def test_models_that_are_the_same_are_what_comes_out(
    method: str, shape: tuple[int, int], seed: int, k: int
) -> None:
    base, models = made(1, shape, seed)
    k = 2 if method == "slerp" else k
    same = models.expand(k, -1, -1).clone()
    options: dict[str, Any] = {}
    if method in ("ties", "dare_linear", "dare_ties", "della", "sce"):
        options["density"] = 1.0
    weights = (1 / k,) * k if method in ("task_arithmetic", "dare_linear", "dare_ties") else None
    got = merged(method, same, base, weights, **options)
    torch.testing.assert_close(got, models[0], rtol=1e-5, atol=1e-5)


@given(shape=SHAPES, seed=SEEDS)
@pytest.mark.parametrize("method", WITH_BASE)
def test_models_that_did_not_move_leave_the_base(
    method: str, shape: tuple[int, int], seed: int
) -> None:
    base, _ = made(1, shape, seed)
    torch.testing.assert_close(merged(method, base.expand(3, -1, -1).clone(), base), base)


@given(shape=SHAPES, seed=SEEDS, order=st.permutations(range(3)))
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "varm", "sce"])
def test_the_order_of_models_does_not_matter(
    method: str, shape: tuple[int, int], seed: int, order: list[int]
) -> None:
    base, models = made(3, shape, seed)
    weights = WEIGHTS if MERGES[method].weighted else None
    other = None if weights is None else tuple(weights[i] for i in order)
    # By variance, 2 entries may be equal up to rounding: all are selected where the order is tried.
    options = {"density": 1.0} if method == "sce" else {}
    torch.testing.assert_close(
        merged(method, models, base, weights, **options),
        merged(method, models[list(order)], base, other, **options),
        rtol=1e-5,
        atol=1e-5,
    )


@given(shape=SHAPES, seed=SEEDS, factor=st.floats(0.1, 10))
def test_weights_act_linearly(shape: tuple[int, int], seed: int, factor: float) -> None:
    base, models = made(3, shape, seed)
    scaled = tuple(factor * w for w in WEIGHTS)
    torch.testing.assert_close(
        merged("linear", models, weights=WEIGHTS),
        merged("linear", models, weights=scaled),
        rtol=1e-4,
        atol=1e-5,
    )
    moved = merged("task_arithmetic", models, base, WEIGHTS) - base
    more = merged("task_arithmetic", models, base, scaled) - base
    torch.testing.assert_close(more, factor * moved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_draws_depend_on_seed_and_nothing_else(method: str) -> None:
    base, models = made()
    once, again = merged(method, models, base), merged(method, models, base)
    assert torch.equal(once, again)
    assert not torch.equal(once, merged(method, models, base, seed=SEED + 1))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare_linear", {"density": 0.2}),
        ("della", {"density": 0.3, "epsilon": 0.2, "normalize": False}),
    ],
)
def test_what_is_dropped_at_random_is_right_in_the_mean(
    method: str, options: dict[str, Any]
) -> None:
    base, models = made(1, (40, 50))
    runs = torch.stack([merged(method, models, base, seed=s, **options) - base for s in range(400)])
    expected = models[0] - base
    kept = (runs != 0).double().mean(0)
    assert abs(float(kept.mean()) - options["density"]) < 0.005
    deviation = expected.abs() * ((1 / kept - 1).sqrt() / 20).float()
    assert float(((runs.mean(0) - expected).abs() / deviation).mean()) < 1.0  # 0.8 of a normal one
    if method == "della":
        largest = expected.abs().argmax(1)
        smallest = expected.abs().argmin(1)
        rows = torch.arange(len(kept))
        assert abs(float(kept[rows, largest].mean()) - 0.5) < 0.03
        assert abs(float(kept[rows, smallest].mean()) - 0.1) < 0.03


# ---------------------------------------------------------------------------------- parts they share


def test_draws_are_uniform_and_come_from_any_place() -> None:
    whole = uniform("a", seed=1, model=0, start=0, count=10_000)
    for start, count in ((0, 1), (1, 5), (4, 4), (999, 1_001), (9_999, 1)):
        part = uniform("a", seed=1, model=0, start=start, count=count)
        assert torch.equal(part, whole[start : start + count])
    assert float(whole.min()) >= 0
    assert float(whole.max()) < 1
    assert abs(float(whole.mean()) - 0.5) < 0.01
    for other in ({"name": "b"}, {"seed": 2}, {"model": 1}):
        given = {"name": "a", "seed": 1, "model": 0} | other
        drawn = uniform(str(given.pop("name")), **given, start=0, count=10_000)
        assert abs(float(torch.corrcoef(torch.stack([whole, drawn]))[0, 1])) < 0.03


def test_draws_stay_what_they_are() -> None:
    got = uniform("model.norm.weight", seed=3, model=1, start=5, count=4)
    expected = torch.tensor(DRAWN)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


DRAWN = [0.9769797921180725, 0.44940996170043945, 0.24911564588546753, 0.05760550498962402]

VALUES = st.lists(
    st.one_of(
        st.floats(0, 2.0**99, width=32), st.sampled_from([0.0, 1.0, 1.5, 1e-42, 3.0e38, 2.0**-126])
    ),
    min_size=1,
    max_size=40,
)


@given(values=VALUES, share=st.floats(0, 1), block=st.integers(1, 15))
def test_the_largest_are_those_of_a_stable_sort(
    values: list[float], share: float, block: int
) -> None:
    rows = torch.tensor([values, values[::-1]], dtype=torch.float32)
    count = int(share * len(values))
    starts = range(0, len(values), block)
    found = find_largest(
        lambda: ((s, rows[:, s : s + block]) for s in starts), lambda nonzero, total: count
    )
    got = torch.cat([found.mask(rows[:, s : s + block], s) for s in starts], 1)
    for row, kept in zip(rows, got, strict=True):
        best = np.argsort(-row.double().numpy(), kind="stable")[:count]
        assert sorted(kept.nonzero()[:, 0].tolist()) == sorted(best.tolist())


def test_how_many_are_not_zero_is_told() -> None:
    told = []
    rows = torch.tensor([[0.0, 1e-45, 2.0, 0.0, 3.0]])
    find_largest(lambda: [(0, rows)], lambda nonzero, total: told.append((nonzero, total)) or 1)
    assert told == [(3, 5)]


def test_the_sign_of_the_sum_is_elected() -> None:
    values = torch.tensor([[1.0, -1.0, 0.0, 2.0, -3.0], [-1.0, -1.0, 5.0, -3.0, 1.0]])
    assert elected(values).tolist() == [
        [True, True, False, False, True],
        [False, True, True, True, False],
    ]


# -------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "median"}, "Input should be 'linear'"),
        ({"method": "ties", "ties": {"density": 0.0}}, "ties.density"),
        ({"method": "ties", "ties": {"density": 1.2}}, "ties.density"),
        ({"method": "ties", "ties": {"top": 1.2}}, "ties.top: unknown key"),
        ({"method": "slerp", "slerp": {"t": 1.5}}, "slerp.t"),
        ({"method": "della", "della": {"density": 0.1}}, "must be above 0"),
        ({"method": "della", "della": {"density": 0.9}}, "their sum 1 at most"),
        ({"method": "sce", "sce": {"select_for": "eta"}}, "sce.select_for"),
        ({"method": "linear", "dtype": "int8"}, "must be one of auto, bfloat16"),
        ({"method": "linear", "seed": -1}, "seed"),
        ({"method": "linear", "weights": [float("nan")]}, "weights"),
    ],
)
def test_bad_recipes_are_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match="recipe refused") as caught:
        parse_recipe(given)
    assert says in caught.value.line()


@pytest.mark.parametrize(
    ("given", "models", "base", "says"),
    [
        ({"method": "linear"}, 1, False, "expected 2 or more, got 1"),
        ({"method": "linear"}, 2, True, "the method has no base"),
        ({"method": "slerp"}, 3, False, "expected 2, got 3"),
        ({"method": "sce"}, 1, True, "2 or more beside the base"),
        ({"method": "sce"}, 2, False, "--base"),
        ({"method": "sce", "weights": [1, 1]}, 2, True, "takes no weights"),
        ({"method": "ties", "weights": [1, 1]}, 3, True, "3, one for each model, got 2"),
        ({"method": "linear", "weights": [1, -1]}, 2, False, "weights sum to 0"),
        (
            {"method": "task_arithmetic", "weights": [1, -1], "task_arithmetic": {"normalize": True}},
            2, True, "weights sum to 0",
        ),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit_the_models_are_refused(
    given: dict[str, Any], models: int, base: bool, says: str
) -> None:
    recipe = parse_recipe(given)
    with pytest.raises(ConfigError) as caught:
        recipe.require_models(models, with_base=base)
    assert says in caught.value.line()


def test_a_recipe_is_what_its_method_needs() -> None:
    assert parse_recipe({"method": "linear"}).content() == {
        "method": "linear", "weights": None, "dtype": "auto", "linear": {"normalize": True},
    }  # fmt: skip
    assert parse_recipe({"method": "varm", "dtype": "bf16"}).content() == {
        "method": "varm", "dtype": "bfloat16",
    }  # fmt: skip
    assert set(parse_recipe({"method": "dare_ties"}).content()) == {
        "method", "weights", "dtype", "seed", "dare_ties",
    }  # fmt: skip


def test_every_method_says_where_it_is_from() -> None:
    for kind in MERGES:
        assert kind.paper
        assert kind.summary
        assert kind.section is None or issubclass(kind.section, StrictModel)
