"""Target, selector and loss as one module, so that whatever wraps modules (DDP) wraps all of it.

L = lambda * L_CLM + (1 - lambda) * L_fusion + span_weight * L_span + alpha * L_feedback
    + pool_weight * L_pool.

L_CLM, L_fusion and L_span are divided by the rows of the whole step over all processes and
micro-batches, L_pool by the rows where a source knows the label. L_feedback = CV^2(I) is not a sum
over rows, but its gradient is: with the step's importance I known beforehand, the sum over rows of
dCV^2/dI_m times the row's weight of source m has the same gradient.

Shape suffixes: B segments, L input positions, T rows, M sources, R rows with a label, H hidden, G
domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fuse_train.config import TrainSection
from fuse_train.data.batch import Batch
from fuse_train.gate.first_reading import FirstReadings
from fuse_train.losses.loss_schedule import weights_at
from fuse_train.losses.losses import (
    HeadLoss,
    RowGate,
    head_loss,
    importance_cv2,
    row_coefficients,
    with_tail_policy,
    with_temperature,
)
from fuse_train.losses.span_likelihood import span_loss, span_rows
from fuse_train.losses.token_selection import row_factors
from fuse_train.model.heads import head_of, hidden_states
from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from fuse_train.selectors.pools import label_pool_nll, pool_nats
from fuse_train.selectors.selectors import Selector, SourceView
from fuse_train.stages_config import StageSection
from store_schema.errors import ConfigError

Sums = dict[str, torch.Tensor]
At = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counts over a whole step, needed before its first backward pass.

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
        sources: Names in the order of the batches' sources, for `loss.keep_reference`.

    Raises:
        ConfigError: The reference is none of the sources.
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector | None,
        section: TrainSection,
        sources: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.selector = selector
        self.section = section
        self._reference = reference_index(section, sources)
        self.weights = weights_at(section, 0.0)
        self.fusion_shares: dict[str, float] = {}
        """The pool's weight in its best mixture with the target, by domain; 1 for domains not named."""
        self.readings: FirstReadings | None = None
        """The target's first reading of each row; None where each row is read once."""

    def at_progress(self, progress: float, stage: StageSection | None = None) -> None:
        """Set the scheduled weights and temperatures before a step.

        Args:
            progress: 0 at the run's first step, 1 at its last.
            stage: Stage that the step belongs to.
        """
        self.weights = weights_at(self.section, progress)
        if stage is not None and stage.clm_weight is not None:
            self.weights = replace(self.weights, clm_weight=stage.clm_weight)
        if self.weights.threshold is not None and self.selector is not None:
            self.selector.set_threshold(self.weights.threshold)

    def forward(self, batch: Batch, totals: StepTotals) -> tuple[torch.Tensor, Sums]:
        """Loss of a micro-batch, divided by the step's counts, and its sums for the log."""
        model: Any = self.model
        at = batch.label_rows()
        positions_BL = None if batch.packs is None else batch.packs.position_ids_BL
        hidden_BLH = hidden_states(model, batch.input_ids_BL, positions_BL)
        hidden_RH = hidden_BLH[batch.predicted_from(at)]
        device = hidden_RH.device.type
        if torch.is_autocast_enabled(device):
            hidden_RH = hidden_RH.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            if self.selector is None or batch.sources is None:
                loss = self._ground_truth(hidden_RH, batch, at)
                sums = {"loss": loss.total, "clm": loss.nll_R.sum()}
                return loss.total / totals.labels, detached(sums)
            return self._fused(hidden_RH, batch, at, totals)

    def _ground_truth(self, hidden_RH: torch.Tensor, batch: Batch, at: At) -> HeadLoss:
        ones_R = torch.ones(len(hidden_RH), device=hidden_RH.device)
        if batch.weights_B is not None:
            ones_R = ones_R * batch.weights_B[at[0]]
        return self._head_loss(hidden_RH, batch, at, ones_R)

    def _head_loss(
        self, hidden_RH: torch.Tensor, batch: Batch, at: At, *rest: Any, **options: Any
    ) -> HeadLoss:
        model: Any = self.model
        head = head_of(model, where=str(model.config.name_or_path))
        chunk = self.section.head_chunk_rows
        return head_loss(hidden_RH, head, batch.labels_BT[at], *rest, chunk_rows=chunk, **options)

    def _fused(
        self, hidden_RH: torch.Tensor, batch: Batch, at: At, totals: StepTotals
    ) -> tuple[torch.Tensor, Sums]:
        sources, section = batch.sources, self.section
        if sources is None or self.selector is None:
            raise TypeError("a fused batch needs sources and a selector")
        gates_BTM, weights_BTM = select(self.selector, sources.view)
        weights_RM, covered_RM = weights_BTM[at], sources.covered_BTM[at]
        for_target_RM = weights_RM if self.selector.fusion_trains else weights_RM.detach()
        logprobs_RM = sources.label_logprobs_BTM[at].clamp(min=PROBABILITY_FLOOR)
        target, of_target = self._target_loss(
            hidden_RH, batch, at, for_target_RM, covered_RM, logprobs_RM
        )
        loss = target / totals.labels
        pool_R = pool_nats(
            gates_BTM, sources.label_logprobs_BTM.clamp(min=PROBABILITY_FLOOR), sources.begins_BT
        )[at]
        if self.selector.pool_trains:
            loss = loss + section.pool_weight * pool_R.sum() / max(totals.pool_rows, 1)
        if totals.importance_M is not None:
            slope_M = cv2_slope(totals.importance_M)
            loss = loss + self.weights.feedback_weight * (weights_RM.sum(0) * slope_M).sum()
        of_sources = {"pool": pool_R.sum(), "covered": covered_RM.any(-1).sum()}
        domain_R = batch.domains_B[at[0]]
        shares = by_domain(weights_RM.detach(), covered_RM, domain_R, len(batch.domains))
        return loss, detached({"loss": target} | of_target | of_sources | shares)

    def row_gate(
        self, batch: Batch, at: At, weights_RM: torch.Tensor, logprobs_RM: torch.Tensor
    ) -> RowGate | None:
        """How much of the fusion loss each row keeps; None keeps all of it.

        Args:
            batch: With sources.
            at: The rows.
            weights_RM: Of the sources.
            logprobs_RM: Of the labels under the sources, nats, NaN where not known.
        """
        kind = self.section.fusion_gate.kind
        if kind == "none":
            return None
        shares = [self.fusion_shares.get(domain, 1.0) for domain in batch.domains]
        prior_G = torch.logit(torch.tensor(shares, dtype=torch.float64))
        prior_R = prior_G.to(weights_RM.device)[batch.domains_B[at[0]]]
        if kind == "held_out":
            same_R = torch.zeros_like(prior_R)
            return RowGate(prior_R, same_R, same_R)
        pool_R = label_reference(weights_RM.detach(), logprobs_RM, None)
        if self.readings is None:
            return RowGate(prior_R, pool_R, torch.full_like(pool_R, torch.nan))
        return RowGate(prior_R, pool_R, self.readings.of(batch, at).to(pool_R))

    def _target_loss(
        self,
        hidden_RH: torch.Tensor,
        batch: Batch,
        at: At,
        weights_RM: torch.Tensor,
        covered_RM: torch.Tensor,
        logprobs_RM: torch.Tensor,
    ) -> tuple[torch.Tensor, Sums]:
        """Ground truth, fusion and spans as one sum over rows, and their parts for the log."""
        options, sources = self.section.loss, batch.sources
        if sources is None:
            raise TypeError("a fused batch needs sources")
        rows = with_tail_policy(sources.rows(at), self.section.tail)
        rows = with_temperature(rows, options.source_temperature)
        clm_R, fusion_RM = row_coefficients(weights_RM, covered_RM, self.weights.clm_weight)
        gate, weight_R = (
            self.row_gate(batch, at, weights_RM, logprobs_RM),
            fusion_RM.detach().sum(-1),
        )
        if batch.weights_B is not None:
            counts_R = batch.weights_B[at[0]]
            clm_R, fusion_RM = clm_R * counts_R, fusion_RM * counts_R[:, None]
        span_offset = weights_RM.new_zeros(())
        sums: Sums = {}
        if options.needs_labels_first:
            with torch.no_grad():
                nll_R = self._ground_truth(hidden_RH.detach(), batch, at).nll_R
            if options.keep_share is not None:
                reference_R = label_reference(weights_RM.detach(), logprobs_RM, self._reference)
                factor_R = row_factors(nll_R, reference_R, options.keep_share)
                clm_R, fusion_RM = clm_R * factor_R, fusion_RM * factor_R[:, None]
            if options.span_weight:
                if batch.spans is None:
                    raise TypeError("span_weight needs batches with spans")
                spans = span_rows(batch.spans, at)
                value, slope_R = span_loss(nll_R, weights_RM, spans, options.span_temperature)
                # The ground truth's coefficients hold its gradient; the offset corrects the value.
                clm_R = clm_R + options.span_weight * slope_R
                span_offset = options.span_weight * (value - (slope_R * nll_R).sum())
                sums["spans"] = value
        loss = self._head_loss(
            hidden_RH,
            batch,
            at,
            clm_R,
            rows,
            fusion_RM,
            divergence=self.weights.divergence,
            gate=gate,
        )
        if loss.ce_RM is None:
            raise TypeError("head_loss returned no divergences of the sources")
        if self.readings is not None:
            self.readings.note(batch, at, loss.nll_R)
        sums |= {"clm": loss.nll_R.sum(), "fusion": (weights_RM.detach() * loss.ce_RM).sum()}
        domain_R = batch.domains_B[at[0]]
        sums["fusion_weight_G"] = summed(weight_R * loss.kept_R, domain_R, len(batch.domains))
        return loss.total + span_offset, sums


