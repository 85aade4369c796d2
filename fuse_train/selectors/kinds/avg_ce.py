"""Selector avg_ce."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuse_train.selectors.kind import RuleKind

if TYPE_CHECKING:
    import torch

    from fuse_train.selectors.selectors import SourceView


class AvgCe(RuleKind):
    """Softmax of rewards exp(-CE), CE in nats per byte (FuseLLM's AvgCE).

    Source: FuseLLM (2401.10491) AvgCE. Departures: CE is nats per byte, not per token, as in min_ce;
    the softmax is over the sources that cover the row. A source of unknown NLL has reward 0.
    """

    hindsight = True

    def weights(self, view: SourceView, options: None) -> torch.Tensor:
        """Softmax of the sources' rewards of the segment."""
        from fuse_train.selectors.selectors import covered_softmax, rewards

        rewards_B1M = rewards(view.source_bpb_BM)[:, None]
        return covered_softmax(rewards_B1M.expand(view.covered_BTM.shape), view.covered_BTM)
