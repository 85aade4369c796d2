"""Every command block of the README and docs/ runs on a small finished run, or says what it needs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from logitfuse import main
from store_schema.config import load_run, section_models
from tests import docs_blocks
from tests.command import all_commands, call, is_table, ok
from tests.docs_blocks import REPOSITORY, Block
from tests.docs_world import finish, make_world, segment, stand_in, write

pytestmark = pytest.mark.usefixtures("quick_processes")

BLOCKS = docs_blocks.blocks()
RUN = [block for block in BLOCKS if block.needs is None and block.elsewhere is None]
NOT_RUN = [block for block in BLOCKS if block.needs is not None]
LEAST_SHARE = 0.9

READ_BY = {
    "corpus": ("corpus build",),
    "sources": ("corpus build", "extract plan"),
    "target": ("corpus build", "extract plan"),
    "extract": ("corpus build", "extract plan", "extract run --dry-run"),
    "generate": ("corpus build", "extract plan", "extract generate --dry-run"),
    "store": ("corpus build", "extract plan", "extract run --dry-run"),
    "align": ("align run --dry-run",),
    "train": ("train check",),
    "launch": ("corpus build", "extract plan", "submit extract --dry-run"),
    "judge": ("judge",),
    "evaluate": ("eval answers",),
}
"""Commands that read a section, in a run of its own where no `data_dir` is given."""
ON_THE_FINISHED_RUN = {"judge", "evaluate"}
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
ONLY_READ = (["eval", "harness"],)
"""Commands that need data sets of a hub: in a block of others only their options are checked."""
NOT_THERE = {"saved_dataset"}
"""Inputs that need a package which is not among those of the tests (datasets)."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The small run, as the working directory; Slurm's programs only write down what they are told."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LOGITFUSE_CACHE", str(folder / "cache"))
        make_world(folder)
        finish(folder)
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        yield folder


def titles(block: Block) -> str:
    return block.title


def test_nearly_all_blocks_run(record_property: Any) -> None:
    found = docs_blocks.share()
    record_property("docs_blocks_run", found["docs_blocks_run"])
    print(found)
    assert len(BLOCKS) > 90
    assert found["docs_blocks_run"] >= LEAST_SHARE


