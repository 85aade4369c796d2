"""The packages and their sub-packages: who may import whom, and what never loads where."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "store_schema": set(),
    "launch": {"store_schema"},
    "extract": {"store_schema", "launch"},
    "align": {"store_schema", "launch"},
    "fuse_train": {"store_schema", "launch"},
    "fuse_eval": {"store_schema", "launch", "extract", "fuse_train"},
    "store_tools": {"store_schema", "launch"},
    "first_run": {"store_schema", "launch", "extract", "align", "fuse_train"},
}

ORDER = {
    "store_schema": (
        *(
            "errors",
            "dtypes",
            "papers",
            "fingerprint",
            "paths",
            "validation",
            "yaml_file",
            "compiled",
            "config",
            "registry",
            "presets",
            "layout",
        ),
        *("disk", "capture", "plan", "manifest", "model", "text", "encoding", "store"),
    ),
    "extract": (
        *(
            "engine_kinds",
            "judge_kinds",
            "branch_config",
            "chat_config",
            "config",
            "document_error",
            "chat",
            "corpus",
        ),
        *("head", "engines", "plan", "branching", "scoring", "generation", "report", "estimate"),
        *("judging",),
        *("captures", "tune", "run", "cli", "__main__"),
    ),
    "align": (
        *("methods", "config", "counts", "chain", "papers", "prepare", "report"),
        *("run", "cli", "__main__"),
    ),
    "fuse_train": (
        *(
            "disk",
            "merge",
            "selectors",
            "divergences",
            "loss_config",
            "gate_config",
            "stages_config",
            "pairwise_config",
            "config",
            "machine",
            "sharding",
            "model",
        ),
        *("losses", "data", "gate", "loop", "selector_fit", "publish", "inputs", "pairs", "recipe"),
        *("training", "run", "selector_run", "explain", "cli", "__main__"),
    ),
}
"""Files and folders at the root of a package: each may import, when loaded, what stands before it."""

MOST_FILES, MOST_FILES_FLAT, MOST_LINES = 15, 20, 400

ONLY_IN = {
    "vllm": {"extract/engines/vllm_engine.py"},
    "accelerate": {"fuse_train", "fuse_eval"},
    "numba": {"store_schema/compiled.py"},
    "llvmlite": {"extract/head/bf16_dot.py"},
    "lm_eval": {"fuse_eval/harness/package.py"},
    "jinja2": {"launch/pages/page.py"},
    "ray": {"launch/ray/cluster.py", "launch/ray/workers.py"},
}
"""Libraries that only these packages or files may import."""

WITHOUT_TORCH = ("store_schema", "launch", "align", "store_tools")


def _files() -> list[Path]:
    return sorted(path for package in MAY_IMPORT for path in (REPOSITORY / package).rglob("*.py"))


def _module(path: Path) -> str:
    """Dotted name of a file, from the top."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _at_load(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports outside functions; those for types alone count, since they are read all the same."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _at_load(node)


