"""The precision of a run is measured once and kept."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from fuse_train.machine import precision as module
from fuse_train.machine.precision import (
    PRECISION_FILE,
    choose_precision,
    product_seconds,
    resolve_precision,
)
from fuse_train.run import train_run
from store_schema.errors import CorruptionError
from tests.aligned_factory import make_run
from tests.test_fuse_train_run import with_train

CPU = torch.device("cpu")
WIDE = LlamaConfig(hidden_size=1024, intermediate_size=2048)


def measured(monkeypatch, wide: float, narrow: float) -> None:
    monkeypatch.setattr(module, "product_seconds", lambda *_: (wide, narrow))


@pytest.mark.parametrize(
    ("wide", "narrow", "chosen"),
    [(3.0, 1.0, "bfloat16"), (1.2, 1.0, "bfloat16"), (1.1, 1.0, "float32"), (1.0, 9.0, "float32")],
)
def test_the_faster_one_is_taken(monkeypatch, wide, narrow, chosen) -> None:
    measured(monkeypatch, wide, narrow)
    record = choose_precision(WIDE, CPU)
    assert record.precision == chosen
    assert f"{1000 * wide:.0f} ms in float32" in record.reason


def test_narrow_models_are_not_measured(monkeypatch) -> None:
    measured(monkeypatch, 9.0, 1.0)
    assert choose_precision(LlamaConfig(hidden_size=256), CPU).precision == "float32"
    assert choose_precision(WIDE, torch.device("meta")).precision == "float32"


def test_measuring_leaves_threads_and_generators_alone() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    wide, narrow = product_seconds(64, 128)
    assert wide > 0
    assert narrow > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_chosen_stays_and_is_said_once(tmp_path, monkeypatch, capsys) -> None:
    measured(monkeypatch, 3.0, 1.0)
    first = resolve_precision(tmp_path, WIDE, CPU, writes=True)
    measured(monkeypatch, 1.0, 3.0)
    assert resolve_precision(tmp_path, WIDE, CPU, writes=True) == first
    assert first.precision == "bfloat16"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("train.precision: bfloat16 (")
    path = tmp_path / PRECISION_FILE
    path.write_text(path.read_text().replace("bfloat16", "float32", 1))
    with pytest.raises(CorruptionError, match="digest does not match"):
        resolve_precision(tmp_path, WIDE, CPU, writes=True)


def test_only_one_process_writes(tmp_path) -> None:
    resolve_precision(tmp_path, LlamaConfig(hidden_size=32), CPU, writes=False)
    assert not (tmp_path / PRECISION_FILE).exists()


def test_fused_and_control_train_in_one_precision_and_the_card_says_which(
    tmp_path, monkeypatch
) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(module, "LEAST_HIDDEN", 1)
    answers = iter([(3.0, 1.0), (1.0, 3.0)])  # a second measurement would say otherwise
    monkeypatch.setattr(module, "product_seconds", lambda *_: next(answers))
    options = {"max_steps": 1, "eval_every": None, "trackers": [], "selector": "uniform"}
    shards = {"train": 1, "valid": 1}
    run = make_run(tmp_path, train=options, shards=shards, segments_per_shard=8)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        outcomes = train_run(run)
        assert [o.fresh for o in train_run(run)] == [False, False]
        fixed = with_train(run, precision="float32", control=False)
        assert fixed.sections["train"].content() != run.sections["train"].content()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for outcome in outcomes:
        assert "precision: bfloat16" in (outcome.folder / "README.md").read_text()
    record = json.loads((tmp_path / "run" / PRECISION_FILE).read_text())
    assert record["precision"] == "bfloat16"
