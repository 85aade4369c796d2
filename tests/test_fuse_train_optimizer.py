"""Schedules and optimizers by the names of transformers: rates, groups, and states that come back."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fuse_train.config import OptimizerName, ScheduleName, TrainSection
from fuse_train.loop.optimizer import (
    OPTIMIZER_FILE,
    build_optimizer,
    load_optimizer,
    save_optimizer,
)
from fuse_train.loop.schedule import (
    rate_factor,
    rate_schedule,
    set_rate,
    steps_between_checkpoints,
    warmup_steps,
)
from store_schema.errors import ConfigError, CorruptionError


def test_rate_rises_then_falls_to_the_floor() -> None:
    rates = [rate_factor(step, 100, warmup_ratio=0.1, floor=0.2) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rate_factor(0, 1, warmup_ratio=0.0, floor=0.1) == 1.0


@given(st.integers(1, 300), st.floats(0, 0.5), st.floats(0, 1))
def test_default_schedule_is_the_plain_formula(num_steps, warmup_ratio, floor) -> None:
    section = TrainSection(warmup_ratio=warmup_ratio, min_lr_ratio=floor)
    schedule = rate_schedule(section, num_steps)
    for step in {0, num_steps // 3, num_steps - 1}:
        expected = rate_factor(step, num_steps, warmup_ratio=warmup_ratio, floor=floor)
        assert schedule(step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_schedules_are_those_of_transformers_after_the_warm_up(name) -> None:
    kwargs = {"num_decay_steps": 20} if name == "warmup_stable_decay" else {}
    section = TrainSection(
        lr_scheduler_type=name, warmup_ratio=0.1, lr_scheduler_kwargs=kwargs, lr=1e-3
    )
    schedule = rate_schedule(section, 50)
    warmup = warmup_steps(50, 0.1)
    floor = {"cosine_with_min_lr": "min_lr_rate", "warmup_stable_decay": "min_lr_ratio"}
    extra = kwargs | ({floor[name]: 0.1} if name in floor else {})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    theirs = transformers.get_scheduler(name, optimizer, warmup, 50, extra).lr_lambdas[0]
    for step in range(warmup, 50):
        assert schedule(step) == pytest.approx(theirs(step), abs=1e-12)
    rises = [1.0] * 5 if name == "constant" else [0.2, 0.4, 0.6, 0.8, 1.0]
    assert [schedule(step) for step in range(5)] == pytest.approx(rises)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr_scheduler_type": "warmup_stable_decay"},
        {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"bends": 2}},
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"bends": 2}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
    ],
)
def test_arguments_that_do_not_fit_a_schedule_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match="schedule"):
        rate_schedule(TrainSection(**wrong), 50)


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))


def steps(model, optimizer, count) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_only_matrices_of_the_target_decay() -> None:
    model, gate = net(), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer(model, [gate], TrainSection(weight_decay=0.3, lr=1e-2))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert found == {"0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
    assert decay[id(gate)] == 0.0
    peaks = {id(p): g["peak_lr"] for g in optimizer.param_groups for p in g["params"]}
    assert peaks[id(gate)] == TrainSection().asn.lr
    set_rate(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 5e-3, TrainSection().asn.lr / 2]


def test_frozen_weights_are_not_optimized() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, [], TrainSection())
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert id(model[0].weight) not in held
    assert len(held) == 3


def test_decay_alone_shrinks_matrices_and_nothing_else() -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, [], TrainSection(weight_decay=0.5, lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_every_optimizer_goes_on_to_the_bit_from_its_file(tmp_path, name) -> None:
    kwargs = {"momentum": 0.9} if name == "sgd" else {}
    section = TrainSection(optim=name, optim_kwargs=kwargs, lr=1e-2)
    whole, broken = net(), net()
    steps(whole, build_optimizer(whole, [], section), 3)
    first = build_optimizer(broken, [], section)
    steps(broken, first, 3)
    save_optimizer(tmp_path, first)
    again = build_optimizer(broken, [], section)
    load_optimizer(tmp_path, again)
    other = build_optimizer(whole, [], section)
    other.load_state_dict(first.state_dict())
    steps(whole, other, 2)
    steps(broken, again, 2)
    for a, b in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = net()
    steps(fresh, build_optimizer(fresh, [], section), 5)
    moved = [
        not torch.equal(a, b) for a, b in zip(fresh.parameters(), net().parameters(), strict=True)
    ]
    assert all(moved)


def test_the_same_state_is_the_same_file(tmp_path) -> None:
    """Several keys of metadata would be written in a random order."""
    model = net()
    optimizer = build_optimizer(model, [], TrainSection(optim="adafactor"))
    steps(model, optimizer, 1)
    files = set()
    for _ in range(8):
        save_optimizer(tmp_path, optimizer)
        files.add((tmp_path / OPTIMIZER_FILE).read_bytes())
    assert len(files) == 1


def test_betas_of_the_recipe_and_given_ones() -> None:
    assert build_optimizer(net(), [], TrainSection()).defaults["betas"] == (0.9, 0.95)
    given = TrainSection(optim="adamw_torch", optim_kwargs={"betas": [0.8, 0.9]})
    assert build_optimizer(net(), [], given).defaults["betas"] == (0.8, 0.9)
    with pytest.raises(ConfigError, match=r"train\.optim_kwargs"):
        build_optimizer(net(), [], TrainSection(optim_kwargs={"speed": 3}))


def test_optimizer_of_other_parameters_is_refused(tmp_path) -> None:
    model = net()
    optimizer = build_optimizer(model, [], TrainSection())
    steps(model, optimizer, 1)
    save_optimizer(tmp_path, optimizer)
    for other in (torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)):
        with pytest.raises(CorruptionError, match="other parameters"):
            load_optimizer(tmp_path, build_optimizer(other, [], TrainSection()))
    with pytest.raises(CorruptionError, match="unreadable"):
        load_optimizer(tmp_path / "nowhere", optimizer)


@pytest.mark.parametrize(
    ("given", "num_steps", "expected"),
    [(None, 1, 1), (None, 79, 8), (None, 5_000, 100), (7, 5_000, 7)],
)
def test_steps_between_checkpoints(given: int | None, num_steps: int, expected: int) -> None:
    section = TrainSection(checkpoint_every=given)
    assert steps_between_checkpoints(section, num_steps) == expected
