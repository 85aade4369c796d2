"""Selector uniform."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuse_train.selectors.kind import RuleKind

if TYPE_CHECKING:
    import torch

    from fuse_train.selectors.selectors import SourceView


class Uniform(RuleKind):
    """Equal, over the sources that cover the position."""

    tried_without = True

    def weights(self, view: SourceView, options: None) -> torch.Tensor:
        """The same weight for every covered source."""
        from fuse_train.selectors.selectors import normalised

        return normalised(view.covered_BTM.float())
