"""`logitfuse submit` on a real Slurm: whatever ends a worker, the stores equal those of one process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from store_schema.config import RunConfig, load_run
from store_schema.disk.location import open_location
from store_schema.errors import MissingError
from store_schema.store.reader import StoreReader
from tests.extract_runs import plan_run, sample_documents, write_jsonl, write_run
from tests.slow_progress import slow_hook
from tests.slurm_cluster import Cluster, running_cluster, wanted

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("quick_processes", "limited"),
]

SOURCES = ("code", "prose")
QUIET = ["export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    wanted()
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def planned(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], quick_processes: None
) -> Path:
    """A folder with a run file, its corpus and its plan, and stores of both sources by one process."""
    folder = tmp_path_factory.mktemp("planned")
    write_jsonl(folder / "docs.jsonl", sample_documents(6))
    path = plan_run(
        write_run(folder, {name: tiny_models[name] for name in (*SOURCES, "target")}, **SECTIONS)
    )
    for stage in ("extract", "align"):
        command = [sys.executable, "-m", stage, "run", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


SECTIONS: dict[str, Any] = {
    "plan": {"max_tokens": 96, "shard_tokens": 256},
    "extract": {"engine": "transformers", "top_k": 8, "threads": 1},
    "train": {"selector": "uniform", "max_steps": 2, "eval_every": None, "control": False},
}


def new_run(
    folder: Path, planned: Path, models: dict[str, Path], launch: dict[str, Any] | None = None
) -> Path:
    """A run file in `folder` with the plan of `planned` and no stores."""
    folder.mkdir(exist_ok=True)
    for part in ("corpus", "plan"):
        shutil.copytree(planned / "run" / part, folder / "run" / part)
    shutil.copy(planned / "docs.jsonl", folder)
    section = {"setup": QUIET} | (launch or {})
    chosen = {name: models[name] for name in (*SOURCES, "target")}
    return write_run(folder, chosen, launch=section, **SECTIONS)


def slowed(folder: Path, seconds: float) -> tuple[dict[str, Any], Path]:
    """A launch section whose workers are slow, and the file that says how slow."""
    hook, slow = slow_hook(folder, seconds)
    lines = [f"export PYTHONPATH='{hook}':$PYTHONPATH SLOW_FILE='{slow}'"]
    lines.append(f"export TMPDIR='{folder}'")  # what a killed worker leaves
    return {"setup": QUIET + lines}, slow


def submit(*words: object) -> str:
    command = [sys.executable, "-m", "logitfuse", "submit", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(path: Path, kind: str, source: str) -> dict[int, str]:
    """Digest of every committed shard's content."""
    run: RunConfig = load_run(path)
    url = run.store_url(source) if kind == "stores" else run.aligned_url(source)
    try:
        commits = StoreReader.open(open_location(url)).commits
    except MissingError:
        return {}
    return {index: commit.content_sha256 for index, commit in commits.items()}


def everything(path: Path, sources: tuple[str, ...] = SOURCES) -> dict[tuple[str, str], Any]:
    return {(k, s): contents(path, k, s) for k in ("stores", "aligned") for s in sources}


def commit_times(path: Path, kind: str, source: str) -> list[float]:
    folder = path.parent / "run" / kind / source / "commits"
    return [commit.stat().st_mtime for commit in folder.iterdir()]


