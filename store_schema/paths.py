"""Paths of the run file: `~` and `$VARIABLE` are expanded as in a shell."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer

_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)\}|([A-Za-z_]\w*))")


def expand_path(text: str) -> str:
    """A path with `~`, `$NAME` and `${NAME}` replaced; `$$` is a dollar. URLs stay as they are.

    Raises:
        ValueError: A variable is not set, or there is no such home folder.
    """
    if "://" in text:
        return text
    head, slash, rest = text.partition("/")
    if head.startswith("~"):
        home = os.path.expanduser(head)
        if home.startswith("~"):
            raise ValueError(f"no home folder is known for {head}; write it out, or as ./{head}")
    else:
        home, slash, rest = "", "", text

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is None:
            return "$"
        if not os.environ.get(name):
            raise ValueError(
                f"the environment variable {name} is not set; set it, or write $$ for a dollar"
            )
        return os.environ[name]

    return home + slash + _VARIABLE.sub(value, rest)


def written_path(text: str) -> str:
    """Escape a path for a run file, so that `expand_path` returns it unchanged."""
    if "://" in text:
        return text
    return ("./" if text.startswith("~") else "") + text.replace("$", "$$")


PathText = Annotated[
    str, AfterValidator(expand_path), PlainSerializer(written_path, when_used="json")
]
"""Type of run file fields with a path or URL."""
