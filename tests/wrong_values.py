"""Sections that cannot be: refused for the value that is wrong, not for something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError


def refuses(model: type[BaseModel], wrong: Mapping[str, Any]) -> None:
    """A section refuses what is given, and every error names a key of it, not the section alone."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(wrong)
    keys = {key for name, value in wrong.items() for key in set(_keys(value)) or {name}}
    for error in caught.value.errors():
        named = {str(part) for part in error["loc"]}
        assert keys & named or any(key in error["msg"] for key in keys), (error, keys)


def _keys(value: object) -> Iterator[str]:
    """Of all mappings in a value."""
    if isinstance(value, Mapping):
        yield from value
    for inner in value.values() if isinstance(value, Mapping) else ():
        yield from _keys(inner)
    for inner in value if isinstance(value, list) else ():
        yield from _keys(inner)