@pytest.mark.parametrize("block", [b for b in RUN if b.kind == "commands"], ids=titles)
def test_commands_run(world: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in docs_blocks.commands(block):
        if words[0] == "logitfuse":
            logitfuse(words[1:], world, block, monkeypatch)
        elif words[0] == "make":
            lines = recipe(words)
            assert lines, (
                "a target without a command of logitfuse: mark the block with what it needs"
            )
            for line in lines:
                logitfuse(line, world, block, monkeypatch)
        elif words[0] == "pip":
            check_extras(words)
        elif words[0] in LAUNCHERS:
            launched(words)
        else:
            pytest.fail(f"{words[0]} is not run by this test: mark the block with what it needs")


def logitfuse(words: list[str], world: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command with the names of the small run; it must succeed."""
    if words[:2] in ONLY_READ:
        parse(words)
        return
    named = [stand_in(word) for word in " ".join(words).split(" ")]
    if words[0] == "submit":
        named = ["new.yaml" if word == "run.yaml" else word for word in named]
    if "--pair" in block.text:
        named = ["pairs.yaml" if word == "run.yaml" else word for word in named]
    segment_id = segment(world)
    if "ID" in named:
        document = "--document" in named
        named[named.index("ID")] = segment_id.partition("#")[0] if document else segment_id
    if "--watch" in named:
        monkeypatch.setattr("launch.status_cli.time.sleep", _interrupt)
        assert "demo" in call(*named).stdout
        monkeypatch.undo()
        return
    ok(*named)


def launched(words: list[str]) -> None:
    """Run a command of a launcher, with two processes on this machine's CPUs."""
    parse(["train", *words[words.index("fuse_train") + 1 :]])
    count = next(i for i, word in enumerate(words) if word.isdigit())
    options = ["2" if i == count else word for i, word in enumerate(words)]
    options = [word for word in options[1:] if word != "launch"]
    free_port = {"torchrun": ["--standalone"], "accelerate": ["--cpu", "--main_process_port", "0"]}
    done = subprocess.run(
        [sys.executable, "-m", LAUNCHERS[words[0]], *free_port[words[0]], *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "complete, nothing to do" in done.stdout


def _interrupt(_: float) -> None:
    raise KeyboardInterrupt


REPORTS = {
    "init": "runs/fresh --source models/code --target models/target --data text.jsonl --yes --dry-run",
    "doctor": "run.yaml",
    "corpus build": "run.yaml",
    "corpus show": "run.yaml --document chat-test",
    "extract plan": "run.yaml",
    "extract run": "run.yaml",
    "extract generate": "run.yaml --dry-run",
    "extract import": "imported.yaml --source code --capture capture --dry-run",
    "extract answers": "run.yaml --out answers.jsonl",
    "judge run": "run.yaml",
    "judge show": "run.yaml",
    "align run": "run.yaml",
    "align view": "run.yaml --segment 0 --position 0",
    "align report": "run.yaml",
    "train run": "run.yaml",
    "train selector": "run.yaml",
    "train explain": "run.yaml --segment 0 --all",
    "merge": "runs/merged-twice --method linear models/target models/other",
    "eval pool": "run.yaml",
    "eval run": "run.yaml",
    "eval answers": "run.yaml",
    "eval advantage": "run.yaml",
    "eval interference": "run.yaml",
    "study run": "study.yaml",
    "study plan": "study.yaml",
    "study submit": "study.yaml --dry-run",
    "study show": "study.yaml",
    "report": "run.yaml",
    "submit": "extract new.yaml --dry-run",
    "status": "run.yaml --workers",
    "preset list": "",
    "preset show": "fusechat",
    "store tune": "run.yaml --source code --positions 64",
    "store verify": "run.yaml",
    "store repair": "run.yaml --dry-run",
    "store gc": "run.yaml --dry-run",
    "store stats": "run.yaml",
    "store show": "runs/demo/stores/code --segment 0",
    "store copy": "runs/demo/stores/code copied",
    "store export": "runs/demo/stores/code capture --format distillkit",
}
"""Every command with --json, on the small run."""
NEEDS_A_HUB = {"eval harness"}
WIDE = {"eval pool", "status", "store tune", "study run", "study show"}
"""Commands whose tables need more than 80 columns: one for each domain, or many figures of a row."""
NEXT = {
    "corpus build": "extract plan",
    "extract plan": "extract generate",  # the run has judges
    "extract run": "eval advantage",
    "align run": "eval pool",
    "eval pool": "train run",
    "train selector": "train run",
    "train run": "eval run",
    "eval run": "report",
    "eval advantage": "report",
    "eval answers": "report",
    "judge run": "judge show",
}
"""What each stage says comes next."""


def test_all_reports_are_listed() -> None:
    takes = {
        words
        for words, context in all_commands().items()
        if "--json" in {name for param in context.command.params for name in param.opts}
    }
    assert takes == set(REPORTS) | NEEDS_A_HUB


def line_of(words: str) -> list[str]:
    return [*words.split(), *REPORTS[words].split()]


def prepare(words: str, world: Path) -> None:
    """What a command needs beside the small run."""
    if words == "extract import" and not (world / "capture").exists():
        ok(*line_of("store export"))
        for stage in ("corpus build", "extract plan"):
            ok(*stage.split(), "imported.yaml")
    if words == "study show":
        ok("study", "run", "study.yaml")


@pytest.mark.parametrize("words", list(REPORTS))
def test_reports_as_json_and_on_80_columns(world: Path, words: str) -> None:
    prepare(words, world)
    env = {"COLUMNS": "80"}
    code = 2 if words == "doctor" and call("doctor", "run.yaml").exit_code == 2 else 0
    for _ in range(2):  # the second time there may be nothing to do
        said = call(*line_of(words), "--json", env=env)
        assert said.exit_code == code, said.output
        assert said.stdout.endswith("\n")
        for line in said.stdout.splitlines():
            assert isinstance(json.loads(line), dict)
    said = call(*line_of(words), env=env)
    assert said.exit_code == code, said.output
    assert not re.search(r"[\r\x1b]", said.stdout + said.stderr)
    wide = [line for line in said.stdout.splitlines() if len(line) > 80 and is_table(line)]
    assert bool(wide) == (words in WIDE), wide
    if words in NEXT:
        [told] = [line for line in said.stderr.splitlines() if line.startswith("next: ")]
        assert told == f"next: logitfuse {NEXT[words]} run.yaml"


@pytest.mark.parametrize("block", [b for b in RUN if b.kind == "yaml"], ids=titles)
def test_run_files_are_read_by_their_stages(world: Path, block: Block) -> None:
    given = yaml.safe_load(stand_in(block.text))
    if {"settings", "submit"} & set(given):
        own = {} if "rows" in given else yaml.safe_load((world / "study.yaml").read_text())
        ok("study", "plan", write(world / "block.yaml", own | given))
        return
    late = {name: given.pop(name) for name in ON_THE_FINISHED_RUN & set(given)}
    assert set(READ_BY) & {*given, *late}, block.text
    if late:
        path = run_file(world, late)
        for name in late:
            ok(*READ_BY[name][0].split(), path)
    path = run_file(world, {"name": "block", "run_dir": "runs/block"} | given)
    shutil.rmtree(world / "runs/block", ignore_errors=True)
    sections = ["align"] if "data_dir" in given else [name for name in READ_BY if name in given]
    for command in dict.fromkeys(command for name in sections for command in READ_BY[name]):
        ok(*command.split(), path)


def run_file(world: Path, given: dict[str, Any]) -> Path:
    """The small run's file with a block's values; models of any name are the small ones."""
    run = yaml.safe_load((world / "run.yaml").read_text())
    if "preset" in given:
        del run["train"]
    values = dict(given)
    if "sources" in given:
        values["sources"] = {n: _small(ref, "code") for n, ref in given["sources"].items()}
        values["sources"] |= {
            n: ref for n, ref in run["sources"].items() if n not in given["sources"]
        }
    if "target" in given:
        values["target"] = _small(given["target"], "target")
    if "corpus" in given and "inputs" in given["corpus"]:
        there = [i for i in given["corpus"]["inputs"] if i["path"] not in NOT_THERE]
        values["corpus"] = given["corpus"] | {"inputs": there}
    named = {
        name for stage in given.get("train", {}).get("stages", []) for name in stage["weights"]
    }
    if named and "corpus" not in given:
        files = ("text.jsonl", "answers.jsonl")
        inputs = [{"path": f, "corpus": c} for f, c in zip(files, sorted(named), strict=True)]
        values["corpus"] = {"inputs": inputs}
    for judge in given.get("judge", {}).get("judges", []):
        if "model" in judge:
            judge["model"] = "models/reward"
    for name in section_models():
        if name in values:
            values[name] = run.get(name, {}) | values[name]
    return write(world / "block.yaml", run | values)


def _small(ref: dict[str, Any], name: str) -> dict[str, Any]:
    """A model's entry in the run file, of the small model of that name."""
    kept = {key: value for key, value in ref.items() if key not in ("gguf_file", "dtype")}
    return kept | {"model": f"models/{name}"}


@pytest.mark.parametrize("block", [b for b in RUN if b.kind == "python"], ids=titles)
def test_python_runs(world: Path, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, Any] = {}
    exec(compile(stand_in(block.text), block.title, "exec"), space)
    if "def runs(" in block.text:
        assert space["runs"]({"answer": "x = 7", "reference": "x == 7"}) == 1.0
        return
    assert capsys.readouterr().out.strip()


def test_scripts_of_other_tests_are_run_there() -> None:
    taken = {(Path(b.page).name, b.elsewhere) for b in BLOCKS if b.elsewhere}
    assert taken == set(docs_blocks.ELSEWHERE.items())
    for page, test in taken:
        assert page in (REPOSITORY / "tests" / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("block", NOT_RUN, ids=titles)
def test_what_is_not_run_is_at_least_spelt_right(block: Block, tmp_path: Path) -> None:
    if block.kind == "yaml":
        models = {"sources": {"a": {"model": "a"}}, "target": {"model": "b"}}
        path = write(tmp_path / "run.yaml", {"name": "block"} | models | yaml.safe_load(block.text))
        load_run(path)
        return
    for words in docs_blocks.commands(block):
        if words[0] == "make":
            recipe(words)
        elif words[0] == "pip":
            check_extras(words)
        elif words[0] == "logitfuse":
            parse(words[1:])
        else:
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module), module
            if module == "fuse_train":
                parse(["train", *words[words.index(module) + 1 :]])


@pytest.mark.parametrize(
    "words", [words for _, words in docs_blocks.inline_commands()], ids=" ".join
)
def test_commands_in_sentences_are_spelt_right(words: list[str]) -> None:
    found, rest = command_of(words[1:])
    for option in re.findall(r"--[a-z][a-z-]*", " ".join(rest)):
        assert option in {name for p in found.params for name in p.opts}, option


def recipe(words: list[str]) -> list[list[str]]:
    """Words of every logitfuse command that a make target would run; make itself checks the target."""
    done = subprocess.run(
        ["make", "--dry-run", *words[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = re.findall(r"^\S*/logitfuse (.*?)[;\s]*$", done.stdout, re.MULTILINE)
    for line in lines:
        parse(line.split())
    return [line.split() for line in lines]


def check_extras(words: list[str]) -> None:
    """The extras that pip is asked for are those of the package."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = re.fullmatch(r"logitfuse\[(.*)\]", words[-1])
    assert words[:2] == ["pip", "install"]
    assert named
    assert set(named[1].split(",")) <= set(extras["optional-dependencies"])


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words begin with, and the other words."""
    command: click.Command = main
    context = click.Context(command)
    while isinstance(command, click.Group) and words and words[0].islower():
        inner = command.get_command(context, words[0])
        if inner is None:
            break
        command, words = inner, words[1:]
        context = click.Context(command, parent=context)
    return command, words


def parse(words: list[str]) -> None:
    """Refuse a command line that click would refuse."""
    command, rest = command_of(words)
    assert command is not main, words
    with click.Context(command) as context:
        command.parse_args(context, [stand_in(word) for word in rest])


def test_a_wrong_block_is_found() -> None:
    with pytest.raises(click.UsageError, match="No such option"):
        parse(["train", "run", "run.yaml", "--no-such"])
    with pytest.raises(AssertionError):
        parse(["trian", "run"])
    with pytest.raises(subprocess.CalledProcessError):
        recipe(["make", "no-such-target"])
    with pytest.raises(AssertionError):
        check_extras(["pip", "install", "logitfuse[no-such]"])


def test_blocks_are_told_from_other_text() -> None:
    page = docs_blocks.REPOSITORY / "docs/howto.md"
    marked = [block for block in docs_blocks.blocks() if block.page == "docs/howto.md"]
    assert {b.needs for b in marked} == {None}
    needs = [b.needs for b in docs_blocks.blocks() if b.page == "docs/cluster.md"]
    assert needs.count("a Ray cluster") == 1
    assert {b.kind for b in marked} == {"commands", "yaml", "python"}
    for block in marked:
        first = page.read_text().split("\n")[block.line - 1]
        assert first.strip() == block.text.split("\n")[0].strip()
    line = Block(
        "x", 1, "commands", "$ logitfuse a b.yaml   --c 1   what it does\nlogitfuse said\n", None
    )
    assert docs_blocks.commands(line) == [["logitfuse", "a", "b.yaml", "--c", "1"]]
