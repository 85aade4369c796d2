"""Arrays and scripts: what they hold, and what a script does when Slurm signals."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.config import LaunchSection
from launch.pending import Pending
from launch.slurm.jobs import Request, needed_jobs
from launch.slurm.options import options_of, parse_options
from launch.slurm.script import ArrayLimits, ArrayPart, Job, Place, array_parts, script_text
from launch.stages import STAGES, Stage
from store_schema.config import load_run
from store_schema.errors import ConfigError
from tests.fake_slurm import calls, fake_tools

REPOSITORY = Path(__file__).resolve().parent.parent

# ---- arrays ------------------------------------------------------------------------------------------


@given(workers=st.sets(st.integers(0, 60)), size=st.integers(1, 20), tasks=st.integers(1, 20))
def test_arrays_hold_each_worker_once_within_the_limits(
    workers: set[int], size: int, tasks: int
) -> None:
    parts = array_parts(workers, ArrayLimits(size, tasks))
    assert [p.offset + task for p in parts for task in p.tasks] == sorted(workers)
    assert all(0 <= task < size for part in parts for task in part.tasks)
    assert all(0 < len(part.tasks) <= tasks for part in parts)


def test_an_array_that_fits_is_not_split() -> None:
    assert array_parts({5, 0, 3}, ArrayLimits(6, 6)) == [ArrayPart(0, (0, 3, 5))]
    assert array_parts({5, 0, 3}, ArrayLimits(5, 5)) == [ArrayPart(0, (0, 3)), ArrayPart(5, (0,))]
    assert array_parts({2, 0, 1}, ArrayLimits(6, 2)) == [ArrayPart(0, (0, 1)), ArrayPart(0, (2,))]


# ---- scripts -----------------------------------------------------------------------------------------


def place(folder: Path, python: Sequence[str] = ("python",), **changes: object) -> Place:
    fields = {"run_name": "r", "folder": folder, "directory": folder, "python": python} | changes
    return Place(**fields)  # type: ignore[arg-type]


def extraction(**changes: object) -> Job:
    fields = {
        "stage": "extract",
        "source": "coder",
        "options": {"gpus": "1"},
        "workers": 16,
        "part": ArrayPart(0, (0, 3, 5, 6, 7)),
    } | changes
    return Job(**fields)  # type: ignore[arg-type]


def test_only_training_has_a_process_for_each_gpu(tmp_path: Path) -> None:
    """An engine shares a model between the GPUs of its one process."""
    text = script_text(extraction(options={"gpus": "4"}), place(tmp_path))
    assert "python -m logitfuse extract run" in text
    assert "torchrun" not in text
    assert "--nodes" not in text


def test_the_script_shown_is_the_one_that_is_written() -> None:
    """The script of examples/slurm/run.yaml stands beside it and in docs/cluster.md."""
    run = load_run(REPOSITORY / "examples/slurm/run.yaml")
    section = run.section("launch", LaunchSection)
    where = Place(
        run.name,
        Path(f"{run.folder}/logs/slurm/20260102T030405Z"),
        Path("/shared/work"),
        ("/shared/venv/bin/python",),
        section.setup,
    )
    shards = set(range(40)) - {1, 2, 17, 18, 33, 34}
    request = Request(
        ("extract",), ("coder",), options_by_stage(section.slurm), section.workers, ArrayLimits()
    )
    (job,) = needed_jobs(request, Pending({"coder": shards}, {"coder": ()}, False))
    written = script_text(job, where)
    assert (REPOSITORY / "examples/slurm/extract-coder.sh").read_text() == written
    assert f"```bash\n{written}```" in (REPOSITORY / "docs/cluster.md").read_text()


def options_by_stage(file: Mapping[str, object]) -> dict[Stage, dict[str, str]]:
    return {stage: options_of(stage, file, {}) for stage in STAGES}  # type: ignore[arg-type]


def directives_of(text: str) -> list[str]:
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    found = list(itertools.takewhile(lambda line: line.startswith("#SBATCH "), lines[1:]))
    assert not any("#SBATCH" in line for line in lines[1 + len(found) :])
    return [line.removeprefix("#SBATCH ") for line in found]


@pytest.mark.parametrize(
    "job",
    [
        extraction(),
        extraction(part=ArrayPart(1000, (0, 7)), workers=2500, number=2),
        Job("align", "coder", {}, 4, ArrayPart(0, (0,))),
        Job("train", None, {"gpus": "1"}),
        Job("train", None, {"gpus": "4"}),
        Job("train", None, {"nodes": "2", "gpus-per-node": "4", "ntasks-per-node": "1"}),
    ],
)
def test_scripts_are_bash_with_directives_first(tmp_path: Path, job: Job) -> None:
    text = script_text(job, place(tmp_path, setup=("module load cuda",)))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    names = [word.partition("=")[0] for word in directives_of(text)]
    assert len(set(names)) == len(names)
    assert {"--job-name", "--output", "--requeue", "--open-mode"} <= set(names)
    assert ("--array" in names) == (job.part is not None)
    assert text.index("module load cuda") < text.index(" -m ")


def test_tasks_are_the_workers_that_have_something_to_do(tmp_path: Path) -> None:
    text = script_text(extraction(), place(tmp_path))
    assert "--array=0,3,5-7" in directives_of(text)
    assert '--source coder --worker "$SLURM_ARRAY_TASK_ID/16" &' in text
    far = extraction(part=ArrayPart(1000, (0, 7)), workers=2500, number=2)
    text = script_text(far, place(tmp_path))
    assert "--array=0,7" in directives_of(text)
    assert '--worker "$((SLURM_ARRAY_TASK_ID + 1000))/2500" &' in text


def test_one_process_is_started_as_it_is(tmp_path: Path) -> None:
    for options in ({}, {"gpus": "1"}, {"nodes": "1", "gpus-per-node": "a100:1"}):
        text = script_text(Job("train", None, options), place(tmp_path))
        assert f"\npython -m logitfuse train run {tmp_path}/run.yaml &\npid=$!\n" in text
        assert "srun" not in text
        assert "kill -TERM" in text


SEVERAL = """\
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((10000 + SLURM_JOB_ID % 20000))  # jobs that meet on a node have different ones
export LOGITFUSE_EXIT_FILE={folder}/train{stem}.exit-"$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
srun --nodes={nodes} --ntasks-per-node=1{cpus} --cpu-bind=none --kill-on-bad-exit=1 \\
    python -m fuse_train.machine.torchrun \\
    --nnodes={nodes} --nproc-per-node={count} --max-restarts=0 --rdzv-backend=c10d \
