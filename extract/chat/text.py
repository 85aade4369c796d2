"""Check that text can be stored and tokenised by every stage."""

from __future__ import annotations

from typing import Any

from extract.document_error import DocumentError


def clean_text(value: Any, where: str) -> str:
    """The value, checked to be usable text.

    Raises:
        DocumentError: It is not text, is empty, or has NUL or a lone surrogate; gives its index.
    """
    if not isinstance(value, str):
        raise DocumentError(
            "not text", reason="not_text", where=where, expected="text", got=type(value).__name__
        )
    if not value:
        raise DocumentError("empty text", reason="empty_text", where=where)
    nul = value.find("\0")
    if nul >= 0:
        raise DocumentError(
            f"NUL at character {nul}",
            reason="nul",
            where=where,
            got=repr(value[max(nul - 8, 0) : nul + 8]),
            hint="clean the text, or drop such documents with `on_bad: drop`",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"lone surrogate at character {error.start}",
            reason="surrogate",
            where=where,
            got=ascii(value[max(error.start - 8, 0) : error.end + 8]),
            hint="clean the text, or drop such documents with `on_bad: drop`",
        ) from error
    return value


MOST_LEVELS = 100
"""Deepest nesting of objects and lists: templates and JSON writers recurse."""


def clean_values(value: Any, where: str, levels: int = MOST_LEVELS) -> Any:
    """A JSON value with every text checked and nulls removed from objects.

    Parquet and `datasets` fill fields that other rows have with null.

    Raises:
        DocumentError: See `clean_text`; or a value that JSON does not have, or nesting above `levels`.
    """
    if levels < 0:
        raise DocumentError(
            "nested too deep", reason="nested", where=where, expected=f"{MOST_LEVELS} levels"
        )
    if isinstance(value, list) and value and all(_is_pair(part) for part in value):
        value = dict(value)
    if isinstance(value, dict):
        return {
            clean_text(str(key), where): clean_values(part, where, levels - 1)
            for key, part in value.items()
            if part is not None
        }
    if isinstance(value, list):
        return [clean_values(part, where, levels - 1) for part in value]
    if isinstance(value, str):
        return clean_text(value, where) if value else value
    if value is None or isinstance(value, bool | int | float):
        return value
    raise DocumentError(
        "a value that JSON does not have",
        reason="not_json",
        where=where,
        expected="text, a number, true, false, a list or an object",
        got=type(value).__name__,
    )


def _is_pair(part: Any) -> bool:
    """Whether it is an entry of an Arrow map, which is a list of tuples."""
    return isinstance(part, tuple) and len(part) == 2
