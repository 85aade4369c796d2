"""The demo's three domains of text, taken from nothing but the Python that runs.

* ``code``: standard library sources without their docstrings,
* ``prose``: the docstrings themselves, the language reference of ``pydoc_data`` and other English
  that ships with CPython,
* ``facts``: see `first_run.demo.facts`.

Guarantees: a document belongs to exactly one split; a held-out document (``valid``, ``test``) is
neither a copy nor a near copy of another document of its domain; the same Python version and seed
give the same bytes, since every choice is a SHA-256 of a name and never the salted ``hash``.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("models", "train", "valid", "test")
"""``models`` trains tokenizers and models, ``train`` is the fusion corpus, the rest is held out."""

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "__pycache__"}
)
"""Character tables and test data: large, and little like the code people write."""

SKIPPED_FILES = frozenset({"topics.py", "keysyms.py", "entities.py", "stringprep.py"})
"""Data in the shape of code."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its place in the corpus."""

    id: str
    text: str
    domain: str
    split: str = "models"


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """UTF-8 bytes that each small split of a domain gets; ``models`` gets all the rest."""

    train: int
    valid: int
    test: int


def rank(seed: int, name: str) -> str:
    """Sort key that looks random and is the same in every process and on every machine."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def size_bytes(text: str) -> int:
    """Length in UTF-8 bytes."""
    return len(text.encode())


def _library_sources() -> Iterator[tuple[str, str]]:
    """Name and source of each standard library module, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts) or path.name in SKIPPED_FILES:
            continue
        try:
            yield "/".join(parts), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # lib2to3 ships deliberately broken files


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Expr]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, owners) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first


def split_docstrings(source: str) -> tuple[str, list[str]]:
    """Separate a module into its code and its docstrings.

    Whole lines are removed, not re-printed from the syntax tree, so that comments, spacing and
    the habits of the authors stay in the code. A docstring that shares its line with other code is
    left where it is.

    Returns:
        The code, and the docstrings (dedented) in order of appearance.

    Raises:
        SyntaxError: the source is not valid for this Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    removed: set[int] = set()
    found: list[tuple[int, str]] = []
    for node in _docstring_nodes(tree):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        whole = (
            not lines[first][: node.col_offset].strip()
            and not lines[last].encode()[node.end_col_offset :].strip()
        )
        if whole:
            removed.update(range(first, last + 1))
            assert isinstance(node.value, ast.Constant)
            found.append((first, inspect.cleandoc(str(node.value.value))))
    code = "".join(line for number, line in enumerate(lines) if number not in removed)
    return code, [text for _, text in sorted(found)]


def _code_and_docstrings() -> tuple[list[Document], list[Document]]:
    code, prose = [], []
    for name, source in _library_sources():
        try:
            body, docstrings = split_docstrings(source)
        except SyntaxError:
            continue
        if size_bytes(body) >= 400:
            code.append(Document(f"code/{name}", body.strip("\n") + "\n", "code"))
        sentences = [text for text in docstrings if len(text) >= 40]
        if sum(map(len, sentences)) >= 300:
            prose.append(Document(f"prose/{name}", "\n\n".join(sentences) + "\n", "prose"))
    return code, prose


def _reference_and_notes() -> list[Document]:
    """Chapters of the language reference, and the text files of CPython."""
    from pydoc_data.topics import topics

    documents = [
        Document(f"prose/topic/{name}", inspect.cleandoc(text) + "\n", "prose")
        for name, text in sorted(topics.items())
    ]
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (
        "LICENSE.txt",
        *(f"idlelib/{n}.txt" for n in ("NEWS", "NEWS2x", "HISTORY", "README", "TODO")),
    )
    for name in names:
        if (root / name).is_file():
            text = (root / name).read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
            documents.append(Document(f"prose/file/{name}", text, "prose"))
    return documents


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 24}


def drop_copies(documents: Iterable[Document]) -> list[Document]:
    """Keep the first of all documents whose words are the same."""
    kept: dict[str, Document] = {}
    for document in documents:
        kept.setdefault(
            hashlib.sha256(" ".join(document.text.split()).encode()).hexdigest(), document
        )
    return list(kept.values())


def assign_splits(documents: list[Document], sizes: SplitSizes, seed: int) -> list[Document]:
    """Split by file: held-out documents are of ordinary size and share little with the others.

    A document may leave ``models`` only when it has 500 to 16,000 bytes (one huge file would be
    the whole split) and fewer than a fifth of its long lines stand in any other document.
    """
    uses = Counter(line for document in documents for line in _long_lines(document.text))
    wanted = {"test": sizes.test, "valid": sizes.valid, "train": sizes.train}
    placed = []
    for document in sorted(documents, key=lambda d: rank(seed, d.id)):
        lines = _long_lines(document.text)
        shared = sum(uses[line] > 1 for line in lines)
        open_splits = [name for name, left in wanted.items() if left > 0]
        split = "models"
        if open_splits and 500 <= size_bytes(document.text) <= 16_000 and shared * 5 < len(lines):
            split = open_splits[0]
            wanted[split] -= size_bytes(document.text)
        placed.append(Document(document.id, document.text, document.domain, split))
    return placed


def library_documents(domain: str, sizes: SplitSizes, seed: int) -> list[Document]:
    """All documents of the domain ``code`` or ``prose``, each with its split."""
    code, docstrings = _code_and_docstrings()
    chosen = code if domain == "code" else docstrings + _reference_and_notes()
    return assign_splits(drop_copies(chosen), sizes, seed)


def write_jsonl(documents: Iterable[Document], path: Path) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for d in documents:
            record = {"id": d.id, "text": d.text, "domain": d.domain, "split": d.split}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Document]:
    """Read what `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]
