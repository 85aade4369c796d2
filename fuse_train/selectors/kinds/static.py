"""Selector static."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fuse_train.selectors.kind import RuleKind
from store_schema.errors import ConfigError

if TYPE_CHECKING:
    from fuse_train.selectors.selectors import Selector


class Static(RuleKind):
    """`static_weights`, renormalised over the sources that cover it."""

    section = dict[str, float] | None
    section_at = "static_weights"
    always_in_fingerprint = True
    needs_options = True

    def default_options(self) -> None:
        """None: there are no default weights."""

    def check(self, options: dict[str, float] | None) -> None:
        """Refuse no weights, negative ones, or only zeros; they need not sum to 1."""
        if not options:
            raise ValueError("selector static needs static_weights")
        if min(options.values()) < 0 or sum(options.values()) <= 0:
            raise ValueError("static_weights must be 0 or more, and not all 0")

    def make(self, options: dict[str, float] | None, sources: Sequence[str]) -> Selector:
        """See `RuleKind.make`."""
        from fuse_train.selectors.selectors import StaticSelector

        weights = options or {}
        unknown = sorted(set(weights) - set(sources))
        if unknown:
            raise ConfigError(
                "weights of unknown sources",
                where="train.static_weights",
                expected=", ".join(sources),
                got=", ".join(unknown),
            )
        return StaticSelector([weights.get(name, 0.0) for name in sources])
