"""`study submit --ray`: its tasks, a command in one, and a real cluster of which a worker dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from fuse_eval.study.config import StudyConfig, load_study
from fuse_eval.study.grid import checked_places
from fuse_eval.study.on_ray import data_commands, unit_commands
from fuse_eval.study.results import units_of
from launch.ray import commands
from launch.ray.commands import Command, CommandDriver, CommandSpec, NodeShare, run_words
from launch.ray.workers import ProcessEnd
from launch.signals import StopFlag
from store_schema.errors import ConfigError, ModelError, Stopped
from tests.command import ok, refused
from tests.ray_cluster import RayCluster, cluster_or_skip
from tests.ray_runs import parent_of, wait_until
from tests.slow_progress import slow_hook
from tests.test_end_to_end import write_run
from tests.test_study import PLAIN, study_file
from tests.test_study_costs import hub_study, known

REPOSITORY = Path(__file__).resolve().parent.parent

# ---- which tasks there are ---------------------------------------------------------------------------


def planned(file: Path) -> tuple[StudyConfig, Any]:
    study = load_study(file)
    return study, checked_places(study, (), ())


def test_each_training_and_scoring_is_one_task(tmp_path: Path) -> None:
    study, places = planned(hub_study(tmp_path, known()))
    made = list(unit_commands(study, "s.yaml", places))
    # Two seeds: two models, control and ours by two recipes each; `less` has two more, `same` none.
    assert len(made) == 2 * (2 + 2 + 2) + 2 * 2
    assert len({command.words for command in made}) == len(made)
    assert not [command for command in made if "mined" in command.title]  # waits for ours
    numbers = {}
    for place in places:
        units = list(units_of(study, place))
        assert [unit.number for unit in units] == list(range(len(units)))
        numbers[place.setting, str(place.seed)] = len(units)
    for command in made:
        assert command.words[:3] == ("study", "run", "s.yaml")
        named = dict(zip(command.words[3::2], command.words[4::2], strict=True))
        index, count = map(int, named["--worker"].split("/"))
        assert index < count == numbers[named["--setting"], named["--seed"]]


def test_a_data_set_is_one_task_for_all_its_settings(tmp_path: Path) -> None:
    _, places = planned(hub_study(tmp_path, known()))
    (command,) = data_commands("s.yaml", places)
    assert command.words == (
        *("study", "run", "s.yaml", "--data-only", "--setting", "base", "--setting", "less"),
        *("--setting", "same", "--seed", "0", "--seed", "1"),
    )


def test_other_schedulers_options_are_refused(tmp_path: Path) -> None:
    submit = ("study", "submit", hub_study(tmp_path, known()))
    assert "options of Slurm given to another" in refused(*submit, "--ray", "auto", "--dry-run")
    assert "options of Ray given to another" in refused(*submit, "--gpus-per-worker", "2")


# ---- a command in a task -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("", 0, "words study run f"),
        ("print('error: no; do so', file=sys.stderr); sys.exit(2)", 2, "error: no; do so"),
        ("os.kill(os.getpid(), 9)", -9, "words study run f"),
    ],
)
def test_a_command_runs_in_a_process_of_its_own(
    tmp_path: Path, end: str, code: int, message: str
) -> None:
    script = tmp_path / "process.py"
    words = "words = sys.argv[sys.argv.index('study') : sys.argv.index('--stop-fd')]"
    said = "print('words', *words, file=sys.stderr, flush=True)"
    script.write_text(f"import os, sys\n{words}\n{said}\n{end}\n")
    spec = CommandSpec(str(tmp_path), (sys.executable, str(script)), None)
    assert run_words(spec, ("study", "run", "f")) == ProcessEnd(code, message, os.uname().nodename)
    hidden = run_words(CommandSpec("/", None, str(tmp_path / "gone")), ("study",))
    assert hidden.code == 2
    assert hidden.message.startswith("error: a node does not see the folder of the stores")


def test_a_command_stops_when_its_task_is_killed_or_cancelled(tmp_path: Path) -> None:
    """It is told by a pipe, as `study run --stop-fd` is."""
    script, note = tmp_path / "process.py", tmp_path / "note"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "from launch.signals import stop_on_signals, stop_when_closed\n"
        "with stop_on_signals() as stop:\n"
        "    stop_when_closed(stop, int(sys.argv[-1]))\n"
        f"    Path({str(note)!r}).write_text('begun')\n"
        "    while not stop.asked:\n        time.sleep(0.01)\n"
        f"Path({str(note)!r}).write_text('stopped')\n"
    )
    task = (
        "import sys\nfrom launch.ray.commands import CommandSpec, run_words\n"
        f"run_words(CommandSpec('/', (sys.executable, {str(script)!r}), None), ('study',))\n"
    )
    for number in (signal.SIGKILL, signal.SIGINT):
        note.unlink(missing_ok=True)
        parent = subprocess.Popen(
            [sys.executable, "-c", task], cwd=REPOSITORY, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: note.exists() and note.read_text() == "begun", parent)
        parent.send_signal(number)
        assert parent.wait(60) != 0
        deadline = time.monotonic() + 60
        while note.read_text() != "stopped":
            assert time.monotonic() < deadline
            time.sleep(0.01)


# ---- the driver, without Ray -------------------------------------------------------------------------


class LostError(Exception):
    """Stands for RayError."""


class FakeRay:
    """Ray with one node, whose tasks end as they are told."""

    exceptions = SimpleNamespace(RayError=LostError, RayTaskError=type("Task", (LostError,), {}))

    def __init__(self, ends: dict[str, list[Any]], cpus: float = 2.0) -> None:
        self.ends, self.cpus = ends, cpus
        self.started: list[str] = []
        self.most = 0
        self._open: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}]

    def remote(self, **options: Any) -> Any:
        assert options["max_retries"] == 0

        def start(spec: CommandSpec, words: tuple[str, ...]) -> Any:
            self.started.append(words[0])
            self._open.append(SimpleNamespace(end=self.ends[words[0]].pop(0)))
            self.most = max(self.most, len(self._open))
            return self._open[-1]

        def decorate(function: Any) -> Any:
            return SimpleNamespace(
                remote=lambda *given: _Reference(start(*given))  # hashable, as Ray's are
            )

        return decorate

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        self._open.remove(reference.of)
        if isinstance(reference.of.end, Exception):
            raise reference.of.end
        return reference.of.end

    def cancel(self, reference: Any) -> None:
        self._open.remove(reference.of)


class _Reference:
    def __init__(self, of: Any) -> None:
        self.of = of


WELL = ProcessEnd(0, "", "host")


def drive(ray: FakeRay, stop: StopFlag | None = None, **share: Any) -> list[str]:
    """Titles of what has ended well."""
    spec, ended = CommandSpec("/", None, None), []
    driver = CommandDriver(ray, NodeShare(**share), spec, stop or StopFlag())
    driver.run([Command(name, (name,)) for name in ray.ends], lambda c: ended.append(c.title))
    return ended


def test_lost_commands_begin_again() -> None:
    ray = FakeRay(
        {
            "a": [LostError("node died"), ProcessEnd(-9, "", "host"), WELL],
            "b": [ProcessEnd(75, "error: stopped", "host"), WELL],
            "c": [WELL],
        }
    )
    assert sorted(drive(ray, at_a_time=2)) == ["a", "b", "c"]
    assert sorted(ray.started) == ["a", "a", "a", "b", "b", "c"]
    assert ray.most == 2
    again = FakeRay({"a": [LostError("gone")] * commands.LOSSES, "b": [WELL]})
    with pytest.raises(ModelError, match="a was lost 5 times"):
        drive(again, at_a_time=1)


def test_a_refusal_a_stop_and_a_small_cluster_end_all(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = ProcessEnd(2, "error: no such task", "far")
    with pytest.raises(SystemExit) as caught:
        drive(FakeRay({"a": [refusal], "b": [WELL]}))
    assert caught.value.code == 2
    assert "error: no such task (on far)" in capsys.readouterr().err
    with pytest.raises(ModelError, match="KeyError"):
        drive(FakeRay({"a": [ProcessEnd(1, "KeyError: x", "far")]}))
    stop = StopFlag()
    stop.ask(signal.SIGTERM)
    with pytest.raises(Stopped):
        drive(FakeRay({"a": [WELL]}), stop)
    with pytest.raises(ConfigError, match="no node of the Ray cluster has room"):
        drive(FakeRay({"a": [WELL]}), cpus=4.0)


# ---- a real cluster ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with cluster_or_skip() as running:
        yield running


def processes_of(file: Path, *words: bytes) -> list[int]:
    """Processes of this study's tasks."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (place / "cmdline").read_bytes()
            if bytes(file.parent) in line and all(word in line for word in words):
                found.append(int(place.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("quick_processes")
def test_a_worker_dies_and_results_are_those_of_one_process(
    tmp_path: Path, cluster: RayCluster, tiny_models: dict[str, Path]
) -> None:
    run = write_run(tmp_path, tiny_models)
    content = yaml.safe_load(run.read_text())
    content["train"] |= {
        "max_steps": 4,
        "eval_every": 2,
        "checkpoint_every": 1,
        "precision": "float32",
    }
    run.write_text(yaml.safe_dump(content))
    rows = {
        "before": {"model": "target"},
        "control": {"set": PLAIN},
        "ours": {},
        "no code": {"tuned_as": "ours", "sources": ["prose", "facts"]},
    }
    setting = {"run": str(run), "set": {"evaluate.pool_selectors": ["uniform"]}}
    changed: dict[str, Any] = {"rows": rows, "interference_against": None}
    changed["settings"] = {"toy": setting}
    hook, slow = slow_hook(tmp_path / "slow", 0)
    path = os.pathsep.join([str(hook), str(REPOSITORY)])
    python = ["env", f"PYTHONPATH={path}", f"SLOW_FILE={slow}", sys.executable]
    file = study_file(tmp_path, run, **changed, submit={"python": python})
    ok("study", "run", file, "--data-only")
    cluster.add_node(num_cpus=2)
    slow.write_text("0.5")
    command = [sys.executable, "-m", "logitfuse", "study", "submit", str(file), "--ray", "auto"]
    pipe = subprocess.PIPE
    driver = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY)
    try:
        checkpoints = "study/toy/seed-0/ours-*/checkpoints/step-*"
        wait_until(lambda: any(tmp_path.glob(checkpoints)), driver, seconds=400)
        tasks = processes_of(file, b"study", b"--stop-fd")
        assert tasks
        for task in tasks:
            os.kill(parent_of(task), signal.SIGKILL)  # as Ray does when memory is short
        slow.write_text("0")
        out, err = driver.communicate(timeout=400)
    finally:
        driver.kill()
        driver.communicate()
        cluster.remove_nodes()
    assert driver.returncode == 0, err
    assert err.count("was lost and begins again") == len(tasks)
    assert "page:" in out
    found = json.loads((tmp_path / "results/study.json").read_text())["settings"]["toy"]["rows"]
    assert set(found) == set(rows)
    alone = tmp_path / "alone"
    places = {"study_dir": str(alone / "study"), "results_dir": str(alone / "results")}
    alone.mkdir()
    ok("study", "run", study_file(alone, run, **changed, **places))
    plain = json.loads((alone / "results/study.json").read_text())["settings"]["toy"]["rows"]
    for name in rows:
        assert found[name]["bpb"] == pytest.approx(plain[name]["bpb"], rel=1e-4)
    again = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert again.stdout.startswith("nothing to do")
