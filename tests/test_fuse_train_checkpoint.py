"""Folders appear whole or not at all; the step log is cut back to the step resumed from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from fuse_train.config import TrainSection
from fuse_train.disk import folders
from fuse_train.disk.folders import discard_folder, publish_folder, sweep
from fuse_train.loop import optimizer
from fuse_train.loop.checkpoint import (
    BestRecord,
    TrainState,
    best_folder,
    latest_checkpoint,
    save_checkpoint,
    step_folders,
)
from fuse_train.loop.optimizer import build_optimizer, load_optimizer, save_optimizer
from fuse_train.loop.step_log import StepLog
from store_schema.errors import CorruptionError, MismatchError, StorageError


class Saved:
    """Stands for a tokenizer: it has nothing to save."""

    def save_pretrained(self, folder) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def model(tiny_models):
    return AutoModelForCausalLM.from_pretrained(tiny_models["code"])


def stepped(model) -> torch.optim.AdamW:
    optimizer = build_optimizer(model, [], TrainSection())
    model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    return optimizer


def save(folder, model, optimizer, step, best=None, limit=2) -> None:
    state = TrainState(fingerprint="f", step=step, next_sample=8 * step, best=best)

    def write(place) -> None:
        model.save_pretrained(place)
        save_optimizer(place / "trainer", optimizer)

    save_checkpoint(folder, state, write, Saved(), None, limit=limit)


def test_checkpoint_round_trip(tmp_path, model) -> None:
    optimizer = stepped(model)
    save(tmp_path, model, optimizer, 3)
    path, state = latest_checkpoint(tmp_path, "f")
    assert (state.step, state.next_sample) == (3, 24)
    again = AutoModelForCausalLM.from_pretrained(path)
    other = build_optimizer(again, [], TrainSection())
    load_optimizer(path / "trainer", other)
    saved, loaded = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert saved.keys() == loaded.keys()
    for index, entry in saved.items():
        assert all(torch.equal(value, loaded[index][name]) for name, value in entry.items())
    assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.rglob("*.pt"))


def test_limit_and_best_weights(tmp_path, model) -> None:
    optimizer = stepped(model)
    for step in (1, 2, 3, 4):
        publish_folder(best_folder(tmp_path, step), model.save_pretrained)
        save(tmp_path, model, optimizer, step, BestRecord(step=min(step, 3), bpb={"x": 1.0}))
    assert list(step_folders(tmp_path)) == [3, 4]
    assert sorted(p.name for p in tmp_path.glob("best-*")) == ["best-000003"]


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path, model) -> None:
    save(tmp_path, model, stepped(model), 1)
    with pytest.raises(MismatchError, match="another config"):
        latest_checkpoint(tmp_path, "g")
    path = tmp_path / "step-000001" / "trainer"
    optimizer = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(optimizer[: len(optimizer) // 2])
    with pytest.raises(CorruptionError, match="optimizer unreadable"):
        load_optimizer(path, build_optimizer(model, [], TrainSection()))
    (path / "optimizer.safetensors").write_bytes(optimizer)
    with pytest.raises(CorruptionError, match="other parameters"):
        load_optimizer(path, build_optimizer(torch.nn.Linear(2, 2), [], TrainSection()))
    state = (path / "state.json").read_bytes()
    (path / "state.json").write_bytes(state.replace(b'"step": 1', b'"step": 2'))
    with pytest.raises(CorruptionError, match="digest"):
        latest_checkpoint(tmp_path, "f")
    (path / "state.json").unlink()
    with pytest.raises(CorruptionError, match="without state"):
        latest_checkpoint(tmp_path, "f")


def test_full_disk_publishes_nothing(tmp_path, model, monkeypatch) -> None:
    made = stepped(model)
    save(tmp_path, model, made, 1)

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(optimizer, "save_file", full)
    with pytest.raises(StorageError, match="free space"):
        save(tmp_path, model, made, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert latest_checkpoint(tmp_path, "f")[1].step == 1


def test_publishing_replaces_and_sweeping_removes_leftovers(tmp_path) -> None:
    for text in ("old", "new"):
        publish_folder(
            tmp_path / "final", lambda folder, text=text: (folder / "a").write_text(text)
        )
    assert (tmp_path / "final/a").read_text() == "new"
    (tmp_path / ".final.123.tmp").mkdir()
    (tmp_path / ".final.456.old").mkdir()
    (tmp_path / ".precision.json.0f.tmp").write_bytes(b"{")  # of a killed `write_atomic`
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"final", ".precision.json.0f.tmp"}
    sweep(tmp_path / "nowhere")


class KilledError(Exception):
    """Stands for kill -9: nothing after it runs."""


@pytest.mark.parametrize("survived", range(3))
def test_a_kill_between_any_two_renames_loses_nothing(tmp_path, monkeypatch, survived) -> None:
    """The folder that stood there, or the new one, is there after the sweep; never none."""
    final = tmp_path / "final"
    publish_folder(final, lambda folder: (folder / "a").write_text("old"))
    real, calls = Path.rename, []

    def rename(self, other):
        if len(calls) == survived:
            raise KilledError
        calls.append(1)
        return real(self, other)

    def no_cleaning(path, **options):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        patched.setattr(folders.shutil, "rmtree", no_cleaning)
        with pytest.raises(KilledError):
            publish_folder(final, lambda folder: (folder / "a").write_text("new"))
    assert final.exists() == (survived != 1)
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (final / "a").read_text() == ("new" if survived == 2 else "old")


def test_a_folder_is_never_half_removed_under_its_name(tmp_path, monkeypatch) -> None:
    publish_folder(tmp_path / "step-000001", lambda folder: (folder / "a").write_text("x"))

    def killed(path, **options):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(folders.shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            discard_folder(tmp_path / "step-000001")
    assert step_folders(tmp_path) == {}
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_step_log_is_cut_back(tmp_path) -> None:
    path = tmp_path / "logs" / "train_steps.jsonl"
    log = StepLog(path)
    log.start(0)
    for step in range(5):
        log.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    log.start(3)
    log.write({"step": 4, "again": True})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["again"]
    log.start(0)
    assert path.read_text() == ""
    StepLog(None).start(3)
    StepLog(None).write({"step": 1})
