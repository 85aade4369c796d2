"""Find, read and check the tokenizer files of a model folder."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store_schema.errors import ModelError
from store_schema.model.lfs_pointer import is_pointer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEKKEN_FILE = "tekken.json"

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py"}


def require_tokenizer_files(folder: Path, *, name: str) -> None:
    """Refuse a folder without any tokenizer file.

    Raises:
        ModelError: It has none; lists its files.
    """
    patterns = ("tokenizer*", "*.model", TEKKEN_FILE, "vocab.*")
    if not any(path for pattern in patterns for path in folder.glob(pattern)):
        raise ModelError(
            f"model of {name} has no tokenizer",
            where=folder,
            expected=TOKENIZER_FILE,
            got=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "empty folder",
            hint="save the tokenizer beside the weights",
        )


def files_signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size in bytes and modification time in ns of every file that may be part of a tokenizer."""
    files = [p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file()]
    stats = [(path.name, path.stat()) for path in sorted(files)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def read_backend(path: Path, *, name: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, without padding and truncation.

    Args:
        path: Path of tokenizer.json.
        name: Name of the model, for messages.

    Raises:
        ModelError: The file is a git-lfs pointer, damaged, or of a newer format.
    """
    from tokenizers import Tokenizer, __version__

    require_content(path, name=name)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        _read_json(path, name=name)
        raise ModelError(
            f"tokenizer of {name} cannot be read",
            where=path,
            got=" ".join(str(error).split())[:200],
            hint=f"it is damaged, or made for a newer version of tokenizers than {__version__}: "
            "fetch it again, or update tokenizers",
        ) from error
    backend.no_padding()
    backend.no_truncation()
    _add_configured(backend, path.parent, name=name)
    return backend


def require_content(path: Path, *, name: str) -> None:
    """Refuse a file whose content was never fetched.

    Raises:
        ModelError: It is empty, unreadable, or a pointer of git-lfs.
    """
    try:
        pointer, size = is_pointer(path), path.stat().st_size
    except OSError as error:
        raise ModelError(
            f"tokenizer of {name} cannot be read", where=path, got=str(error)[:200]
        ) from error
    if pointer:
        raise ModelError(
            f"tokenizer of {name} is not there: the file is a pointer of git-lfs",
            where=path,
            hint="run `git lfs pull` in the model's folder, or download it again",
        )
    if not size:
        raise ModelError(
            f"tokenizer of {name} is an empty file", where=path, hint="download it again"
        )


def _read_json(path: Path, *, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"tokenizer of {name} is damaged: not JSON",
            where=path,
            got=str(error)[:160],
            hint="download it again",
        ) from error


def tokenizer_config(folder: Path, *, name: str) -> dict[str, Any]:
    """Content of tokenizer_config.json; {} where there is none.

    Raises:
        ModelError: It is a git-lfs pointer, or not a JSON object.
    """
    path = folder / TOKENIZER_CONFIG
    if not path.exists():
        return {}
    require_content(path, name=name)
    content = _read_json(path, name=name)
    if not isinstance(content, dict):
        raise ModelError(
            f"tokenizer of {name} is damaged: not a JSON object",
            where=path,
            got=type(content).__name__,
        )
    return content


def _add_configured(backend: Tokenizer, folder: Path, *, name: str) -> None:
    """Add tokens that are only in tokenizer_config.json or added_tokens.json, if their ids follow those
    of tokenizer.json.

    Older libraries wrote added tokens only there, and models were trained with these ids.
    """
    from tokenizers import AddedToken

    beyond: dict[int, Any] = {}
    size = backend.get_vocab_size()
    for index, entry in _added_entries(folder, name=name).items():
        if str(index).isdecimal() and int(index) >= size:
            beyond[int(index)] = entry
    for index, entry in sorted(beyond.items()):
        fields = dict(entry) if isinstance(entry, dict) else {"content": entry}
        fields.pop("__type", None)
        try:
            token = AddedToken(**fields)
        except TypeError:
            return  # `read_class` reports it
        if index != backend.get_vocab_size() or backend.token_to_id(token.content) is not None:
            return
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])


def _added_entries(folder: Path, *, name: str) -> dict[Any, Any]:
    entries = tokenizer_config(folder, name=name).get("added_tokens_decoder")
    if isinstance(entries, dict):
        return entries
    path = folder / "added_tokens.json"
    if not path.exists():
        return {}
    require_content(path, name=name)
    by_token = _read_json(path, name=name)
    return {i: token for token, i in by_token.items()} if isinstance(by_token, dict) else {}


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python's collector off the hundred thousands of objects of a vocabulary, none of which is
    garbage: it would go through them again and again, for half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
