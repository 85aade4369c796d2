"""Presets: the recipes of published papers as parts of run files, one YAML file each.

`preset: NAME` in a run file makes the preset's values the defaults of that file, and nothing else. Each
value has a comment on its origin.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from store_schema.errors import ConfigError

_ENDING = ".yaml"


@cache
def preset_names() -> tuple[str, ...]:
    """All presets, in alphabetical order."""
    names = (file.name for file in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_ENDING) for name in names if name.endswith(_ENDING)))


def preset_text(name: object) -> str:
    """The YAML of a preset, with its comments.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in preset_names():
        raise ConfigError(
            "no such preset", where="preset", expected=" or ".join(preset_names()), got=name
        )
    return files(__name__).joinpath(f"{name}{_ENDING}").read_text(encoding="utf-8")


def preset_title(name: str) -> str:
    """A preset's title, its first line: the paper and which of its recipes."""
    return preset_text(name).partition("\n")[0].removeprefix("# ").rstrip(".")
