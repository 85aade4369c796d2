"""A rule for weights as a module."""

from __future__ import annotations

from typing import Any

import torch

from fuse_train.selectors.kind import RuleKind
from fuse_train.selectors.selectors import Selector, SourceView


class RuleSelector(Selector):
    """What a `RuleKind` says, as a module without parameters.

    Args:
        kind: Gives the weights.
        options: Of the kind.
    """

    def __init__(self, kind: RuleKind, options: Any = None) -> None:
        super().__init__()
        self.kind, self.options = kind, options

    @property
    def hindsight(self) -> bool:
        return self.kind.hindsight

    def forward(self, view: SourceView) -> torch.Tensor:
        return self.kind.weights(view, self.options)
