"""Refusals of parsed records for people, each on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ValidationError

_IN_WORDS = {
    "tuple_type": "a list is expected",
    "list_type": "a list is expected",
    "dict_type": "keys with values are expected",
    "model_type": "keys with values are expected",
    "model_attributes_type": "keys with values are expected",
    "string_type": "text is expected",
    "bool_type": "true or false is expected",
    "missing": "it is missing",
}
"""In place of pydantic's words, where these are Python's or not a sentence, by its type of error."""


def validation_line(
    error: ValidationError,
    model: type[BaseModel] | None = None,
    *,
    within: str = "",
    more: Iterable[str] = (),
) -> str:
    """All of pydantic's complaints on one line: `key.path: message (got value), did you mean ...?`.

    Args:
        error: From `model`.
        model: Whose keys may have been meant by unknown ones.
        within: Comes before each key.
        more: Further keys at the top.
    """
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        key = (within + ".".join(str(part) for part in item["loc"])).rstrip(".")
        value = repr(item["input"])
        shown = value if len(value) <= 60 else value[:57] + "..."
        message = _IN_WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
        if item["type"] == "extra_forbidden":
            message = "unknown key"
            names = _keys_beside(model, item["loc"])
            if len(item["loc"]) == 1:
                names += more
            meant = get_close_matches(str(item["loc"][-1]), names, n=1)
        else:
            meant = get_close_matches(str(item["input"]), re.findall(r"'([^']*)'", message), n=1)
        suggestion = f", did you mean {meant[0]}?" if meant else ""
        told = item["type"] == "missing" or "(got " in message  # a record within it was refused
        got = "" if told else f" (got {shown})"
        lines.append(f"{key or '(top)'}: {message}{got}{suggestion}")
    return "; ".join(lines)


def _keys_beside(model: type[BaseModel] | None, location: tuple[int | str, ...]) -> list[str]:
    """Keys of the model that the last part of a location belongs to; none where it is not found."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if model is not None else None
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        model = inner[0] if inner else None
    return [] if model is None else list(model.model_fields)
