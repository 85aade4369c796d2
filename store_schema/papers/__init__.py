"""Presets: the recipes of published papers as pieces of run files, one YAML file each.

A preset is no code path: `preset: NAME` puts the file's values under those of the run file, which
win. Each value has a comment that says where it comes from.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from store_schema.errors import ConfigError

_ENDING = ".yaml"


@cache
def preset_names() -> tuple[str, ...]:
    """All presets, in alphabetical order."""
    found = (file.name for file in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_ENDING) for name in found if name.endswith(_ENDING)))


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
    """Its first line: the paper and what of it this is."""
    return preset_text(name).partition("\n")[0].removeprefix("# ").rstrip(".")
