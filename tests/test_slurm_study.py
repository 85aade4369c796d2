"""`logitfuse study submit` on a real Slurm: data, arrays of trainings, the page; warned and gone on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.command import ok, refused
from tests.slow_progress import slow_hook
from tests.slurm_cluster import Cluster, running_cluster, wanted
from tests.test_end_to_end import write_run
from tests.test_study import PLAIN

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("quick_processes"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    wanted()
    with running_cluster() as running:
        yield running


def study_file(folder: Path, models: dict[str, Path], *setup: str) -> Path:
    run = write_run(folder, models)
    content = yaml.safe_load(run.read_text())
    content["train"] |= {"max_steps": 4, "eval_every": 2, "checkpoint_every": 1}
    run.write_text(yaml.safe_dump(content))
    study = {
        "name": "sent",
        "study_dir": str(folder / "study"),
        "control": "control",
        "ours": "ours",
        "bootstrap_samples": 200,
        "settings": {"toy": {"run": str(run), "set": {"evaluate.pool_selectors": ["uniform"]}}},
        "rows": {
            "target before": {"model": "target"},
            "control": {"set": PLAIN},
            "ours": {},
            "no code": {"tuned_as": "ours", "sources": ["prose", "facts"]},
        },
        "submit": {"workers": 2, "setup": ["export OMP_NUM_THREADS=1", *setup]},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def logs(folder: Path) -> str:
    found = sorted((folder / "study/logs/slurm").glob("*/*.log"))
    return "\n".join(f"{path.name}: {path.read_text()}" for path in found)


def test_a_study_is_trained_by_its_jobs_which_go_on_when_warned(
    tmp_path: Path, cluster: Cluster, tiny_models: dict[str, Path]
) -> None:
    hook, slow = slow_hook(tmp_path / "slow", 0)
    setup = f"export PYTHONPATH='{hook}':$PYTHONPATH SLOW_FILE='{slow}'"
    file = study_file(tmp_path, tiny_models, setup)
    ok("study", "run", file, "--data-only")
    slow.write_text("1")
    said = ok("study", "submit", file)
    jobs = {words[1]: words for words in map(str.split, said.splitlines()[1:-1])}
    assert list(jobs) == ["study-data", "study-train", "study-tuned", "study-show"]
    assert jobs["study-train"][2] == jobs["study-data"][0]
    assert jobs["study-show"][2] == jobs["study-tuned"][0]
    assert "jobs of this run are still queued" in refused("study", "submit", file)
    checkpoints = "study/toy/seed-0/control-*/checkpoints/step-*"
    cluster.wait_until(lambda: any(tmp_path.glob(checkpoints)), "a checkpoint")
    job = jobs["study-train"][0]
    signal = ["scancel", "--signal=USR1", "--batch", job]  # what Slurm does near the time limit
    subprocess.run(signal, check=True, capture_output=True)
    cluster.wait_until(lambda: "requeued to go on" in logs(tmp_path), "a requeue")
    slow.write_text("0")
    cluster.wait_until_idle(600)
    assert (tmp_path / "study/index.html").exists(), logs(tmp_path)
    rows = json.loads((tmp_path / "study/study.json").read_text())["settings"]["toy"]["rows"]
    assert set(rows) == {"target before", "control", "ours", "no code"}
    (told,) = [path.read_text() for path in tmp_path.glob("study/toy/seed-0/control-*/log.txt")]
    assert told.count("stopped by SIGTERM") == 1
    of_workers = (tmp_path / "study/logs/slurm").glob("*/study-train-*.log")
    assert sum("bits per byte (valid)" in path.read_text() for path in of_workers) == 2
    assert ok("study", "submit", file) == "nothing to do, nothing submitted\n"
