"""Selector constant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuse_train.selectors.kind import LearnedKind
from fuse_train.selectors.kinds.asn import AsnSection

if TYPE_CHECKING:
    from fuse_train.selectors.selectors import Selector


class Constant(LearnedKind):
    """One learned score per source, whatever the text."""

    section = AsnSection
    section_at = "asn"
    made_of = ("hedge",)

    def network(self, options: AsnSection, num_sources: int) -> Selector:
        """See `LearnedKind.network`."""
        from fuse_train.selectors.gates import ConstantGate

        return ConstantGate(options, num_sources)
