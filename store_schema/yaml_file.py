"""Files of YAML that people write: read strictly, and changed by dotted keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from store_schema.errors import ConfigError


class OnceLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key that is written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node.value, str) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file with keys and values; a key that is written twice is refused.

    Args:
        path: The file.
        what: What it is called in messages.

    Raises:
        ConfigError: It is missing, is not YAML, or is no mapping.
    """
    try:
        raw = OnceLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError as error:
        raise ConfigError(f"{what} not found", where=path) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} cannot be read", where=path, got=str(error)) from error
    if not isinstance(raw, dict):
        kinds = {"NoneType": "nothing", "list": "a list", "str": "text"}
        got = kinds.get(type(raw).__name__, "a single value")
        raise ConfigError(f"{what} is not a mapping of keys to values", where=path, got=got)
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one "key.path=value" of the command line; the value is YAML.

    Raises:
        ConfigError: It is no such pair, or goes through a value that is no mapping.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            "override refused", where="--set", expected="key.path=value", got=override
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("override is not YAML", where="--set", got=override) from error
    set_value(raw, key, value, where="--set")


def set_value(raw: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Set the value at a dotted key of a file's content, making the mappings on the way.

    Raises:
        ConfigError: The key goes through a value that is no mapping.
    """
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError("override goes through a value", where=where, got=f"{key}={value}")
        node = child
    node[last] = value
