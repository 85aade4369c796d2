"""Selectors by the names of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuse_train.selectors import SELECTORS
from fuse_train.selectors.kind import LearnedKind
from fuse_train.selectors.selectors import Selector
from store_schema.errors import ConfigError


def by_rule(name: str, sources: Sequence[str] = (), **options: Any) -> Selector:
    """A selector that needs no training.

    Args:
        name: Name in the registry.
        sources: Names of the sources, for selectors that need them.
        options: Its options; the rest have defaults.
    """
    kind = SELECTORS[name]
    return kind.make(None if kind.section is None else kind.section(**options), sources)


def learner(name: str) -> LearnedKind:
    """The registry's entry of that name, which must be a selector that learns.

    Raises:
        ConfigError: It does not learn.
    """
    kind = SELECTORS[name]
    if isinstance(kind, LearnedKind):
        return kind
    raise ConfigError(
        "this selector does not learn",
        where="train.selector",
        expected=" or ".join(kind.name for kind in SELECTORS if kind.learns),
        got=name,
    )
