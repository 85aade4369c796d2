"""Command lines: overrides, errors in one line, costs noted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from launch.command import StageGroup, run_options, timed_stage, work_options
from launch.summary import append_summary, logs_folder, peak_rss_bytes, read_summaries
from launch.work import Part, Worker
from logitfuse import main
from store_schema.config import RunConfig, load_run
from store_schema.errors import LogitfuseError, Stopped, StoppedMidway, StorageError
from tests.test_store_schema_config import HEAD


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(HEAD | {"run_dir": str(tmp_path / "run")}))
    return path


def _group(body: Any) -> click.Group:
    @click.group(cls=StageGroup)
    def group() -> None:
        """A stage."""

    @group.command("go")
    @run_options
    @click.option("--fast", is_flag=True)
    def go(run: RunConfig, fast: bool) -> None:
        """Goes."""
        body(run, fast)

    return group


def _call(group: click.Group, *args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        group.main(list(args))
    code = caught.value.code
    return code if isinstance(code, int) else -1


def test_torch_is_told_to_keep_few_prepared_operations(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setenv(names[0], "")  # restored afterwards
    monkeypatch.delenv(names[0])
    monkeypatch.setenv(names[1], "500")
    seen: list[str] = []
    group = _group(lambda run, fast: seen.extend(os.environ[name] for name in names))
    assert _call(group, "go", str(file)) == 0
    assert int(seen[0]) < 100
    assert seen[1] == "500"  # the user's


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "0"}, "0"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_of_torch_spin_shortly_unless_the_user_says_how(
    given: dict[str, str], expected: str | None, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen: list[str | None] = []
    group = _group(lambda run, fast: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    assert _call(group, "go", str(file)) == 0
    assert seen == [expected]


def test_command_gets_a_checked_run_and_its_own_options(file: Path) -> None:
    seen = []
    group = _group(lambda run, fast: seen.append((run.seed, run.sections["train"].lr, fast)))
    assert _call(group, "go", str(file), "--set", "seed=4", "--set", "train.lr=0.5", "--fast") == 0
    assert _call(group, "go", str(file)) == 0
    assert seen[0] == (4, 0.5, True)
    assert seen[1][2] is False


def test_the_run_file_is_given_once_either_way(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    group = _group(lambda run, fast: seen.append(run.seed))
    assert _call(group, "go", "--config", str(file), "--set", "seed=4") == 0
    assert seen == [4]
    for words, fact in (
        ((), "no run file given"),
        ((str(file), "--config", str(file)), "two run files given"),
    ):
        assert _call(group, "go", *words) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {fact} in command line: expected one, as CONFIG or as ")
        assert err.count("\n") == 1
    assert len(seen) == 1
    assert _call(group, "go", "--help") == 0
    assert "go [OPTIONS] CONFIG" in capsys.readouterr().out


def _working(seen: list[Any]) -> click.Group:
    @click.group(cls=StageGroup)
    def group() -> None:
        """A stage."""

    @group.command("go")
    @run_options
    @work_options
    def go(run: RunConfig, sources: tuple[str, ...], part: Part, dry_run: bool) -> None:
        seen.append((run.name, sources, part, dry_run))

    return group


def test_work_options(file: Path) -> None:
    seen: list[Any] = []
    group = _working(seen)
    assert _call(group, "go", str(file)) == 0
    words = ["--worker", "1/2", "--shards", "3-7", "--limit", "2", "--dry-run", "--source", "code"]
    assert _call(group, "go", *words, str(file)) == 0
    name, sources = HEAD["name"], tuple(HEAD["sources"])
    assert seen == [
        (name, sources, Part(), False),
        (name, ("code",), Part(Worker(1, 2), ((3, 7),), 2), True),
    ]
    # What a part gives as options makes the same part again.
    assert _call(group, "go", str(file), *seen[1][2].arguments()) == 0
    assert seen[2][2] == seen[1][2]


def test_the_scheduler_says_the_worker_also_when_shards_are_given(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    seen: list[Any] = []
    assert _call(_working(seen), "go", str(file), "--shards", "0-9") == 0
    assert seen[0][2] == Part(Worker(3, 4), ((0, 9),))


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (("--source", "nobody"), "no such source"),
        (("--worker", "4/4"), "worker refused"),
        (("--shards", "9-3"), "shards refused"),
        (("--limit", "0"), "--limit"),
    ],
)
def test_bad_work_options(
    file: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], fact: str
) -> None:
    seen: list[Any] = []
    assert _call(_working(seen), "go", str(file), *words) == 2
    errors = capsys.readouterr().err
    assert fact in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert not seen


def test_usage_ends_in_one_line_and_says_where_help_is(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(_working([]), "go", str(file), "--fly") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: No such option")
    assert errors.endswith(" --help.\n")
    assert errors.count("\n") == 1
    assert _call(main, "train") == 2  # no command: help
    assert "Usage: " in "".join(capsys.readouterr())


def test_a_command_gives_its_own_exit_code() -> None:
    @click.group(cls=StageGroup)
    def group() -> None:
        pass

    @group.command()
    @click.pass_context
    def leave(context: click.Context) -> None:
        context.exit(7)

    assert _call(group, "leave") == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LogitfuseError("it is wrong", where="here"), 2),
        (Stopped("stopped"), 143),
        (StoppedMidway("stopped"), 75),
    ],
)
def test_errors_end_in_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], error: LogitfuseError, code: int
) -> None:
    def fail(run: RunConfig, fast: bool) -> None:
        raise error

    assert _call(_group(fail), "go", str(file)) == code
    assert capsys.readouterr().err == f"error: {error.line()}\n"


def test_bad_run_file_ends_in_one_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    never = _group(lambda run, fast: pytest.fail("ran"))
    assert _call(never, "go", str(file), "--set", "train.lr=fast") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run file refused")
    assert "train" in err
    assert err.count("\n") == 1
    assert _call(never, "go", str(file.parent / "none.yaml")) == 2
    assert "not found" in capsys.readouterr().err
    assert _call(never, "go") == 2


def test_bugs_keep_their_traceback(file: Path) -> None:
    def fail(run: RunConfig, fast: bool) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _group(fail).main(["go", str(file)])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], "Stages, in the order of a run"),
        (["--version"], "0.1.0"),
        (["train", "--help"], "run"),
        (["corpus", "--help"], "build"),
        (["extract", "--help"], "plan"),
        (["align", "--help"], "run"),
        (["eval", "--help"], "pool"),
        (["report", "--help"], "--set"),
        (["status", "--help"], "--watch"),
    ],
)
def test_help_of_every_stage(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(main, *words) == 0
    assert expected in capsys.readouterr().out


def test_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(main, "fly") == 2
    assert "fly" in capsys.readouterr().err


# ------------------------------------------------------------------------------- summaries


def test_costs_are_noted_also_of_failures(file: Path) -> None:
    run = load_run(file)
    with timed_stage(run, "align") as figures:
        figures["shards"] = 3
    with pytest.raises(Stopped), timed_stage(run, "align"):
        raise Stopped("stopped")
    lines = read_summaries(run)["align"]
    assert [line.get("shards") for line in lines] == [3, None]
    assert [line.get("error") for line in lines] == [None, "Stopped"]
    for line in lines:
        assert line["stage"] == "align"
        assert 0 <= line["seconds"] < 10
        assert 10**6 < line["peak_rss_bytes"] <= peak_rss_bytes()
        assert re.match(r"\d{4}-\d\d-\d\dT", line["ended"])


def test_logs_of_a_remote_run_are_local(file: Path) -> None:
    run = load_run(file, ("run_dir=s3://bucket/x",))
    assert logs_folder(run) == Path("runs/demo/logs")


def test_no_logs_yet(file: Path) -> None:
    assert read_summaries(load_run(file)) == {}


def test_log_that_cannot_be_written_is_told(file: Path) -> None:
    run = load_run(file)
    Path(run.folder).mkdir()
    (Path(run.folder) / "logs").write_text("a file in the way")
    with pytest.raises(StorageError, match="log cannot be written"):
        append_summary(run, "align", 1.0, {})


def test_error_of_the_stage_is_told_even_if_the_log_cannot_be_written(file: Path) -> None:
    run = load_run(file)
    Path(run.folder).mkdir()
    (Path(run.folder) / "logs").write_text("a file in the way")
    with pytest.raises(Stopped), timed_stage(run, "align"):
        raise Stopped("stopped")


def test_line_cut_by_a_kill_is_left_out_and_does_not_spoil_the_next(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(file)
    append_summary(run, "align", 1.0, {})
    path = logs_folder(run) / "align.jsonl"
    with path.open("a") as log:
        log.write('{"stage": "align", "sec')
    assert len(read_summaries(run)["align"]) == 1
    append_summary(run, "align", 2.0, {})
    assert [line["seconds"] for line in read_summaries(run)["align"]] == [1.0, 2.0]
    path.with_name("other.jsonl").write_text('broken\n{"seconds": 1}\n7\n')
    caplog.clear()
    assert read_summaries(run)["other"] == [{"seconds": 1}]
    assert [record.args[1] for record in caplog.records if "other" in record.message] == [1, 3]


def test_lines_are_json_of_one_line_each(file: Path) -> None:
    run = load_run(file)
    append_summary(run, "plan", 0.25, {"note": "two\nlines"})
    (line,) = (logs_folder(run) / "plan.jsonl").read_text().splitlines()
    assert json.loads(line)["note"] == "two\nlines"


def test_a_log_that_cannot_be_written_spoils_no_finished_stage(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(file)
    Path(run.folder).mkdir()
    (Path(run.folder) / "logs").write_text("a file in the way")
    with timed_stage(run, "align") as figures:
        figures["shards"] = 3
    assert "log cannot be written" in caplog.text
