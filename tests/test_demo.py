"""`logitfuse demo`: its commands are those of `make demo`, its run file is the example's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from first_run.demo import run as demo
from store_schema.config import load_run
from tests.command import call, refused

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, where nothing that is called is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_call", lambda words: 0)
    return tmp_path


def shown(output: str) -> list[str]:
    return [line.removeprefix("$ ") for line in output.splitlines() if line.startswith("$ ")]


def make_demo(seed: int) -> list[str]:
    """The commands of `make demo`, as `logitfuse demo` shows them."""
    words = ["make", "-n", "demo", f"SEED={seed}", "VENV=venv"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [
        line.replace("venv/bin/python examples/make_demo.py", "python -m first_run.demo.make")
        for line in done.stdout.splitlines()
    ]
    lines = [line.replace("venv/bin/logitfuse", "logitfuse") for line in lines]
    return [line for line in lines if line.startswith(("logitfuse ", "python -m first_run"))]


@pytest.mark.parametrize(("seed", "folder"), [(0, "runs/demo"), (1, "runs/demo-1")])
def test_its_commands_are_those_of_make(here: Path, seed: int, folder: str) -> None:
    result = call("demo", "--seed", seed)
    assert result.exit_code == 0, result.output
    wanted = [line.replace("examples/demo.yaml", f"{folder}/demo.yaml") for line in make_demo(seed)]
    assert len(wanted) == 1 + len(demo.STAGES)
    assert shown(result.stdout) == wanted
    assert f"open {folder}/report/index.html" in result.stdout


def test_its_run_file_is_the_example(here: Path) -> None:
    example = (REPOSITORY / "examples/demo.yaml").read_text()
    assert demo.run_file_text(Path("runs/demo"), 0, "vllm") == example


@pytest.mark.parametrize("place", ["elsewhere/my-demo", "/tmp/x/.hidden", "runs/a"])
def test_another_folder_seed_and_engine_change_only_those(here: Path, place: str) -> None:
    text = demo.run_file_text(Path(place), 3, "transformers")
    found = yaml.safe_load(text)
    example = yaml.safe_load(
        (REPOSITORY / "examples/demo.yaml").read_text().replace("runs/demo", place)
    )
    assert (found.pop("seed"), found["extract"].pop("engine")) == (3, "transformers")
    del example["seed"], example["extract"]["engine"], example["name"], found["name"]
    found.pop("run_dir", None)
    assert found == example
    path = here / "demo.yaml"
    path.write_text(text)
    assert load_run(str(path), ()).folder == place


def test_an_edited_run_file_is_kept(here: Path) -> None:
    call("demo", "--run-dir", "d")
    path = here / "d/demo.yaml"
    path.write_text(path.read_text().replace("selector: asn", "selector: uniform"))
    again = call("demo", "--run-dir", "d")
    assert again.exit_code == 0
    assert "as it is there" in again.stdout
    assert "selector: uniform" in path.read_text()
    assert "expected seed 4, got 0" in refused("demo", "--run-dir", "d", "--seed", 4)


@pytest.mark.parametrize("place", ["a: b", "s3://bucket/x", "with space", "a$HOME"])
def test_a_folder_that_yaml_reads_otherwise_is_refused(here: Path, place: str) -> None:
    assert "--run-dir" in refused("demo", "--run-dir", place)
    assert not list(here.iterdir())


def test_a_failed_stage_ends_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([0, 0, 75])
    monkeypatch.setattr(demo, "_call", lambda words: next(codes))
    result = call("demo", "--run-dir", "d")
    assert result.exit_code == 75
    assert len(shown(result.stdout)) == 3
    assert "stopped at `logitfuse extract plan d/demo.yaml`" in result.stderr


@pytest.mark.parametrize(("missing", "engine"), [("vllm", "transformers"), ("none", "vllm")])
def test_the_engine_is_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, missing: str, engine: str
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else name)
    assert demo.engine_here() == engine


def test_missing_packages_are_named_before_anything_is_made(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install 'logitfuse[train]'" in refused("demo")
    assert not list(here.iterdir())


def test_commands_run_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").mkdir()  # a folder with the name of a package
    (tmp_path / "launch/__init__.py").write_text("raise ImportError('this folder')")
    assert demo._call(["python", "-m", "first_run.demo.make", "--help"]) == 0
    assert demo._call(["logitfuse", "corpus", "build", "missing.yaml"]) == 2
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert demo._call(["logitfuse", "--version"]) == 1
