"""A rule selector as a torch module."""

from __future__ import annotations

from typing import Any

import torch

from fuse_train.selectors.kind import RuleKind
from fuse_train.selectors.selectors import Selector, SourceView


class RuleSelector(Selector):
    """The weights of a `RuleKind`, as a module without parameters.

    Args:
        kind: Computes the weights.
        options: Its options.
    """

    def __init__(self, kind: RuleKind, options: Any = None) -> None:
        super().__init__()
        self.kind, self.options = kind, options

    @property
    def hindsight(self) -> bool:
        return self.kind.hindsight

    def forward(self, view: SourceView) -> torch.Tensor:
        return self.kind.weights(view, self.options)