def slurm(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def logs(path: Path, stem: str) -> str:
    """What all tasks of a stem's jobs printed."""
    found = sorted((path.parent / "run/logs/slurm").glob(f"*/{stem}-*.log"))
    return "\n".join(log.read_text() for log in found)


@dataclass(frozen=True, slots=True)
class Limited:
    """Runs by source whose only worker a time limit ends, how slow each is, and its task."""

    runs: dict[str, Path]
    slow: dict[str, Path]
    tasks: dict[str, str]


@pytest.fixture(scope="module")
def limited(
    cluster: Cluster,  # first: without one, nothing is made
    tmp_path_factory: pytest.TempPathFactory,
    planned: Path,
    tiny_models: dict[str, Path],
) -> Limited:
    """A worker that is warned and one that is not, begun before all tests: a limit takes a minute."""
    folder = tmp_path_factory.mktemp("limited")
    runs, slow, tasks = {}, {}, {}
    for source, signal in (("code", "B:USR1@5"), ("prose", "")):
        launch, slow[source] = slowed(folder / source / "slow", 1)
        runs[source] = path = new_run(folder / source, planned, tiny_models, launch)
        submit("extract", path, "--source", source, "--slurm", f"time=60,signal={signal}")
    for source, seconds in (("code", "5"), ("prose", "600")):
        begun = lambda s=source: contents(runs[s], "stores", s) != {}  # noqa: E731
        cluster.wait_until(begun, f"a commit of {source}")
        slow[source].write_text(seconds)  # nobody gets to the end before the limit
        (tasks[source],) = cluster.tasks(f"extract-{source}")
        set_time_limit(cluster, tasks[source])
    cluster.beside = {job for job, *_ in cluster.queue()}
    return Limited(runs, slow, tasks)


def set_time_limit(cluster: Cluster, task: str) -> None:
    """The nearest limit in whole minutes that leaves Slurm, which looks every 30 s, time to warn."""
    minutes = (cluster.run_seconds(task) + 40) // 60 + 1
    slurm("scontrol", "update", f"jobid={task}", f"timelimit={minutes}")


def test_arrays_from_extraction_to_training_equal_one_process(
    tmp_path: Path, planned: Path, tiny_models: dict[str, Path], cluster: Cluster
) -> None:
    path = new_run(tmp_path, planned, tiny_models)
    out = submit("extract", "--config", path, "--workers", 3, "--workers", "align:2")
    assert len(out.splitlines()) == 7
    cluster.wait_until_idle()
    assert everything(path) == everything(planned / "run.yaml"), logs(path, "*")
    for source in SOURCES:
        assert min(commit_times(path, "aligned", source)) > max(
            commit_times(path, "stores", source)
        )
    assert (tmp_path / "run/final/done.json").exists(), logs(path, "train")
    assert submit("extract", path) == "nothing to do, nothing submitted\n"


def test_what_a_requeued_and_a_killed_worker_leave_is_done_by_others(
    tmp_path: Path, planned: Path, tiny_models: dict[str, Path], cluster: Cluster
) -> None:
    launch, slow = slowed(tmp_path / "slow", 0.5)
    path = new_run(tmp_path, planned, tiny_models, launch)
    submit("extract", path, "--source", "code", "--workers", 3)
    cluster.wait_until(
        lambda: len({index % 3 for index in contents(path, "stores", "code")}) == 3,
        "a commit of each worker",
    )
    slow.write_text("2")  # nobody gets to the end meanwhile
    (job,) = {task.partition("_")[0] for task in cluster.tasks("extract-code")}
    slurm("scontrol", "requeue", f"{job}_1")
    slurm("scancel", "--signal=KILL", "--full", f"{job}_2")
    killed = contents(path, "stores", "code")
    slow.write_text("0")
    cluster.wait_until_idle()
    left = contents(path, "stores", "code")
    whole = contents(planned / "run.yaml", "stores", "code")
    # The others went on with what the killed one had left.
    assert set(left) == set(whole), logs(path, "extract-code")
    assert len(killed) < len(whole)
    assert killed.items() <= left.items()
    assert contents(path, "aligned", "code") == {}  # it never started
    out = submit("extract", path, "--source", "code", "--workers", 3)
    assert "extract-code" not in out
    assert "align-code" in out
    cluster.wait_until_idle()
    assert everything(path, ("code",)) == everything(planned / "run.yaml", ("code",))


@pytest.mark.parametrize("code", [0, 2])
def test_split_arrays_in_an_odd_folder(
    tmp_path: Path,
    planned: Path,
    tiny_models: dict[str, Path],
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    """Six workers where arrays end at four; with a worker that only says what it was asked to do."""
    folder = tmp_path / "a 100% 'odd' $HOME"
    program = tmp_path / "python"
    calls = tmp_path / "calls"
    program.write_text(f'#!/bin/bash\necho "$*" >> {calls}\nexit {code}\n')
    program.chmod(0o755)
    path = new_run(folder, planned, tiny_models, {"python": [str(program)]})
    monkeypatch.setenv("SBATCH_JOB_NAME", "from the environment")
    out = submit("extract", path, "--source", "code", "--workers", 6, "--workers", "align:1")
    assert "0-3 of 6" in out
    assert "4-5 of 6" in out
    cluster.wait_until_idle()
    words = [line.split() for line in calls.read_text().splitlines()]
    extracted = {line[-1] for line in words if "extract" in line}
    aligned = [line for line in words if "align" in line]
    if code == 0:
        assert extracted == {f"{index}/6" for index in range(6)}
        assert len(words) == 7
        assert words[-1] == aligned[0]
    else:  # what depends on a failure never starts, and leaves the queue
        assert extracted <= {f"{index}/6" for index in range(6)}
        assert aligned == []


def test_what_sbatch_refuses_is_told_and_leaves_nothing_queued(
    tmp_path: Path, planned: Path, tiny_models: dict[str, Path], cluster: Cluster
) -> None:
    path = new_run(tmp_path, planned, tiny_models)
    command = [sys.executable, "-m", "logitfuse", "submit", "extract", str(path)]
    for option, said in (("train:partition=gqu", "invalid partition"), ("train:gqus=1", "gqus")):
        done = subprocess.run(
            [*command, "--slurm", option], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: sbatch refused in ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        cluster.wait_until_idle()
    assert not (tmp_path / "run/stores").exists() or contents(path, "stores", "code") == {}


def test_tasks_of_srun_share_the_shards_and_a_batch_script_does_all(
    cluster: Cluster, tmp_path: Path
) -> None:
    say = f"{sys.executable} -c 'from launch.work import parse_worker; print(parse_worker(None))'"
    said, script = tmp_path / "said.txt", tmp_path / "batch.sh"
    script.write_text(f"#!/bin/bash\n{say}\nsrun -n2 {say}\n")
    options = ["-n2", f"--output={said}", f"--chdir={Path(__file__).parent.parent}"]
    done = subprocess.run(
        ["sbatch", *options, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cluster.wait_until_idle(60)
    batch, *tasks = said.read_text().splitlines()
    assert batch == "0/1"
    assert sorted(tasks) == ["0/2", "1/2"]


def test_time_limits_with_and_without_the_warning(
    planned: Path, cluster: Cluster, limited: Limited
) -> None:
    """The warned worker requeues itself; the other is killed in the middle of a shard."""
    runs, slow = limited.runs, limited.slow
    cluster.beside = set()
    cluster.wait_until(lambda: "requeued" in logs(runs["code"], "extract-code"), "a requeue")
    slow["code"].write_text("0")
    slurm("scontrol", "update", f"jobid={limited.tasks['code']}", "timelimit=60")
    whole = {source: contents(planned / "run.yaml", "stores", source) for source in SOURCES}
    cluster.wait_until_idle()
    assert everything(runs["code"], ("code",)) == everything(planned / "run.yaml", ("code",))
    assert "what is finished is kept" in logs(runs["code"], "extract-code")
    assert "TIME LIMIT" in logs(runs["prose"], "extract-prose")
    assert 0 < len(contents(runs["prose"], "stores", "prose")) < len(whole["prose"])
    assert contents(runs["prose"], "aligned", "prose") == {}
    slow["prose"].write_text("0")
    submit("extract", runs["prose"], "--source", "prose")
    cluster.wait_until_idle()
    assert everything(runs["prose"], ("prose",)) == everything(planned / "run.yaml", ("prose",))
