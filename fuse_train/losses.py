"""The loss of a fusion run, as sums over rows. No dense target and no [B, T, V] tensor exists.

What `head_loss` computes equals these plain lines, for row r with label y, coefficients a_r (ground
truth) and b_rm (source m), entries (id_k, p_k) and tail mass t_m of source m:

    logq   = log_softmax(head(hidden))                                    [R, V]
    nll_r  = -logq[r, y_r]
    S_rm   = sum_k exp(logq[r, id_rmk])
    ce_rm  = -sum_k p_rmk * logq[r, id_rmk] - t_rm * log(1 - S_rm)
    total  = sum_r a_r * nll_r + sum_rm b_rm * ce_rm

and because cross-entropy is linear in its first argument, sum_m w_m CE(P_m, Q) = CE(sum_m w_m P_m, Q):
the sources are never merged.

Everything is a sum; callers divide once, by the count over all processes and micro-batches.

Shape suffixes: R rows (positions that have a label and logits), M sources, K entries, V vocabulary,
H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fuse_train.config import TailPolicy
from fuse_train.heads import Head, widen

MIN_TAIL = 1e-6
"""Least mass of the target outside a source's entries: below it float32 sums are only noise."""


@dataclass(frozen=True, slots=True)
class SourceRows:
    """Sparse distributions of the sources on the rows of a batch.

    Args:
        entry_ids_RMK: Integer token ids, -1 where there is no entry.
        entry_probs_RMK: Probabilities, 0 where there is no entry.
        tail_RM: Mass outside the entries.
    """

    entry_ids_RMK: torch.Tensor
    entry_probs_RMK: torch.Tensor
    tail_RM: torch.Tensor


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """Sums and rows of one call.

    Args:
        total: Scalar with gradient to hidden states, head and fusion coefficients.
        nll_R: Cross-entropy of the label, nats, no gradient.
        ce_RM: CE(P_m, Q), nats, no gradient; None without sources.
    """

    total: torch.Tensor
    nll_R: torch.Tensor
    ce_RM: torch.Tensor | None


def with_tail_policy(rows: SourceRows, policy: TailPolicy) -> SourceRows:
    """The same distributions with the mass outside the entries treated by `policy`.

    bucket keeps it as one class of its own, drop leaves it out (the distribution then sums to less
    than 1), renormalise scales the entries to 1 (what the softmax over the top k of FuseLLM does).
    """
    if policy == "bucket":
        return rows
    probs_RMK = rows.entry_probs_RMK
    if policy == "renormalise":
        mass_RM1 = probs_RMK.sum(-1, keepdim=True)
        probs_RMK = probs_RMK / torch.where(mass_RM1 > 0, mass_RM1, torch.ones_like(mass_RM1))
    return SourceRows(rows.entry_ids_RMK, probs_RMK, torch.zeros_like(rows.tail_RM))


