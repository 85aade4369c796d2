"""Judge python: a function's limits, failures and stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.judge_runs import (
    FUNCTIONS,
    PROMPTS,
    answered,
    authors,
    half_right,
    judged,
    judges,
    make_models,
    not_judged,
    right,
    scores_of,
    write_functions,
)

pytestmark = pytest.mark.usefixtures("quick_processes")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("chat_models"))


@pytest.fixture
def run(tmp_path: Path, chat_models: dict[str, Path]) -> Path:
    """coder is right on two prompts, writer on all."""
    return answered(tmp_path, chat_models, {"coder": half_right, "writer": right})


def test_a_function_in_trouble_is_counted(run: Path) -> None:
    place = write_functions(run.parent)
    given = {"kind": "python", "name": "mine", "function": f"{place}:trouble", "seconds": 1.0}
    said = judged(run, *judges(given | {"memory_mib": 256}))
    assert "mine has no score for some answers: crashed 2, memory 1, no score 1, " in said
    assert "raised ValueError 1, time 1" in said
    rows = {(row.prompt, row.source): row for row in scores_of(run)}
    assert rows["sum", "coder"].failure == "time"
    assert rows["sum", "coder"].score is None
    assert rows["sum", "coder"].vote == 0.0
    assert authors(run) == ["writer"] * len(PROMPTS)
    assert "time" in judged("show", run, "--prompt", "sum")


def test_a_function_with_higher_limits_is_asked_again(run: Path) -> None:
    given = {"kind": "python", "function": f"{write_functions(run.parent)}:slow"}
    line = not_judged(run, *judges(given | {"seconds": 0.1}))
    assert "judge python has no score for any answer" in line
    assert "got time 12; correct the judge or its options" in line
    assert "best answers by author" in judged(run, *judges(given | {"seconds": 60}))


def test_the_first_error_of_a_function_is_shown(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"kind": "python", "function": f"{write_functions(run.parent)}:broken"}
    assert "got raised KeyError 12" in not_judged(run, *judges(given))
    assert caplog.text.count("KeyError: 'no such key'") == 1


def test_functions_that_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_functions(run.parent)

    def refused(function: str) -> str:
        return not_judged(run, *judges({"kind": "python", "function": function}))

    assert "judge python returns nan in answer 0 of " in refused(f"{place}:nan")
    for function, said in (
        (f"{place}:absent", "AttributeError"),
        (f"{place}:no_function", "TypeError"),
        (f"{run.parent}/none.py:length", "no file"),
        ("no_such_module:length", "ModuleNotFoundError"),
    ):
        line = refused(function)
        assert "function of judge python cannot be loaded" in line
        assert said in line
    # A module in the folder where the command runs, or one that is installed.
    monkeypatch.chdir(run.parent)
    judged(run, *judges({"kind": "python", "function": "functions:length"}))
    # Another function is another judge.
    place.write_text(
        FUNCTIONS.replace('return len(asked["answer"])', 'return -len(asked["answer"])')
    )
    assert "best answers" in judged(
        run, *judges({"kind": "python", "function": "functions:length"})
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_judge_goes_on(
    tmp_path: Path, chat_models: dict[str, Path], number: signal.Signals
) -> None:
    said = {"coder": half_right, "writer": right}
    path, other = (answered(tmp_path / name, chat_models, said) for name in ("a", "b"))
    place = write_functions(tmp_path)
    (tmp_path / "signal").write_text(str(int(number)))
    words = judges({"kind": "python", "function": f"{place}:stopper"}, "exact_answer")
    done = subprocess.run(
        [sys.executable, "-m", "logitfuse", "judge", str(path), *words],
        cwd=REPOSITORY, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == (75 if number == signal.SIGTERM else -9), done.stderr
    assert not (tmp_path / "a/run/judged/judged.json").exists()
    parts = list((tmp_path / "a/run/judged/parts/python").iterdir())
    assert parts
    log = tmp_path / "log"
    first = log.read_text().splitlines()
    assert len(first) == 7
    judged(path, *words)
    again = log.read_text().splitlines()[7:]
    # What stood in a finished shard was not asked again.
    assert len(again) < 12
    assert set(first) | set(again) == {f"{p} {s}" for p in PROMPTS for s in ("coder", "writer")}
    judged(other, *words)
    for name in ("best.parquet", "scores.parquet"):
        one, two = (tmp_path / run / "run/judged" / name for run in ("a", "b"))
        assert one.read_bytes() == two.read_bytes()
