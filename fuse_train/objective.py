"""Target, selector and loss as one module, so that whatever wraps modules (DDP) wraps all of it.

L = lambda * L_CLM + (1 - lambda) * L_fusion + alpha * L_feedback + pool_weight * L_pool.

L_CLM and L_fusion are divided by the rows of the whole step over all processes and micro-batches,
L_pool by its own rows. L_feedback is not a sum over rows, so its gradient is: with importance I of
the whole step known beforehand, d CV^2/dI_m times each row's weight adds up to it exactly.

Shape suffixes: B segments, L input positions, T rows, M sources, R rows with a label, H hidden, G
domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fuse_train.asn import AdaptiveSelector
from fuse_train.batch import Batch
from fuse_train.config import TrainSection
from fuse_train.heads import head_of, hidden_states
from fuse_train.losses import (
    HeadLoss,
    head_loss,
    importance_cv2,
    label_pool_nll,
    row_coefficients,
    with_tail_policy,
)
from fuse_train.selector_training import PROBABILITY_FLOOR
from fuse_train.selectors import Selector, SourceView

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What must be known of the whole step before its first backward pass.

    Args:
        labels: Rows with a label, over all processes and micro-batches.
        pool_rows: Of these, rows where a covered source knows the label.
        importance_M: Sum of each source's weights; None where it has no gradient.
    """

    labels: int
    pool_rows: int
    importance_M: torch.Tensor | None = None


class FusionObjective(nn.Module):
    """The loss of a micro-batch.

    Args:
        model: Causal model of transformers, the target.
        selector: None trains ground truth alone.
        section: Weights and policies.
    """

    def __init__(self, model: nn.Module, selector: Selector | None, section: TrainSection) -> None:
        super().__init__()
        self.model = model
        self.selector = selector
        self.section = section

    def forward(self, batch: Batch, totals: StepTotals) -> tuple[torch.Tensor, Sums]:
        """Loss of a micro-batch, divided by the step's counts, and its sums for the log."""
        model: Any = self.model
        at = batch.label_rows()
        hidden_BLH = hidden_states(model, batch.input_ids_BL)
        hidden_RH = hidden_BLH[at[0], batch.predicted_by_BT[at]]
        device = hidden_RH.device.type
        if torch.is_autocast_enabled(device):
            hidden_RH = hidden_RH.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            if self.selector is None or batch.sources is None:
                ones_R = torch.ones(len(hidden_RH), device=hidden_RH.device)
                loss = self._head_loss(hidden_RH, batch, at, ones_R)
                sums = {"loss": loss.total, "clm": loss.nll_R.sum()}
                return loss.total / totals.labels, detached(sums)
            return self._fused(hidden_RH, batch, at, totals)

    def _head_loss(self, hidden_RH: torch.Tensor, batch: Batch, at: Any, *rest: Any) -> HeadLoss:
        model: Any = self.model
        head = head_of(model, where=str(model.config.name_or_path))
        chunk = self.section.head_chunk_rows
        return head_loss(hidden_RH, head, batch.labels_BT[at], *rest, chunk_rows=chunk)

    def _fused(
        self, hidden_RH: torch.Tensor, batch: Batch, at: Any, totals: StepTotals
    ) -> tuple[torch.Tensor, Sums]:
        sources, section = batch.sources, self.section
        if sources is None or self.selector is None:
            raise TypeError("a fused batch needs sources and a selector")
        gates_BTM, weights_BTM = select(self.selector, sources.view)
        weights_RM, covered_RM = weights_BTM[at], sources.covered_BTM[at]
        learns = isinstance(self.selector, AdaptiveSelector)
        for_target_RM = weights_RM
        if not learns or section.asn.objective == "pool":
            for_target_RM = weights_RM.detach()
        clm_R, fusion_RM = row_coefficients(for_target_RM, covered_RM, section.clm_weight)
        rows = with_tail_policy(sources.rows(at), section.tail)
        head = self._head_loss(hidden_RH, batch, at, clm_R, rows, fusion_RM)
        loss = head.total / totals.labels
        logprobs_RM = sources.label_logprobs_BTM[at].clamp(min=PROBABILITY_FLOOR)
        pool_R = label_pool_nll(gates_BTM[at], logprobs_RM)
        if learns and section.asn.objective != "fusion":
            loss = loss + section.pool_weight * pool_R.sum() / max(totals.pool_rows, 1)
        if totals.importance_M is not None:
            slope_M = cv2_slope(totals.importance_M)
            loss = loss + section.feedback_weight * (weights_RM.sum(0) * slope_M).sum()
        if head.ce_RM is None:
            raise TypeError("sources were given, so their cross-entropies are")
        w_RM = weights_RM.detach()
        sums = {
            "loss": head.total,
            "clm": head.nll_R.sum(),
            "fusion": (w_RM * head.ce_RM).sum(),
            "pool": pool_R.sum(),
            "covered": covered_RM.any(-1).sum(),
        } | by_domain(w_RM, covered_RM, batch.domains_B[at[0]], len(batch.domains))
        return loss, detached(sums)


def select(selector: Selector, view: SourceView) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates (what the pool loss is taken on) and weights (what the target sees)."""
    if isinstance(selector, AdaptiveSelector):
        gates_BTM = selector.gates(view)
        return gates_BTM, selector.keep(gates_BTM)
    weights_BTM = selector(view)
    return weights_BTM, weights_BTM


def importance(selector: Selector, batch: Batch) -> torch.Tensor:
    """Sum of each source's weights [M] over the labelled rows of a batch, without gradient."""
    if batch.sources is None:
        raise TypeError("a batch of ground truth alone has no importance")
    with torch.no_grad():
        return select(selector, batch.sources.view)[1][batch.label_rows()].sum(0)


def cv2_slope(importance_M: torch.Tensor) -> torch.Tensor:
    """d CV^2 / d I_m at the step's importance."""
    with torch.enable_grad():
        point_M = importance_M.detach().requires_grad_()
        (slope_M,) = torch.autograd.grad(importance_cv2(point_M), point_M)
    return slope_M


def by_domain(
    weights_RM: torch.Tensor, covered_RM: torch.Tensor, domain_R: torch.Tensor, count: int
) -> Sums:
    """Sums of weights and of covered rows per domain, for the log."""
    weights_GM = weights_RM.new_zeros((count, weights_RM.shape[1]))
    rows_G = weights_RM.new_zeros(count)
    covered_R = covered_RM.any(-1).to(weights_RM.dtype)
    return {
        "weights_GM": weights_GM.index_add_(0, domain_R, weights_RM),
        "covered_G": rows_G.index_add_(0, domain_R, covered_R),
    }


def detached(sums: Sums) -> Sums:
    """The same figures without their graph, in float32 or wider."""
    return {name: value.detach().float() for name, value in sums.items()}
