"""The cache folder of logitfuse, and facts kept there that take seconds to find.

transformers knows what a model's files mean, but importing it and torch takes longer than all other
work of a stage that has nothing to do. So what it says is kept, in one small file for each content:

    <cache>/facts/<what>-<digest of the content>.json

The cache is $LOGITFUSE_CACHE, else $XDG_CACHE_HOME/logitfuse, else ~/.cache/logitfuse. It may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import platform
import uuid
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.cache_folder import cache_folder
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import StoreError
from store_schema.fingerprint import fingerprint, sources_digest

Fact = TypeVar("Fact")

_LIBRARIES = ("transformers", "tokenizers", "torch")


class KeptFact(StrictModel):
    """facts/<what>-<digest>.json"""

    schema_version: int = SCHEMA_VERSION
    found_by: str
    """Fingerprint of the code and the libraries that found it; others find it again."""
    fact: Any


def kept_fact(what: str, content: Any, find: Callable[[], Fact]) -> Fact:
    """What `find` returns, or returned before for the same content, in this version of the code and
    its libraries.

    Args:
        what: Kind of the fact.
        content: Everything that it depends on, as a JSON-like value: digests of files, options.
        find: Returns the fact, a JSON-like value. If it raises, nothing is kept.
    """
    path = cache_folder() / "facts" / f"{what}-{fingerprint(content)}.json"
    with contextlib.suppress(OSError, StoreError):  # not there, or damaged
        kept = unseal(KeptFact, path.read_bytes(), where=str(path))
        if kept.found_by == _this_code():
            known: Fact = kept.fact
            return known
    fact = find()
    with contextlib.suppress(OSError):  # a cache that cannot be written is no error
        _write(path, seal(KeptFact(found_by=_this_code(), fact=fact)))
    return fact


@cache
def _this_code() -> str:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    return fingerprint([versions, sources_digest(Path(__file__).parent.parent)])


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
