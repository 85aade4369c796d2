"""Selectors by the names of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuse_train.selectors import SELECTORS
from fuse_train.selectors.kind import LearnedKind, RuleKind
from fuse_train.selectors.selectors import Selector
from store_schema.errors import ConfigError


def by_rule(name: str, sources: Sequence[str] = (), **options: Any) -> Selector:
    """A selector that needs no training.

    Args:
        name: Of the registry.
        sources: Names, for those that are bound to them.
        options: Its own; defaults for the rest.
    """
    kind = SELECTORS[name]
    if not isinstance(kind, RuleKind):
        raise TypeError(f"selector {name} has to be trained or searched for")
    return kind.make(None if kind.section is None else kind.section(**options), sources)


def learner(name: str) -> LearnedKind:
    """The selector of that name, which is one that learns.

    Raises:
        ConfigError: It is not.
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