def row_coefficients(
    weights_RM: torch.Tensor, covered_RM: torch.Tensor, clm_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of ground truth and of the sources at each row.

    A row that no source covers has the ground truth alone, with weight 1: leaving (1 - lambda) of
    it out would make a row count less because a source was silent.

    Args:
        weights_RM: Selector's weights, sum 1 on covered sources.
        covered_RM: bool.
        clm_weight: lambda.

    Returns:
        clm_R and fusion_RM.
    """
    any_R = covered_RM.any(-1)
    clm_R = torch.where(any_R, clm_weight, 1.0).to(weights_RM.dtype)
    return clm_R, (1.0 - clm_weight) * weights_RM


def importance_cv2(importance_M: torch.Tensor) -> torch.Tensor:
    """CV^2 = Var(I) / mean(I)^2 of the importance I_m, the sum of a source's weights over a batch.

    Source: Shazeer et al. 2017 (1701.06538), eq. 6; Fusion-X's feedback loss. The variance is the
    population's, so that one source gives 0.
    """
    mean = importance_M.mean()
    variance = ((importance_M - mean) ** 2).mean()
    return variance / mean.clamp(min=1e-12) ** 2


def label_pool_nll(weights_RM: torch.Tensor, label_logprobs_RM: torch.Tensor) -> torch.Tensor:
    """NLL of the label under the weighted pool, -log sum_m w_m p_m(label), row by row.

    Only sources that know the label's probability take part, their weights scaled to 1: nothing can
    be said about the others. This is a proper score of the weights.

    Args:
        weights_RM: Positive somewhere on the known sources of every row that counts.
        label_logprobs_RM: Nats, NaN where not known.

    Returns:
        [R] nats; 0 where no source with a weight knows the label.
    """
    known_RM = ~label_logprobs_RM.isnan() & (weights_RM > 0)
    usable_R1 = known_RM.any(-1, keepdim=True)
    # Inputs are replaced, not outputs: a masked NaN or log(0) would still poison the gradient.
    safe_RM = torch.where(known_RM, label_logprobs_RM, 0.0)
    log_w_RM = torch.where(known_RM, weights_RM, 1.0).log()
    log_w_RM = log_w_RM.masked_fill(~known_RM & usable_R1, float("-inf"))
    nll_R = torch.logsumexp(log_w_RM, -1) - torch.logsumexp(log_w_RM + safe_RM, -1)
    return torch.where(usable_R1[:, 0], nll_R, torch.zeros_like(nll_R))


def head_loss(
    hidden_RH: torch.Tensor,
    head: Head,
    labels_R: torch.Tensor,
    clm_R: torch.Tensor,
    sources: SourceRows | None = None,
    fusion_RM: torch.Tensor | None = None,
    *,
    chunk_rows: int,
) -> HeadLoss:
    """The sums of the module's plain lines, with logits of `chunk_rows` rows at a time.

    Gradients are made in the forward pass, chunk by chunk, and kept ([R, H] and [V, H]): one chunk of
    logits is all that ever exists, and none is computed twice.

    Args:
        hidden_RH: Hidden states that predict the rows, float32, bfloat16 or float64.
        head: Of the model.
        labels_R: int64.
        clm_R: Coefficients a of the ground truth.
        sources: Distributions, or None for ground truth alone.
        fusion_RM: Coefficients b of the sources; may need a gradient.
        chunk_rows: Rows whose logits exist at one time.

    Returns:
        Sums and rows.

    Source: FuseLLM (2401.10491) eq. 5-6 with D = CE. Departures: several weighted sources; the tail
    is a class of its own unless `with_tail_policy` took it away.
    """
    total, nll_R, ce_RM = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_RH,
        head.weight_VH,
        head.bias_V,
        fusion_RM,
        clm_R.detach(),
        labels_R,
        sources,
        (head.scale, head.softcap, chunk_rows),
    )
    return HeadLoss(total, nll_R, ce_RM if sources is not None else None)


class _HeadLoss(torch.autograd.Function):
    """Forward computes loss and gradients chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        fusion_RM: torch.Tensor | None,
        clm_R: torch.Tensor,
        labels_R: torch.Tensor,
        sources: SourceRows | None,
        options: tuple[float, float | None, int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, softcap, chunk_rows = options
        head = Head(weight_VH.to(hidden_RH.dtype), bias_V, scale, softcap)
        wide = torch.float64 if hidden_RH.dtype == torch.float64 else torch.float32
        num_rows = len(hidden_RH)
        num_sources = 0 if fusion_RM is None else fusion_RM.shape[1]
        nll_R = hidden_RH.new_empty(num_rows, dtype=wide)
        ce_RM = hidden_RH.new_empty((num_rows, num_sources), dtype=wide)
        needed = ctx.needs_input_grad[:3]
        grad_hidden_RH = torch.empty_like(hidden_RH) if needed[0] else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if needed[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if needed[2] else None  # type: ignore[arg-type]
        with torch.autocast(hidden_RH.device.type, enabled=False):
            for start in range(0, num_rows, chunk_rows):
                rows = slice(start, start + chunk_rows)
                logits_RV = head.logits(hidden_RH[rows])
                part = None if sources is None or fusion_RM is None else (sources, fusion_RM)
                grad_RV = _chunk(
                    logits_RV, labels_R[rows], clm_R[rows], part, rows, nll_R, ce_RM, any(needed)
                )
                if grad_RV is None:
                    continue
                # Below, the gradient of the logits becomes that of h W^T + b.
                grad_RV = _through_head(grad_RV, logits_RV, head)
                narrow_RV = grad_RV.to(hidden_RH.dtype)
                if grad_hidden_RH is not None:
                    torch.mm(narrow_RV, head.weight_VH, out=grad_hidden_RH[rows])
                if grad_weight_VH is not None:
                    _add_product(grad_weight_VH, narrow_RV, hidden_RH[rows])
                if grad_bias_V is not None:
                    grad_bias_V += grad_RV.sum(0)
        total = (clm_R.to(wide) * nll_R).sum()
        if fusion_RM is not None:
            total = total + (fusion_RM.detach().to(wide) * ce_RM).sum()
        ctx.save_for_backward(grad_hidden_RH, grad_weight_VH, grad_bias_V, ce_RM)
        ctx.dtypes = (weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(nll_R, ce_RM)
        return total, nll_R, ce_RM

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, ce_RM = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden is None else hidden * grad_total.to(hidden.dtype),
            None if weight is None else (weight * grad_total).to(weight_dtype),
            None if bias is None else (bias * grad_total).to(bias_dtype),
            ce_RM * grad_total if ctx.needs_input_grad[3] else None,
            *(None,) * 4,
        )


def _chunk(
    logits_RV: torch.Tensor,
    labels_R: torch.Tensor,
    clm_R: torch.Tensor,
    part: tuple[SourceRows, torch.Tensor] | None,
    rows: slice,
    nll_R: torch.Tensor,
    ce_RM: torch.Tensor,
    need_grad: bool,
) -> torch.Tensor | None:
    """Losses of one chunk into `nll_R` and `ce_RM`; returns the gradient of its logits.

    With S the target's mass on a source's entries, P its own mass there and t its tail:
        d ce / d z_j = q_j * (P - t S / (1 - S)) + [j is an entry] * (q_j * t / (1 - S) - p_j)
    so one softmax scaled by a number per row serves all sources, and entries are scattered onto it.
    """
    logq_RV = torch.log_softmax(logits_RV, -1)
    labels_R1 = labels_R[:, None]
    nll_R[rows] = -logq_RV.gather(1, labels_R1)[:, 0]
    clm_R1 = clm_R[:, None].to(logits_RV.dtype)
    factor_R1 = clm_R1
    scattered: list[tuple[torch.Tensor, torch.Tensor]] = [(labels_R1, -clm_R1)]
    if part is not None:
        sources, fusion_RM = part
        ids_RMK = sources.entry_ids_RMK[rows].long()
        present_RMK = ids_RMK >= 0
        index_RE = ids_RMK.clamp(min=0).flatten(1)
        logq_RMK = logq_RV.gather(1, index_RE).view(ids_RMK.shape)
        q_RMK = torch.where(present_RMK, logq_RMK, float("-inf")).exp()
        p_RMK = sources.entry_probs_RMK[rows].to(logits_RV.dtype)
        tail_RM = sources.tail_RM[rows].to(logits_RV.dtype)
        mass_RM = q_RMK.sum(-1)
        rest_RM = (1 - mass_RM).clamp(min=MIN_TAIL)
        seen_RMK = torch.where(present_RMK, logq_RMK, 0.0)
        ce_RM[rows] = -(p_RMK * seen_RMK).sum(-1) - tail_RM * rest_RM.log()
        if need_grad:
            b_RM = fusion_RM[rows].detach().to(logits_RV.dtype)
            ratio_RM = tail_RM / rest_RM
            factor_R1 = clm_R1 + (b_RM * (p_RMK.sum(-1) - ratio_RM * mass_RM)).sum(-1, True)
            entry_RMK = b_RM[..., None] * (q_RMK * ratio_RM[..., None] - p_RMK)
            scattered.append((index_RE, entry_RMK.flatten(1)))
    if not need_grad:
        return None
    grad_RV = logq_RV.exp_().mul_(factor_R1)
    for index, values in scattered:
        grad_RV.scatter_add_(1, index, values)
    return grad_RV


def _through_head(grad_RV: torch.Tensor, logits_RV: torch.Tensor, head: Head) -> torch.Tensor:
    if head.softcap is not None:
        grad_RV = grad_RV * (1 - (logits_RV / head.softcap) ** 2)
    return grad_RV if head.scale == 1.0 else grad_RV * head.scale


def _add_product(
    grad_weight_VH: torch.Tensor, grad_RV: torch.Tensor, hidden_RH: torch.Tensor
) -> None:
    """grad_weight += grad^T h, summed over chunks in float32 or better."""
    if grad_RV.dtype == grad_weight_VH.dtype:
        torch.addmm(grad_weight_VH, grad_RV.T, hidden_RH, out=grad_weight_VH)
    else:
        grad_weight_VH += widen(grad_RV.T @ hidden_RH)
