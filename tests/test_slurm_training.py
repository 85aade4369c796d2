"""`logitfuse submit train` on a real Slurm: processes on two nodes, stopped, failed and to the end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fuse_train.run import train_run
from tests.aligned_factory import make_run
from tests.slow_progress import slow_hook
from tests.slurm_cluster import Cluster, running_cluster, wanted
from tests.test_fuse_train_run import weights

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("quick_processes"),
]

SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "checkpoint_every": 100,
    "eval_every": 3,
    "micro_batch_segments": 4,
    "control": False,
    "trackers": [],
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    wanted()
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_run(make_run(folder, train=SETTINGS))
    return folder


def two_nodes(folder: Path, *setup: str, **options: object) -> Path:
    """A run file whose training has a process on each of two nodes."""
    path = folder / "run.yaml"
    launch = {
        "slurm": {"train": {"partition": "both", "nodes": 2, **options}},
        "setup": [
            "export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true",
            f"export TMPDIR='{folder}'",
            *setup,
        ],
    }
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"launch": launch}))
    return path


def submit(path: Path) -> None:
    command = [sys.executable, "-m", "logitfuse", "submit", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def log_of(folder: Path) -> str:
    return "\n".join(p.read_text() for p in (folder / "run/logs/slurm").glob("*/train-*.log"))


def same_weights(folder: Path, alone: Path) -> None:
    expected = weights(alone / "run/final")
    for name, tensor in weights(folder / "run/final").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_nodes_train_what_one_process_trains(
    tmp_path: Path, cluster: Cluster, alone: Path, parallel: str
) -> None:
    make_run(tmp_path, train=SETTINGS | {"parallel": parallel})
    names = 'echo "on $SLURM_JOB_NUM_NODES nodes: $(scontrol show hostnames | xargs)"'
    submit(two_nodes(tmp_path, names))
    cluster.wait_until_idle()
    text = log_of(tmp_path)
    assert "on 2 nodes: " in text
    assert (tmp_path / "run/final/done.json").exists(), text
    assert text.count("step 6/6") == 1
    same_weights(tmp_path, alone)


def test_a_warned_training_saves_is_requeued_and_goes_on(
    tmp_path: Path, cluster: Cluster, alone: Path
) -> None:
    make_run(tmp_path, train=SETTINGS)
    hook, slow = slow_hook(tmp_path / "slow", 1)
    submit(two_nodes(tmp_path, f"export PYTHONPATH='{hook}':$PYTHONPATH SLOW_FILE='{slow}'"))
    cluster.wait_until(lambda: "step 2/6" in log_of(tmp_path), "two steps")
    ((job, *_),) = cluster.queue()
    signal = ["scancel", "--signal=USR1", "--batch", job]  # what Slurm does near the time limit
    subprocess.run(signal, check=True, capture_output=True)
    cluster.wait_until(lambda: "requeued to go on" in log_of(tmp_path), "a requeue")
    slow.write_text("0")
    cluster.wait_until_idle()
    text = log_of(tmp_path)
    assert text.count("error: stopped by SIGUSR1") == 1, text
    assert (tmp_path / "run/final/done.json").exists(), text
    assert text.count("step 2/6") == 1  # it went on from its checkpoint
    same_weights(tmp_path, alone)


@pytest.mark.parametrize("arrays", ["*", "[!t]*"])
def test_an_error_is_told_once_and_ends_all_with_its_exit_code(
    tmp_path: Path, cluster: Cluster, arrays: str
) -> None:
    """Of a shard whose numbers of tokens (`token_counts`) all processes read before they know one
    another, and whose entries one process reads."""
    made = make_run(tmp_path, train=SETTINGS | {"shuffle_shards": 1}, segments_per_shard=4)
    for name in made.sources:
        for path in (tmp_path / f"run/aligned/{name}/data").glob(f"00002-*/{arrays}/c/*"):
            path.write_bytes(b"cut")
    submit(two_nodes(tmp_path))
    ((job, *_),) = cluster.queue()
    cluster.wait_until_idle()
    text = log_of(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert "shard 2" in lines[0]
    assert "Traceback" not in text
    assert cluster.exit_code(job) == "2:0", text


def test_a_cancelled_training_has_a_checkpoint(tmp_path: Path, cluster: Cluster) -> None:
    make_run(tmp_path, train=SETTINGS)
    hook, slow = slow_hook(tmp_path / "slow", 1)
    submit(two_nodes(tmp_path, f"export PYTHONPATH='{hook}':$PYTHONPATH SLOW_FILE='{slow}'"))
    cluster.wait_until(lambda: "step 2/6" in log_of(tmp_path), "two steps")
    ((job, *_),) = cluster.queue()
    subprocess.run(["scancel", job], check=True, capture_output=True)
    cluster.wait_until_idle()
    assert list((tmp_path / "run/checkpoints").glob("step-*")), log_of(tmp_path)
    last = json.loads((tmp_path / "run/logs/train.jsonl").read_text().splitlines()[-1])
    assert last["error"] == "StoppedMidway"
