"""Records on disk: flat JSON objects that carry a version and a digest of themselves.

One flipped byte in a manifest, commit or plan is found when it is read, and a record of a newer
logitfuse is refused before any of its fields is believed.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ValidationError

from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel, validation_line
from store_schema.errors import CorruptionError, SchemaVersionError
from store_schema.fingerprint import fingerprint

Record = TypeVar("Record", bound=StrictModel)


def seal(record: StrictModel) -> bytes:
    """The record as indented JSON with its digest added."""
    content = record.model_dump(mode="json")
    sealed = content | {"digest": fingerprint(content)}
    return json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def unseal(cls: type[Record], data: bytes, *, where: str) -> Record:
    """Parse what `seal` wrote.

    Args:
        cls: The record's model; it has a field `schema_version`.
        data: The file's bytes.
        where: The file, for messages.

    Raises:
        SchemaVersionError: Written by a newer version.
        CorruptionError: Not JSON, digest wrong, or fields that the model refuses.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptionError("not valid JSON", where=where, got=str(error)[:120]) from error
    if not isinstance(content, dict):
        raise CorruptionError("not a JSON object", where=where, got=type(content).__name__)
    version = content.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise SchemaVersionError(
            "written by a newer logitfuse",
            where=where,
            expected=f"schema version up to {SCHEMA_VERSION}",
            got=version,
            hint="upgrade logitfuse to read it",
        )
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise CorruptionError(
            "the record's digest does not match its content",
            where=where,
            expected=digest,
            got=_digest(content),
            hint="a byte was changed; restore the file or make it again",
        )
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        raise CorruptionError("record refused", where=where, got=validation_line(error)) from error


def _digest(content: dict[str, Any]) -> str | None:
    try:
        return fingerprint(content)
    except ValueError:  # NaN or a lone surrogate: nothing that seal could have written
        return None
