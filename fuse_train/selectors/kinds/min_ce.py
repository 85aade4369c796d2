"""Selector min_ce."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuse_train.selectors.kind import RuleKind

if TYPE_CHECKING:
    import torch

    from fuse_train.selectors.selectors import SourceView


class MinCe(RuleKind):
    """1 on the source with the least NLL of the segment per BYTE (FuseLLM's MinCE; per token, models
    with longer tokens would lose).

    Source: FuseLLM (2401.10491) MinCE. Departures: per byte, not per token, because sources with
    longer tokens lose otherwise; per row the best of the covered ones. Equal sources: the first in
    the run file's order.
    """

    hindsight = True

    def weights(self, view: SourceView, options: None) -> torch.Tensor:
        """All weight on one source."""
        from torch.nn.functional import one_hot

        bpb_BTM = view.source_bpb_BM[:, None].expand(view.covered_BTM.shape)
        # Covered sources of unknown NLL come after known ones and before those not covered.
        bpb_BTM = bpb_BTM.nan_to_num(nan=1e30, posinf=1e30)
        best_BT = bpb_BTM.masked_fill(~view.covered_BTM, float("inf")).argmin(-1)
        return one_hot(best_BT, view.covered_BTM.shape[-1]).float() * view.covered_BTM
