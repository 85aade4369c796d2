"""The rooms of docs: who may import whom, and what never loads where."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "store_schema": set(),
    "launch": {"store_schema"},
    "extract": {"store_schema", "launch"},
    "align": {"store_schema", "launch"},
    "fuse_train": {"store_schema", "launch"},
    "fuse_eval": {"store_schema", "launch", "fuse_train"},
    "store_tools": {"store_schema", "launch"},
}

ONLY_IN = {
    "vllm": {"extract/engines/vllm_engine.py"},
    "accelerate": {"fuse_train", "fuse_eval"},
    "numba": {"store_schema/compiled.py"},
    "jinja2": {"fuse_eval"},
}
"""Packages that only these rooms or files may import."""

WITHOUT_TORCH = ("store_schema", "launch", "align", "store_tools")


def _files() -> list[Path]:
    return sorted(path for room in MAY_IMPORT for path in (REPOSITORY / room).rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names of every import of a file, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield str(node.module).split(".")[0], node.lineno
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and getattr(node.func, "attr", getattr(node.func, "id", ""))
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value).split(".")[0], node.lineno


def test_rooms_are_those_of_the_table() -> None:
    rooms = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tests"}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down_the_rooms(room: str) -> None:
    wrong = []
    for path in sorted((REPOSITORY / room).rglob("*.py")):
        for name, line in _imports(path):
            ours = name in MAY_IMPORT or name in ("logitfuse", "tests", "benchmarks", "examples")
            if ours and name != room and name not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {name}")
    assert not wrong


def test_heavy_packages_stay_in_their_place() -> None:
    wrong = []
    for path in _files():
        here = path.relative_to(REPOSITORY)
        for name, line in _imports(path):
            allowed = ONLY_IN.get(name)
            if allowed and here.parts[0] not in allowed and str(here) not in allowed:
                wrong.append(f"{here}:{line} imports {name}")
            if name == "torch" and here.parts[0] in WITHOUT_TORCH:
                wrong.append(f"{here}:{line} imports torch")
            if name in ("pickle", "dill", "cloudpickle"):
                wrong.append(f"{here}:{line} imports {name}")
    assert not wrong


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_rooms_without_torch_load_none(room: str) -> None:
    modules = [
        f"{room}.{path.stem}"
        for path in sorted((REPOSITORY / room).glob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    loaded = _loaded_by("import " + ", ".join(modules))
    assert not loaded & {"torch", "vllm", "accelerate"}


def test_a_run_file_is_read_without_torch() -> None:
    loaded = _loaded_by("from store_schema.config import section_models; section_models()")
    assert "extract" in loaded
    assert not loaded & {"torch", "vllm", "transformers", "accelerate"}


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; sys.argv = ['logitfuse', '--help']\n"
        "from logitfuse import main\n"
        "try:\n    main()\n"
        "finally:\n    print('LOADED', sorted(m for m in sys.modules if '.' not in m))"
    )
    best = float("inf")
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        best = min(best, time.monotonic() - start)
        assert done.returncode == 0, done.stderr
    for stage in ("corpus", "extract", "align", "train", "eval", "report", "store"):
        assert stage in done.stdout
    loaded = done.stdout.split("LOADED")[1]
    for heavy in ("torch", "vllm", "transformers", "numpy", "zarr", "pyarrow"):
        assert f"'{heavy}'" not in loaded, f"{heavy} is loaded for --help"
    # Twice the promised second: test machines are shared.
    assert best < 2.0


@pytest.mark.parametrize("room", ["extract", "align", "fuse_train", "fuse_eval"])
def test_stages_look_alike(room: str) -> None:
    names = {path.name for path in (REPOSITORY / room).glob("*.py")}
    assert {"config.py", "cli.py", "run.py", "__main__.py"} <= names
    assert not names & {"utils.py", "common.py", "helpers.py"}


def test_files_have_a_size_that_can_be_read() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for path in _files()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long
