"""Several processes: one training, told once, the same after any kill and on any number of them."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from fuse_train.machine import processes
from fuse_train.machine.processes import first_to_report, is_main, progress_stream
from tests.aligned_factory import make_run
from tests.test_fuse_train_run import lines_of, same, timeless, weights

pytestmark = pytest.mark.usefixtures("quick_processes")

SETTINGS = {
    "max_steps": 10,
    "checkpoint_every": 4,
    "eval_every": 5,
    "micro_batch_segments": 3,
    "feedback_weight": 0.1,
    "control": False,
    "trackers": [],
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(
    folder: Path, launcher: str, *options: str, count: int = 2, **environment: str
) -> subprocess.CompletedProcess:
    """Train the run of `folder` in `count` processes."""
    port = str(free_port())
    starters = {
        "torchrun": [
            "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", port,
        ],
        "accelerate": [
            "-m", "accelerate.commands.launch", "--num_processes", str(count), "--num_machines",
            "1", "--cpu", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", port,
        ],
        "alone": [],
    }  # fmt: skip
    program = ["-m", "tests.train_driver", "run", str(folder / "run.yaml"), *options]
    return subprocess.run(
        [sys.executable, *starters[launcher], *program],
        env=os.environ
        | ENVIRONMENT
        | {"ACCELERATE_USE_CPU": "true", "TMPDIR": str(folder)}  # torchrun leaves its logs there
        | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def noted(folder: Path) -> dict[int, list[str]]:
    """Segments of each step over all processes, sorted; steps that were taken twice had the same."""
    found: dict[int, dict[str, list[str]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            assert found.setdefault(step, {}).setdefault(path.stem, ids) == ids
    return {step: sorted(chain.from_iterable(parts.values())) for step, parts in found.items()}


def optimizer_bytes(folder: Path, step: int = 10) -> list[bytes]:
    inner = folder / f"run/checkpoints/step-{step:06d}/trainer"
    return [(inner / f"{name}.safetensors").read_bytes() for name in ("optimizer", "selector")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run in two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    make_run(folder, train=SETTINGS)
    (folder / "notes").mkdir()
    done = launch(folder, "torchrun", TRAIN_DRIVER_NOTES=str(folder / "notes"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.mark.slow
def test_one_process_tells_and_writes(straight) -> None:
    folder, done = straight
    assert done.stdout.count("step 10/10") == 1
    assert done.stdout.count("bits per byte, valid") == 1
    assert done.stderr.count("train fused: 10/10") == 1
    assert [line["step"] for line in lines_of(folder, "train")] == list(range(11))
    assert len((folder / "run/logs/train.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_killed_and_resumed_in_two_processes_equals_uninterrupted(tmp_path, straight) -> None:
    """SIGTERM to one process, kill -9 of the other, then to the end: the same bits."""
    folder, _ = straight
    make_run(tmp_path, train=SETTINGS)
    (tmp_path / "notes").mkdir()
    notes = {"TRAIN_DRIVER_NOTES": str(tmp_path / "notes")}
    first = launch(tmp_path, "torchrun", **notes, TRAIN_DRIVER_SIGNAL=f"2 1 {signal.SIGTERM:d}")
    assert first.returncode == 1  # torchrun hides 75
    assert first.stderr.count("error: stopped by SIGTERM") == 1, first.stderr[-3000:]
    assert "exitcode  : 75" in first.stderr
    assert json.loads((tmp_path / "run/logs/train.jsonl").read_text())["error"] == "StoppedMidway"
    assert (tmp_path / "run/checkpoints/step-000003").is_dir()
    second = launch(tmp_path, "torchrun", **notes, TRAIN_DRIVER_SIGNAL=f"8 0 {signal.SIGKILL:d}")
    assert second.returncode == 1
    assert not (tmp_path / "run/final").exists()
    third = launch(tmp_path, "torchrun", **notes)
    assert third.returncode == 0, third.stderr[-3000:]
    assert same(weights(tmp_path / "run/final"), weights(folder / "run/final"))
    assert optimizer_bytes(tmp_path) == optimizer_bytes(folder)
    assert timeless(lines_of(tmp_path, "train")) == timeless(lines_of(folder, "train"))
    assert noted(tmp_path / "notes") == noted(folder / "notes")


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 1), (1, 3)])
def test_another_number_of_processes_goes_on_with_the_same_samples(
    tmp_path, straight, counts
) -> None:
    folder, _ = straight
    make_run(tmp_path, train=SETTINGS)
    (tmp_path / "notes").mkdir()
    notes = {"TRAIN_DRIVER_NOTES": str(tmp_path / "notes")}
    stop = {"TRAIN_DRIVER_SIGNAL": f"5 0 {signal.SIGTERM:d}"}
    for count, extra in zip(counts, (stop, {}), strict=True):
        launcher = {1: "alone", 2: "accelerate", 3: "torchrun"}[count]
        done = launch(tmp_path, launcher, count=count, **notes, **extra)
        expected = 0 if not extra else 75 if count == 1 else 1  # launchers hide 75
        assert done.returncode == expected, done.stderr[-3000:]
    by_step: dict[int, list[str]] = {}
    for path in (tmp_path / "notes").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            by_step.setdefault(step, []).extend(ids)
    assert {step: sorted(ids) for step, ids in by_step.items()} == noted(folder / "notes")
    expected_weights = weights(folder / "run/final")
    for name, tensor in weights(tmp_path / "run/final").items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once_and_names_its_segments(tmp_path) -> None:
    """A shard that only process 1 reads is damaged: its own line, and no traceback beside it."""
    made = make_run(tmp_path, train=SETTINGS | {"shuffle_shards": 1}, segments_per_shard=4)
    for name in made.sources:
        for path in (tmp_path / f"run/aligned/{name}/data").glob("00002-*/*/c/*"):
            path.write_bytes(b"cut")
    done = launch(tmp_path, "torchrun")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "shard 2" in lines[0]


@pytest.mark.slow
def test_what_all_processes_find_wrong_is_told_once(tmp_path) -> None:
    make_run(tmp_path, train=SETTINGS | {"batch_segments": 1})
    done = launch(tmp_path, "torchrun")
    assert done.returncode == 1
    assert done.stderr.count("error: fewer segments in a batch than processes") == 1
    assert 'File "fuse_train' not in done.stderr
    (tmp_path / "run/plan/plan.json").unlink()
    done = launch(tmp_path, "torchrun")
    assert done.stderr.count("error: no plan") == 1


def test_processes_wait_longer_for_one_another_than_nccl_does(monkeypatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr("accelerate.PartialState", lambda **options: asked.append(options))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    processes.connected_state()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    processes.connected_state()
    assert [options["cpu"] for options in asked] == [True, False]
    assert all(options["timeout"] == processes.PATIENCE for options in asked)


def test_who_tells_before_processes_know_each_other(monkeypatch) -> None:
    assert is_main()
    assert first_to_report("x")
    assert progress_stream() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local, expected in (("0", "0", True), ("1", "1", False), ("2", "0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert first_to_report("x") == expected
        assert is_main() == (rank == "0")
    assert isinstance(progress_stream(), io.StringIO)
    monkeypatch.setenv("RANK", "many")
    assert processes.process_index() == 0


def test_of_several_machines_one_tells_through_the_store_of_torchrun(monkeypatch) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    machines = {
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    for name, value in machines.items():
        monkeypatch.setenv(name, value)
    assert [first_to_report(line) for line in ("x", "x", "y", "x")] == [True, False, True, False]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not first_to_report("z")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert first_to_report("x")  # rather twice than never
