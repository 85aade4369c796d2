"""What all commands have in common: --json, help, errors about run files, exit codes, completion."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from launch.command import StageGroup, echo_json, echo_pages, json_option
from launch.json_lines import json_text
from logitfuse import STAGES, main
from store_schema import errors
from tests.command import all_commands, call, is_table, ok, refused
from tests.planned_store import make_run, store_folder

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {
    words: context
    for words, context in all_commands().items()
    if not isinstance(context.command, click.Group)
}
NOTHING_TO_REPORT = {"demo", "train check"}
"""`demo` calls other commands; `train check` says one sentence, as its exit code does."""
RUN_FILES = ("config", "file", "run_file", "target")
"""Parameters that take a run file, or the file of a study."""
WITHOUT_RUN_FILE = {"demo", "init", "merge", "preset list", "preset show", "store copy"}
EXPLAINS = {"doctor"}
"""Lists a run file that is refused among its other findings."""
ESCAPES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def names_of(context: click.Context) -> set[str]:
    return {name for param in context.command.params for name in param.opts}


# ------------------------------------------------------------------------------- --json


def test_every_command_that_reports_takes_json() -> None:
    without = {words for words, context in COMMANDS.items() if "--json" not in names_of(context)}
    assert without == NOTHING_TO_REPORT
    helps = {
        param.help
        for context in COMMANDS.values()
        for param in context.command.params
        if isinstance(param, click.Option) and "--json" in param.opts
    }
    assert helps == {"JSON instead of text, one object on a line."}


def test_nothing_but_json_is_on_stdout() -> None:
    @click.group(cls=StageGroup)
    def group() -> None:
        pass

    @group.command()
    @json_option
    def report(as_json: bool) -> None:
        print("a library's greeting")
        click.echo("a progress line")
        if as_json:
            echo_json({"loss": float("nan"), "text": "\x1b[2J\u202e"})

    result = CliRunner().invoke(group, ["report", "--json"])
    assert result.stdout == '{"loss": null, "text": "\\u001b[2J\\u202e"}\n'
    assert result.stderr == "a library's greeting\na progress line\n"
    assert CliRunner().invoke(group, ["report"]).stdout == result.stderr


def test_a_number_that_json_has_no_form_for_is_null() -> None:
    assert json_text({"a": [float("inf"), 1.5], "b": "NaN"}) == '{"a": [null, 1.5], "b": "NaN"}'


def test_json_of_stores(tmp_path: Path) -> None:
    run_file, copied = make_run(tmp_path, leave_out=[1]), tmp_path / "copied"

    def read(*words: object) -> dict[str, Any]:
        (line,) = call("store", *words, "--json").stdout.splitlines()
        return dict(json.loads(line))

    verified = read("verify", run_file)
    assert verified["sound"] is False
    (store,) = verified["stores"]
    assert (store["sound"], store["missing"], store["damaged"]) == ([0, 2], [1], {})
    assert read("verify", run_file, "--allow-missing")["sound"] is True
    assert read("repair", run_file, "--shard", 0, "--dry-run") == {
        "dry_run": True,
        "stores": [
            {
                "store": "stores/s",
                "uncommitted": {"0": None},
                "rewritten": [],
                "faults": [],
                "rerun": f"logitfuse extract run {run_file} --source s",
            }
        ],
    }
    assert read("gc", run_file)["stores"] == [{"store": "stores/s", "removed": [], "kept": []}]
    assert len(read("stats", run_file)["stores"]) == 1
    listed = read("show", run_file)
    shown = read("show", run_file, "--segment", listed["segments"][0]["segment"])
    assert shown["segment"] == listed["segments"][0]["segment"]
    assert "".join(p["token"] for p in shown["positions"]) == listed["segments"][0]["text"]
    assert all(len(p["best"]) <= 5 for p in shown["positions"])
    assert read("copy", store_folder(tmp_path), copied)["copied"] == 2
    assert read("export", copied, tmp_path / "out")["written"] == 2


def test_json_of_presets() -> None:
    presets = json.loads(ok("preset", "list", "--json"))["presets"]
    for name, title in presets.items():
        shown = json.loads(ok("preset", "show", name, "--json"))
        assert (shown["name"], shown["title"]) == (name, title)
        assert shown["values"]["train"]


# ------------------------------------------------------------------------------- terminals


@pytest.mark.parametrize("words", list(all_commands()))
def test_help_fits_on_80_columns(words: str) -> None:
    shown = ok(*words.split(), "--help", env={"COLUMNS": "80"})
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    assert not ESCAPES.search(shown)


def in_terminal(folder: Path, *words: object, **env: str) -> str:
    """What a command writes to a terminal of 80 columns, as a process."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "logitfuse", *map(str, words)],
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "80", "PAGER": "cat", "TERM": "xterm"}
        | env,
        cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    parts = []
    while True:
        try:
            parts.append(os.read(ours, 65536))
        except OSError:  # Linux's end of a terminal
            break
        if not parts[-1]:
            break
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_a_terminal_of_80_columns(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    for words in (
        ("--help",),
        ("store", "show", run_file),
        ("store", "show", run_file, "--segment", "0"),
        ("store", "stats", run_file),
    ):
        shown = in_terminal(tmp_path, *words, NO_COLOR="1")
        shown = shown.removesuffix("\x1b[0m")  # of colorama, which numba imports, as it ends
        wide = [line for line in shown.splitlines() if len(line) > 80 and is_table(line)]
        assert wide == [], words
        assert not ESCAPES.search(shown), words


def test_colours_are_for_terminals_without_no_color() -> None:
    @click.group(cls=StageGroup)
    def group() -> None:
        pass

    @group.command()
    def report() -> None:
        click.secho("red", fg="red")

    def shown(colour: bool, **env: str | None) -> str:
        return CliRunner(env=env).invoke(group, ["report"], color=colour).stdout

    assert shown(True, NO_COLOR=None) == "\x1b[31mred\x1b[0m\n"
    assert shown(True, NO_COLOR="") == "\x1b[31mred\x1b[0m\n"
    assert shown(True, NO_COLOR="1") == "red\n"
    assert shown(False, NO_COLOR=None) == "red\n"


def test_a_pipe_gets_long_text_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def report() -> None:
        echo_pages("line\n" * 100)

    monkeypatch.setenv("PAGER", "false")
    assert CliRunner().invoke(report).stdout.count("\n") == 100


# ------------------------------------------------------------------------------- run files


def line_of(words: str, context: click.Context, file: Path) -> list[str]:
    """A command line that is right but for its run file."""
    line = words.split()
    for param in context.command.params:
        kind = param.type
        value = kind.choices[0] if isinstance(kind, click.Choice) else "0"
        if isinstance(param, click.Option):
            line += [param.opts[0], str(value)] if param.required else []
        elif param.name == run_file_argument(words, context):
            line.append(str(file))
        elif param.required:
            line.append(str(value))
    return line


def run_file_argument(words: str, context: click.Context) -> str | None:
    arguments = [p.name for p in context.command.params if isinstance(p, click.Argument)]
    if words == "store export":
        return "source"
    return next((name for name in arguments if name in RUN_FILES), None)


TAKE_A_FILE = {w: c for w, c in COMMANDS.items() if w not in WITHOUT_RUN_FILE | EXPLAINS}


def test_all_others_take_a_run_file() -> None:
    assert len(TAKE_A_FILE) > 30
    assert [words for words, c in TAKE_A_FILE.items() if run_file_argument(words, c) is None] == []


@pytest.mark.parametrize("words", list(TAKE_A_FILE))
def test_a_run_file_that_cannot_be_read_is_one_line(words: str, tmp_path: Path) -> None:
    (tmp_path / "yaml").write_text("name: [")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00name")
    (tmp_path / "list").write_text("- name\n")
    (tmp_path / "folder").mkdir()
    for name in ("missing", "folder", "yaml", "bytes", "list"):
        result = call(*line_of(words, TAKE_A_FILE[words], tmp_path / name))
        if words in {"store verify", "store repair"} and name == "folder":
            assert "no store" in result.stdout  # a finding, as of a damaged store
            assert result.exit_code == 2
            continue
        assert result.exit_code == 2, (name, result.output)
        assert result.stderr.startswith("error: "), (name, result.stderr)
        assert result.stderr.count("\n") == 1, (name, result.stderr)
        assert str(tmp_path / name) in result.stderr, name
        assert result.stdout == "", name


def test_a_missing_preset_is_one_line() -> None:
    assert "no such preset" in refused("preset", "show", "nothing")


# ------------------------------------------------------------------------------- exit codes


def test_exit_codes_are_those_of_the_reference() -> None:
    page = (REPOSITORY / "docs/reference/cli.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    classes, kinds = [errors.OneLine], []
    while classes:
        kinds.append(classes.pop())
        classes += kinds[-1].__subclasses__()
    assert len(kinds) > 12
    ours = {kind.exit_code for kind in kinds}
    assert listed == {0, 1} | ours
    assert click.UsageError.exit_code in ours
    for kind in kinds:
        paragraph = re.search(rf"^\| {kind.exit_code} \| (.*) \|$", page, re.MULTILINE)
        assert paragraph
        assert ("stopped" in paragraph[1]) == issubclass(kind, errors.Stopped)


def test_every_error_of_click_ends_with_the_code_of_refusals() -> None:
    @click.group(cls=StageGroup)
    def group() -> None:
        pass

    @group.command()
    def fail() -> None:
        raise click.FileError("x", "cannot be read")

    result = CliRunner().invoke(group, ["fail"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


# ------------------------------------------------------------------------------- completion


def completed(*words: str) -> list[str]:
    """What a shell offers for the last word."""
    complete = BashComplete(main, {}, "logitfuse", "_LOGITFUSE_COMPLETE")
    *before, incomplete = words
    return [item.value for item in complete.get_completions(before, incomplete)]


def test_words_are_completed(tmp_path: Path) -> None:
    assert completed("") == list(STAGES)
    assert completed("st") == ["study", "status", "store"]
    assert completed("extract", "pl") == ["plan"]
    assert "--json" in completed("status", "--")
    assert completed("store", "verify", "--kind", "al") == ["aligned"]
    run_file = make_run(tmp_path)
    assert completed("extract", "run", str(run_file), "--source", "") == ["s"]
    assert completed("extract", "run", "--config", str(run_file), "--source", "x") == []
    assert completed("extract", "run", str(tmp_path / "none"), "--source", "") == []


def test_a_shell_is_answered_without_the_stages(tmp_path: Path) -> None:
    """As the shell's own function asks, in a process."""
    program = "from logitfuse import main; main.main(prog_name='logitfuse')"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "_LOGITFUSE_COMPLETE": "bash_complete"}
    for line, offered, light in (
        ("logitfuse tr", "train", True),
        ("logitfuse train ex", "explain", True),
        ("logitfuse align vi", "view", True),
        ("logitfuse store ver", "verify", False),
    ):
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", program],
            env=env | asked, cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == f"plain,{offered}\n"
        loaded = {text.rpartition("|")[2].strip() for text in done.stderr.splitlines()}
        assert "launch.command" in loaded
        assert not loaded & {"torch", "transformers", "vllm"}
        if light:
            assert not loaded & {"numpy", "pyarrow", "numba"}


def test_the_lines_for_bash_make_it_complete(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/howto.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?_LOGITFUSE_COMPLETE=(\w+)_source.*?)^```$", page, re.M | re.S)
    assert {shell for _, shell in blocks} == {"bash", "zsh", "fish"}
    program = tmp_path / "bin/logitfuse"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nfrom logitfuse import main\nmain.main(prog_name='logitfuse')\n"
    )
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"HOME": str(tmp_path), "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    asks = "COMP_WORDS=(logitfuse extract pl); COMP_CWORD=2; _logitfuse_completion logitfuse"
    for script, shell in blocks:
        assert len(script.splitlines()) == 2
        subprocess.run(["bash", "-ec", script], env=env, check=True)
        if shell == "bash":
            done = subprocess.run(
                ["bash", "-ec", f". ~/.bashrc; complete -p logitfuse; {asks}; echo ${{COMPREPLY[@]}}"],
                env=env, capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert done.stdout.splitlines()[-1] == "plan"
            assert "_logitfuse_completion logitfuse" in done.stdout
    assert "compdef" in (tmp_path / ".logitfuse.zsh").read_text()
    assert "complete " in (tmp_path / ".config/fish/completions/logitfuse.fish").read_text()
