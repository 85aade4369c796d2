"""Every method that mergekit has, beside mergekit's own output on tiny Llamas, in float32."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import mergekit_merges as mergekit
from benchmarks.environments import UnavailableError
from fuse_train.merge import MERGES
from tests.command import ok
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RANDOM = {
    "dare_linear": ({"density": 0.3}, {"density": 0.3}),
    "della": (
        {"density": 0.4, "epsilon": 0.2, "normalize": False},
        {"density": 0.4, "epsilon": 0.2, "normalize": False},
    ),
}
ERROR = 1e-5


def trained(base: Path, folder: Path, seed: int) -> Path:
    """A copy of a model with noise on all of its weights."""
    tiny_model(folder)
    drawn = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor + 0.05 * seed * torch.randn(tensor.shape, generator=drawn)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and what was trained from it."""
    root = tmp_path_factory.mktemp("models")
    base = tiny_model(root / "base")
    return base, [trained(base, root / f"model-{seed}", seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def theirs(
    models: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """mergekit's folders, by case; one process for all, since its packages take seconds to load."""
    base, trained_models = models
    root = tmp_path_factory.mktemp("theirs")
    cases = mergekit.CASES | {
        method: mergekit.Case(method, (1.0,), own, other, num_models=1)
        for method, (own, other) in ((f"random {m}", o) for m, o in RANDOM.items())
    }
    jobs = {name: (case, root / str(number)) for number, (name, case) in enumerate(cases.items())}
    configs = []
    for name, (case, out) in jobs.items():
        config = case.config(base, trained_models[: case.num_models])
        config["merge_method"] = name.removeprefix("random ").partition(",")[0]
        configs.append((config, out))
    try:
        mergekit.merge_by_mergekit(configs)
    except UnavailableError as error:
        if os.environ.get("LOGITFUSE_REQUIRE_MERGEKIT"):
            raise
        pytest.skip(f"no mergekit: {error}")
    return {name: out for name, (_, out) in jobs.items()}


def merged(out: Path, words: list[str]) -> Path:
    """Our folder."""
    ok("merge", out, *words)
    return out


def test_every_method_of_ours_that_mergekit_has_is_compared() -> None:
    assert {case.method for case in mergekit.CASES.values()} == set(MERGES.names()) - {"varm"}


@pytest.mark.parametrize("name", mergekit.CASES)
def test_ours_is_theirs(
    name: str, models: tuple[Path, list[Path]], theirs: dict[str, Path], tmp_path: Path
) -> None:
    case, (base, trained_models) = mergekit.CASES[name], models
    own = merged(tmp_path / "own", case.words(base, trained_models[: case.num_models]))
    assert mergekit.largest_error(own, theirs[name]) <= ERROR


@pytest.mark.parametrize("method", RANDOM)
def test_what_is_dropped_at_random_is_as_much_as_theirs(
    method: str, models: tuple[Path, list[Path]], theirs: dict[str, Path], tmp_path: Path
) -> None:
    base, trained_models = models
    options, _ = RANDOM[method]
    case = mergekit.Case(method, (1.0,), options)
    own = merged(tmp_path / "own", case.words(base, trained_models[:1]))
    before = mergekit.weights_of(base)
    whole = mergekit.weights_of(trained_models[0])
    name = max(before, key=lambda tensor: before[tensor].numel())
    deltas = {
        who: mergekit.weights_of(folder)[name] - before[name]
        for who, folder in (("own", own), ("theirs", theirs[f"random {method}"]))
    }
    full = whole[name] - before[name]
    for delta in deltas.values():
        assert float((delta != 0).double().mean()) == pytest.approx(options["density"], abs=0.01)
        assert float(delta.abs().sum() / full.abs().sum()) == pytest.approx(1, abs=0.02)
    halves = full.abs() > full.abs().median(1, keepdim=True).values
    kept = [float((delta != 0)[halves].double().mean()) for delta in deltas.values()]
    assert kept[0] == pytest.approx(kept[1], abs=0.02)