def reference_index(section: TrainSection, sources: Sequence[str]) -> int | None:
    """Which source is the reference of `loss.keep_share`; None for the pool.

    Raises:
        ConfigError: No source of that name.
    """
    name = section.loss.keep_reference
    if section.loss.keep_share is None or name == "pool":
        return None
    if name not in sources:
        raise ConfigError(
            "reference is none of the sources",
            where="train.loss.keep_reference",
            expected=", ".join(["pool", *sources]),
            got=name,
        )
    return list(sources).index(name)


def label_reference(
    weights_RM: torch.Tensor, logprobs_RM: torch.Tensor, source: int | None
) -> torch.Tensor:
    """NLL of each label [R] under a source, or under the pool if None; nats, NaN where not known."""
    if source is not None:
        return -logprobs_RM[:, source]
    known_R = (~logprobs_RM.isnan() & (weights_RM > 0)).any(-1)
    return label_pool_nll(weights_RM, logprobs_RM).masked_fill(~known_R, torch.nan)


def select(selector: Selector, view: SourceView) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates, which the pool loss uses, and weights, which the fusion loss uses; both [B, T, M]."""
    gates_BTM = selector.gates(view)
    return gates_BTM, selector.keep(gates_BTM)


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
    """Sums over rows by domain, for the log: weights, their squares, sources with weight, entropy
    (nats), covered."""
    dtype = weights_RM.dtype
    entropy_R = -torch.xlogy(weights_RM, weights_RM).sum(-1)
    columns = {
        "weights_GM": weights_RM,
        "squares_GM": weights_RM * weights_RM,
        "load_GM": (weights_RM > 0).to(dtype),
        "entropy_G": entropy_R,
        "covered_G": covered_RM.any(-1).to(dtype),
    }
    return {name: summed(values, domain_R, count) for name, values in columns.items()}


def summed(values_R: torch.Tensor, domain_R: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of rows (of [R] or [R, M]) by domain."""
    return values_R.new_zeros((count, *values_R.shape[1:])).index_add_(0, domain_R, values_R)


def detached(sums: Sums) -> Sums:
    """The same figures without their graph, in float32 or wider."""
    return {name: value.detach().float() for name, value in sums.items()}
