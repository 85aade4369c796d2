"""Records on disk (manifest, commit, plan): JSON objects with a schema version and their own digest.

A single changed byte is detected when a record is read, and a record of another schema version is
refused before any of its fields is used. A record may be hostile: its size and depth are limited, and
messages show only short, printable parts of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.errors import CorruptionError, SchemaVersionError
from store_schema.fingerprint import fingerprint
from store_schema.validation import validation_line

Record = TypeVar("Record", bound=StrictModel)

MAX_RECORD_BYTES = 64 << 20
"""Longest record that is read: parsed JSON may take twenty times the memory of its text."""
MAX_DEPTH = 64
"""Deepest nesting of lists and objects that is read; our records have less than ten levels."""
RESTORE = "a byte was changed; restore the file or make it again"
EARLIER = (
    "delete the folder that it belongs to, or give the run another name, and run its stage again"
)


def seal(record: StrictModel) -> bytes:
    """The record as indented JSON with its digest added."""
    content = record.model_dump(mode="json")
    sealed = content | {"digest": fingerprint(content)}
    return json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def unseal(cls: type[Record], data: bytes, *, where: str, hint: str = RESTORE) -> Record:
    """Parse what `seal` wrote.

    Args:
        cls: The record's model; it has a field `schema_version`.
        data: The file's bytes.
        where: The file, for messages.
        hint: What to do when the record is damaged, for messages.

    Raises:
        SchemaVersionError: Written by a newer or an earlier version.
        CorruptionError: Not JSON, a wrong digest, or fields that the model refuses.
    """
    damaged = partial(CorruptionError, where=where, hint=hint)
    content = _parsed(data, damaged)
    require_schema(content.get("schema_version"), where=where, hint=hint)
    digest = content.pop("digest", None)
    computed = _digest(content)
    if computed is None or digest != computed:
        what = "the record's digest does not match its content"
        raise damaged(what, expected=_shown(digest), got=computed)
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        raise damaged("record refused", got=_shown(validation_line(error), 300)) from error


def require_schema(version: object, *, where: str, hint: str = RESTORE) -> None:
    """Refuse a record by its field `schema_version`; the other arguments are those of `unseal`.

    Raises:
        SchemaVersionError: Written by a newer or an earlier version.
        CorruptionError: Not a version.
    """
    if type(version) is not int or version < 1:
        what, expected = "no schema version", "a whole number from 1"
        raise CorruptionError(what, where=where, expected=expected, got=_shown(version), hint=hint)
    if version != SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        raise SchemaVersionError(
            f"written by {'a newer' if newer else 'an earlier'} logitfuse",
            where=where,
            expected=f"schema version {SCHEMA_VERSION}",
            got=_shown(version),
            hint="upgrade logitfuse to read it" if newer else EARLIER,
        )


def _parsed(data: bytes, damaged: Callable[..., CorruptionError]) -> dict[str, Any]:
    if len(data) > MAX_RECORD_BYTES:
        expected = f"at most {MAX_RECORD_BYTES} bytes"
        raise damaged("record is too long", expected=expected, got=len(data))
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged("not valid JSON", got=_shown(error)) from error
    if not isinstance(content, dict):
        raise damaged("not a JSON object", got=type(content).__name__)
    if _deeper_than(content, MAX_DEPTH):
        raise damaged("nested too deep", expected=f"at most {MAX_DEPTH} levels")
    return content


def _deeper_than(content: Any, limit: int) -> bool:
    level = [content]
    for _ in range(limit):
        parts = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for part in parts for v in part if isinstance(v, (dict, list))]
        if not level:
            return False
    return True


def _digest(content: dict[str, Any]) -> str | None:
    try:
        return fingerprint(content)
    except ValueError:  # NaN or a lone surrogate, which `seal` never writes
        return None


def _shown(value: object, limit: int = 120) -> str:
    """The value as short text without control characters."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."