--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$host:$port" \\
    -m fuse_train run {folder}/run.yaml{pair} &
pid=$!
"""


@pytest.mark.parametrize(
    ("options", "per_node", "nodes", "count"),
    [
        ({"nodes": "2", "gpus-per-node": "4"}, None, 2, 4),
        ({"nodes": "3", "gres": "gpu:a100:2"}, 2, 3, 2),
        ({"nodes": "2", "gpus-per-task": "8"}, None, 2, 8),
        ({"nodes": "2"}, None, 2, 1),
        ({"nodes": "2", "cpus-per-task": "8"}, 4, 2, 4),
        ({"gpus": "h100:4"}, None, 1, 4),
        ({}, 3, 1, 3),
    ],
)
def test_several_processes_have_a_torchrun_on_each_node(
    tmp_path: Path, options: dict[str, str], per_node: int | None, nodes: int, count: int
) -> None:
    for source in (None, "coder"):
        job = Job("train", source, options, processes_per_node=per_node)
        text = script_text(job, place(tmp_path))
        pair = f" --pair {source}" if source else ""
        cpus = " --cpus-per-task=8" if "cpus-per-task" in options else ""
        stem = f"-{source}" if source else ""
        expected = SEVERAL.format(
            folder=tmp_path, nodes=nodes, count=count, cpus=cpus, pair=pair, stem=stem
        )
        assert expected in text
        assert {f"--nodes={nodes}", "--ntasks-per-node=1"} <= set(directives_of(text))


def test_the_training_shown_is_the_one_that_is_written() -> None:
    run = load_run(REPOSITORY / "examples/slurm/run.yaml")
    where = Place(
        run.name,
        Path(f"{run.folder}/logs/slurm/20260102T030405Z"),
        Path("/shared/work"),
        ("python",),
    )
    options = {"nodes": "2", "gpus-per-node": "4", "cpus-per-task": "32"}
    text = script_text(Job("train", None, options), where)
    shown = text[text.index("host=") : text.index("pid=$!")]
    assert f"```bash\n{shown}```" in (REPOSITORY / "docs/cluster.md").read_text()


@pytest.mark.parametrize("name", ["a b", "it's $(touch owned) `touch owned` & ;", "100%", "ü"])
def test_odd_folders_are_quoted(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    text = script_text(extraction(), place(folder, python=("echo", name, "$HOME")))
    (output,) = [word for word in directives_of(text) if word.startswith("--output")]
    assert shlex.split(output) == [
        f"--output={str(folder).replace('%', '%%')}/extract-coder-%A_%a.log"
    ]
    done = run_script(folder, text, {"SLURM_ARRAY_TASK_ID": "3"})
    assert done.stdout.startswith(f"{name} $HOME -m logitfuse extract run {folder}/run.yaml")
    assert sorted(path.name for path in folder.iterdir()) == ["job.sh"]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_folders_that_sbatch_cannot_be_given(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="sbatch cannot be given this path"):
        script_text(extraction(), place(tmp_path / name))


@given(value=st.text(max_size=12))
def test_no_value_gets_out_of_its_line(value: str) -> None:
    try:
        given_line = parse_options([f"comment={value}"])
    except ConfigError:
        return
    options = options_of("extract", {}, given_line)
    words = directives_of(script_text(extraction(options=options), place(Path("/f"))))
    assert [w for w in words if w.startswith("--comment")] == (
        [f"--comment={value}"] if value else []
    )


# ---- what a script does when Slurm signals ---------------------------------------------------------

WORKER = """\
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.3)  # ending takes a while
    print("stopped by", signal.Signals(number).name, flush=True)
    sys.exit(int(os.environ["CODE"]))
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(float(os.environ.get("SLEEP", "60")))
sys.exit(int(os.environ["CODE"]))
"""


def run_script(
    folder: Path,
    text: str,
    environment: Mapping[str, str],
    number: signal.Signals | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script as Slurm would, and signal its shell alone once the worker is ready."""
    (folder / "job.sh").write_text(text)
    process = subprocess.Popen(
        ["bash", str(folder / "job.sh")],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    head = ""
    if number is not None:
        assert process.stdout is not None
        head = process.stdout.readline()
        assert head == "ready\n"
        time.sleep(0.2)  # the shell sets its traps right after it started the worker
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return subprocess.CompletedProcess([], process.returncode, head + out, err)


@pytest.fixture
def stopped(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script around WORKER with a `scontrol` that only writes down what it is told."""
    tools = fake_tools(tmp_path / "tools", scontrol="")

    def run(
        number: signal.Signals | None, code: int, job: Job | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        (tmp_path / "worker.py").write_text(WORKER)
        where = place(tmp_path, (sys.executable, str(tmp_path / "worker.py")), max_requeues=3)
        ids = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "44"}
        path = {"PATH": f"{tools}:{os.environ['PATH']}", "CODE": str(code)}
        text = script_text(job or extraction(), where)
        done = run_script(tmp_path, text, ids | path | environment, number)
        done.args = calls(tools)
        return done

    return run


Stopping = Callable[..., "subprocess.CompletedProcess[str]"]


def test_a_worker_that_got_somewhere_is_requeued_before_the_time_limit(stopped: Stopping) -> None:
    done = stopped(signal.SIGUSR1, 75)
    assert "stopped by SIGUSR1" in done.stdout  # the shell waited for its end
    assert done.returncode == 75
    assert done.args == ["scontrol requeue 41_3"]
    assert "requeued to go on" in done.stderr
    training = stopped(signal.SIGUSR1, 75, Job("train", None, {}))
    assert training.args[-1] == "scontrol requeue 44"


def test_a_worker_that_got_nowhere_is_not(stopped: Stopping) -> None:
    done = stopped(signal.SIGUSR1, 143)
    assert (done.returncode, done.args) == (143, [])
    assert "the time limit is too short for one shard" in done.stderr


@pytest.mark.parametrize("code", [0, 2])
def test_a_warned_worker_that_ends_by_itself_is_left_alone(stopped: Stopping, code: int) -> None:
    done = stopped(signal.SIGUSR1, code)
    assert (done.returncode, done.args, done.stderr) == (code, [], "")


def test_sigterm_is_passed_on_and_is_no_reason_to_requeue(stopped: Stopping) -> None:
    done = stopped(signal.SIGTERM, 75)
    assert "stopped by SIGTERM" in done.stdout
    assert (done.returncode, done.args, done.stderr) == (75, [], "")


@pytest.mark.parametrize("code", [0, 2, 75])
def test_exit_codes_are_passed_on(stopped: Stopping, code: int) -> None:
    assert stopped(None, code, SLEEP="0").returncode == code


def test_requeues_come_to_an_end(stopped: Stopping) -> None:
    assert stopped(signal.SIGUSR1, 75, SLURM_RESTART_COUNT="2").args == ["scontrol requeue 41_3"]
    done = stopped(signal.SIGUSR1, 75, SLURM_RESTART_COUNT="3")
    assert len(done.args) == 1
    assert "started again 3 times or more, not requeued" in done.stderr
    assert done.returncode == 75
