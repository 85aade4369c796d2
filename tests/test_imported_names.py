"""Every name that a file of this repository takes from another one is there.

mypy checks the product; benchmarks, examples and tests are only imported when they run, and a name that
was moved or renamed would be missed until then.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("store_schema", "launch", "extract", "align", "fuse_train", "fuse_eval", "store_tools")
SCRIPTS = ("benchmarks", "examples", "tests")
ON_PATH = (REPOSITORY, REPOSITORY / "examples", REPOSITORY / "benchmarks")
"""Folders that a script's imports are looked for in."""


def _file(module: str) -> Path | None:
    """File of a module of ours, or None."""
    for top in ON_PATH:
        path = top.joinpath(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def _names(path: Path) -> frozenset[str] | None:
    """What a file defines or imports outside functions and classes; None if it answers by itself."""
    found: set[str] = set()
    todo: list[ast.AST] = [_tree(path)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update((a.asname or a.name).split(".")[0] for a in node.names)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            todo.extend(ast.iter_child_nodes(node))
    return None if "__getattr__" in found else frozenset(found)


def _absent(module: str, name: str) -> bool:
    """Whether one of our modules lacks a name and has no module of that name either."""
    path = _file(module)
    if path is None:
        return _is_ours(module) and not (REPOSITORY / module.replace(".", "/")).is_dir()
    names = _names(path)
    return names is not None and name not in names and _file(f"{module}.{name}") is None


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES + SCRIPTS


def _taken(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) of every `from module import name` and every `module.name`."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.module, alias.name, node.lineno
                if _file(whole := f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = whole
        elif isinstance(node, ast.Import):
            modules |= {a.asname: a.name for a in node.names if a.asname and _file(a.name)}
    rebound = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    rebound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in modules and name not in rebound and isinstance(node.ctx, ast.Load):
                yield modules[name], node.attr, node.lineno


@pytest.mark.parametrize("folder", [*PACKAGES, *SCRIPTS])
def test_imported_names_are_there(folder: str) -> None:
    absent = [
        f"{path.relative_to(REPOSITORY)}:{line}: {module} has no {name}"
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for module, name, line in _taken(_tree(path))
        if name != "*" and _absent(module, name)
    ]
    assert not absent


def test_a_name_that_is_not_there_is_seen() -> None:
    tree = ast.parse(
        "from store_schema.errors import Nothing\nimport store_schema.errors as e\ne.None_"
    )
    seen = [(module, name) for module, name, _ in _taken(tree) if _absent(module, name)]
    assert seen == [("store_schema.errors", "Nothing"), ("store_schema.errors", "None_")]
