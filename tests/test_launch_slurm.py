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
    assert "accelerate" not in text
    assert "pkill" not in text


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


def test_training_takes_a_process_for_each_gpu(tmp_path: Path) -> None:
    one = script_text(Job("train", None, {"gpus": "1"}), place(tmp_path))
    assert f"python -m logitfuse train run {tmp_path}/run.yaml &" in one
    four = script_text(Job("train", None, {"gres": "gpu:a100:4"}), place(tmp_path))
    launched = "python -m accelerate.commands.launch --num_processes 4 -m fuse_train run"
    assert f"{launched} {tmp_path}/run.yaml &" in four
    assert 'pkill -USR1 --parent "$pid"' in four  # the launcher itself would just die


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


def test_processes_of_accelerate_are_told_and_their_training_is_requeued(tmp_path: Path) -> None:
    """The launcher is neither signalled, which would end it before them, nor asked for their code."""
    tools = fake_tools(tmp_path / "tools", scontrol="")
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/bash\n{sys.executable} {tmp_path}/worker.py || exit 1\n")
    launcher.chmod(0o755)
    where = place(tmp_path, (str(launcher),))
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "CODE": "75", "SLURM_JOB_ID": "44"}
    text = script_text(Job("train", None, {"gpus": "2"}), where)
    done = run_script(tmp_path, text, environment, signal.SIGUSR1)
    assert "stopped by SIGUSR1" in done.stdout
    assert done.returncode == 1
    assert calls(tools) == ["scontrol requeue 44"]
