"""Selector hedge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fuse_train.selectors.kind import RuleKind
from store_schema.config import StrictModel

if TYPE_CHECKING:
    import torch

    from fuse_train.selectors.selectors import SourceView


class HedgeSection(StrictModel):
    """Selector hedge: exponential weights on the log-loss of earlier tokens of the segment."""

    rate: float = Field(default=0.5, gt=0)
    """eta; 1 is the Bayes mixture of the sources, less is better where none of them is the true one."""
    share: float = Field(default=0.03, ge=0, lt=1)
    """Fixed share: probability that the best source changes before a token; 0 for one per segment."""


class Hedge(RuleKind):
    """Exponential weights on the NLL of the segment's earlier tokens (`hedge.rate`; 1 is the Bayes
    mixture, 0.5 the default), with fixed share for text that switches (`hedge.share`, 0.03; Herbster
    and Warmuth).

    Weights are those of the span's first row (pools.py): inside a token its NLL is not complete.
    """

    section = HedgeSection
    always_in_fingerprint = True

    def weights(self, view: SourceView, options: HedgeSection) -> torch.Tensor:
        """See fuse_train/selectors/hedge.py."""
        from fuse_train.selectors.hedge import log_weights
        from fuse_train.selectors.pools import hold_over_spans
        from fuse_train.selectors.selectors import covered_softmax

        logs_SBTM = log_weights(view.past_logprobs_BTM, rate=options.rate, shares=(options.share,))
        return covered_softmax(hold_over_spans(logs_SBTM[0], view.begins_BT), view.covered_BTM)