def _graph(top: Path, packages: Iterable[str]) -> dict[str, set[str]]:
    """Each module of some packages, and those of them that it imports when it is loaded."""
    paths = {
        _module(path.relative_to(top)): path
        for package in packages
        for path in sorted((top / package).rglob("*.py"))
    }
    graph: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in _at_load(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            else:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found = {full if full in paths else str(node.module) for full in inside}
            graph[name] |= found & set(paths)
    return graph


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, the first again at the end; [] where there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _against_order(graph: dict[str, set[str]], package: str, order: tuple[str, ...]) -> list[str]:
    """Imports within a package of what stands after the importer, or of what the table lacks."""
    place = {name: i for i, name in enumerate(order)}
    wrong = []
    for name, imported in graph.items():
        here = name.split(".")
        if here[0] != package or len(here) == 1:
            continue
        if here[1] not in place:
            wrong.append(f"{name} is not in the table")
            continue
        for other in sorted(imported):
            there = other.split(".")
            ours = there[0] == package and len(there) > 1
            if ours and place.get(there[1], -1) > place[here[1]]:
                wrong.append(f"{name} imports {other}")
    return wrong


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
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {
        "tests",
        "benchmarks",
    }
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down_the_packages(package: str) -> None:
    wrong = []
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        for name, line in _imports(path):
            ours = name in MAY_IMPORT or name in ("logitfuse", "tests", "benchmarks", "examples")
            if ours and name != package and name not in MAY_IMPORT[package]:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {name}")
    assert not wrong


def test_no_modules_import_one_another() -> None:
    assert not _circle(_graph(REPOSITORY, MAY_IMPORT))


@pytest.mark.parametrize("package", ORDER)
def test_sub_packages_import_what_stands_before_them(package: str) -> None:
    top = REPOSITORY / package
    there = {path.stem for path in top.glob("*.py")} | {
        path.parent.name for path in top.glob("*/__init__.py")
    }
    assert there - {"__init__"} == set(ORDER[package])
    assert not _against_order(_graph(REPOSITORY, [package]), package, ORDER[package])


def test_wrong_imports_are_found(tmp_path: Path) -> None:
    def graph(**files: str) -> dict[str, set[str]]:
        for name, text in files.items():
            path = tmp_path / "package" / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return _graph(tmp_path, ["package"])

    order = ("low", "high")
    fine = graph(
        low__a="import os\ndef f():\n    from package.high import b\n",
        low__c="",
        high__b="from package.low import a\nfrom package.low.c import x\n",
    )
    assert fine["package.high.b"] == {"package.low.a", "package.low.c"}
    assert not _circle(fine)
    assert not _against_order(fine, "package", order)
    upwards = graph(low__c="if TYPE_CHECKING:\n    from package.high.b import x\n")
    assert _against_order(upwards, "package", order) == ["package.low.c imports package.high.b"]
    assert set(_circle(upwards)) == {"package.low.c", "package.high.b"}
    inside = graph(low__c="import package.low.a\n", low__a="class A:\n    import package.low.c\n")
    assert set(_circle(inside)) == {"package.low.a", "package.low.c"}
    assert not _against_order(inside, "package", order)
    unknown = graph(other__d="", low__a="", low__c="")
    assert _against_order(unknown, "package", order) == ["package.other.d is not in the table"]


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
    assert not wrong


def test_parquet_is_read_without_threads_of_arrow() -> None:
    """Such a thread may end a process that shuts down: see store_schema/disk/parquet.py."""
    own_reader = Path("store_schema/disk/parquet.py")
    wrong = []
    for path in _files():
        here = path.relative_to(REPOSITORY)
        text = path.read_text()
        if here != own_reader:
            wrong += [f"{here}: {m}" for m in re.findall(r"pq\.(?:read_table|ParquetFile)\b", text)]
            wrong += [f"{here}: {m}" for m in re.findall(r"pyarrow\.dataset", text)]
        for call in re.findall(r"\.group_by\([^)]*\)", text):
            if "use_threads=False" not in call:
                wrong.append(f"{here}: {call}")
    assert not wrong


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_packages_without_torch_load_none(package: str) -> None:
    modules = [
        _module(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if path.stem != "__main__"
    ]
    loaded = _loaded_by("import " + ", ".join(modules))
    assert not loaded & {"torch", "vllm", "accelerate"}


def test_a_run_file_is_read_without_torch() -> None:
    loaded = _loaded_by("from store_schema.config import section_models; section_models()")
    assert "extract" in loaded
    assert not loaded & {"torch", "vllm", "transformers", "accelerate"}


@pytest.mark.parametrize("stage", ["extract.run", "align.run", "fuse_train.run", "fuse_eval.run"])
def test_a_stage_begins_without_torch(stage: str) -> None:
    """It loads torch when there is something to do."""
    assert not _loaded_by(f"import {stage}") & {"torch", "vllm", "transformers", "accelerate"}


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


@pytest.mark.parametrize("package", ["extract", "align", "fuse_train", "fuse_eval"])
def test_stages_look_alike(package: str) -> None:
    names = {path.name for path in (REPOSITORY / package).glob("*.py")}
    assert {"config.py", "cli.py", "run.py", "__main__.py"} <= names


def test_names_say_what_files_own() -> None:
    names = {name for path in _files() for name in (path.stem, path.parent.name)}
    assert not names & {"utils", "common", "helpers"}


def test_folders_and_files_have_a_size_that_can_be_read() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for path in _files()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long
    sizes = Counter(path.parent.relative_to(REPOSITORY) for path in _files())
    full = {
        str(folder): size
        for folder, size in sizes.items()
        if size > (MOST_FILES if folder.parts[0] in ORDER else MOST_FILES_FLAT)
    }
    assert not full


def test_every_path_of_the_architecture_page_exists() -> None:
    page = (REPOSITORY / "docs/architecture.md").read_text().partition("## What is on disk")[0]
    path = re.compile(r"`([a-z_]+(?:/[a-z_.]+)+/?|[a-z_]+/)`")
    found = []
    for line in page.splitlines():
        first, *others = path.findall(line) or [""]
        # In the table of packages, sub-packages are named behind their package.
        inside = first if line.startswith("| `") else ""
        found += [first, *(name if "/" in name[:-1] else inside + name for name in others)]
    assert len(set(found)) > 80
    assert [name for name in sorted(set(found)) if not (REPOSITORY / name).exists()] == []
