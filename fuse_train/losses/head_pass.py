"""One pass over chunks of rows: logits, losses and gradients, in one buffer of [chunk, V].

In each row the loss needs a few tokens only: the label and the sources' entries, called slots. The
buffer holds logits, then their exponentials, then their gradient. The slots are taken out, computed in
float64 (they are few) and put back, so that 1 - (mass of the entries) is the sum of the rest of the
row instead of a difference of two numbers near 1.

Shape suffixes: R rows, C rows of a chunk, M sources, K entries, J slots (label, then M * K entries),
V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fuse_train.divergences.classes import Classes
from fuse_train.divergences.divergence import Divergence
from fuse_train.model.heads import Head

MIN_TAIL = 1e-6
"""Least mass of the target outside a source's entries; bounds the slope of the tail's term."""


@dataclass(frozen=True, slots=True)
class ChunkSources:
    """The sources' distributions of the rows of a chunk, and their fusion coefficients."""

    ids_CMK: torch.Tensor
    probs_CMK: torch.Tensor
    tail_CM: torch.Tensor
    fusion_CM: torch.Tensor

    def __getitem__(self, rows: slice) -> ChunkSources:
        return ChunkSources(
            self.ids_CMK[rows], self.probs_CMK[rows], self.tail_CM[rows], self.fusion_CM[rows]
        )


class HeadPass(torch.autograd.Function):
    """Forward makes losses and gradients chunk by chunk; backward only scales the gradients.

    It scales them in place and keeps none, so a second backward pass is refused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        fusion_RM: torch.Tensor | None,
        clm_R: torch.Tensor,
        labels_R: torch.Tensor,
        entries: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        options: tuple[float, float | None, Divergence, int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, softcap, divergence, chunk_rows = options
        ctx.dtypes = [t if t is None else t.dtype for t in (hidden_RH, weight_VH, bias_V)]
        hidden_RH = hidden_RH.to(product_dtype(hidden_RH))
        head = Head(weight_VH.to(hidden_RH.dtype), bias_V, scale, softcap)
        wide = torch.promote_types(hidden_RH.dtype, torch.float32)
        sources = None
        if entries is not None and fusion_RM is not None:
            sources = ChunkSources(*entries, fusion_RM)
        num_rows, num_sources = len(hidden_RH), 0 if sources is None else sources.tail_CM.shape[1]
        nll_R = hidden_RH.new_empty(num_rows, dtype=wide)
        ce_RM = hidden_RH.new_empty((num_rows, num_sources), dtype=wide)
        grads = _Gradients(hidden_RH, weight_VH, bias_V, ctx.needs_input_grad[:3])
        buffer_CV = hidden_RH.new_empty((min(chunk_rows, num_rows), len(weight_VH)), dtype=wide)
        with torch.autocast(hidden_RH.device.type, enabled=False):
            for start in range(0, num_rows, chunk_rows):
                rows = slice(start, min(start + chunk_rows, num_rows))
                logits_CV = buffer_CV[: rows.stop - start]
                slope_CV = _write_logits(head, hidden_RH[rows], logits_CV)
                part = None if sources is None else sources[rows]
                nll_R[rows], ce_CM = losses_to_gradient(
                    logits_CV, labels_R[rows], clm_R[rows], part, divergence
                )
                if ce_CM is not None:
                    ce_RM[rows] = ce_CM
                if any(ctx.needs_input_grad[:3]):
                    if slope_CV is not None:
                        logits_CV.mul_(slope_CV)
                    grads.add(logits_CV, rows, head)
        total = (clm_R.to(wide) * nll_R).sum()
        if sources is not None:
            total = total + (sources.fusion_CM.to(wide) * ce_RM).sum()
        ctx.made = [grads.hidden_RH, grads.weight_VH, grads.bias_V]
        ctx.save_for_backward(ce_RM)
        ctx.mark_non_differentiable(nll_R, ce_RM)
        return total, nll_R, ce_RM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.made is None:
            raise RuntimeError("backward through the head's loss runs once; its gradients are gone")
        made, ctx.made = ctx.made, None
        scaled = [
            None if grad is None else grad.mul_(grad_total.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        (ce_RM,) = ctx.saved_tensors
        return (*scaled, ce_RM * grad_total if ctx.needs_input_grad[3] else None, *(None,) * 4)


def product_dtype(hidden_RH: torch.Tensor) -> torch.dtype:
    """dtype of the product of hidden states and head: that of the hidden states, but float32 on a CPU
    that only emulates bfloat16 or float16: there float32 is many times faster, and more exact."""
    dtype = hidden_RH.dtype
    if dtype in (torch.float32, torch.float64) or hidden_RH.device.type != "cpu":
        return dtype
    return dtype if dtype == torch.bfloat16 and cpu_multiplies_bfloat16() else torch.float32


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Gradients:
    """Gradients of hidden states, weight and bias, summed over chunks in float32 or better."""

    def __init__(
        self,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        needed: tuple[bool, ...],
    ) -> None:
        wide = torch.promote_types(hidden_RH.dtype, torch.float32)
        empty = len(hidden_RH) == 0
        make = torch.zeros_like if empty else torch.empty_like  # the first chunk overwrites
        self._hidden_RH = hidden_RH
        self.hidden_RH = torch.empty_like(hidden_RH) if needed[0] else None
        self.weight_VH = make(weight_VH, dtype=wide) if needed[1] else None
        self.bias_V = None
        if bias_V is not None and needed[2]:
            self.bias_V = torch.zeros_like(bias_V, dtype=wide)

    def add(self, grad_CV: torch.Tensor, rows: slice, head: Head) -> None:
        """Add a chunk, from the gradient of its h W^T + b; may change `grad_CV`."""
        if head.scale != 1.0:
            grad_CV.mul_(head.scale)
        if self.bias_V is not None:
            self.bias_V += grad_CV.sum(0)
        hidden_CH = self._hidden_RH[rows]
        narrow_CV = grad_CV.to(hidden_CH.dtype)
        if self.hidden_RH is not None:
            torch.mm(narrow_CV, head.weight_VH, out=self.hidden_RH[rows])
        if self.weight_VH is None:
            return
        if narrow_CV.dtype == self.weight_VH.dtype:
            beta = 0 if rows.start == 0 else 1
            self.weight_VH.addmm_(narrow_CV.T, hidden_CH, beta=beta)
        elif rows.start == 0:
            self.weight_VH.copy_(narrow_CV.T @ hidden_CH)
        else:
            self.weight_VH.add_(narrow_CV.T @ hidden_CH)


def _write_logits(head: Head, hidden_CH: torch.Tensor, out_CV: torch.Tensor) -> torch.Tensor | None:
    """Write logits into `out_CV`; return the slope of the soft cap, None without one."""
    if out_CV.dtype == hidden_CH.dtype:
        torch.mm(hidden_CH, head.weight_VH.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CH @ head.weight_VH.T)
    if head.bias_V is not None:
        out_CV.add_(head.bias_V)
    if head.scale != 1.0:
        out_CV.mul_(head.scale)
    if head.softcap is None:
        return None
    out_CV.div_(head.softcap).tanh_()
    slope_CV = out_CV.square().neg_().add_(1.0)
    out_CV.mul_(head.softcap)
    return slope_CV


def losses_to_gradient(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    clm_C: torch.Tensor,
    part: ChunkSources | None,
    divergence: Divergence,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses of a chunk: nll_C and ce_CM, nats (None without sources).

    Overwrites `logits_CV` with the gradient of sum(clm * nll) + sum(fusion * ce).
    """
    temperature = divergence.target_temperature
    if part is None or temperature == 1.0:
        return _at_one_temperature(logits_CV, labels_C, clm_C, part, divergence)
    soft_CV = logits_CV / temperature
    nll_C, _ = _at_one_temperature(logits_CV, labels_C, clm_C, None, divergence)
    _, ce_CM = _at_one_temperature(soft_CV, labels_C, torch.zeros_like(clm_C), part, divergence)
    # d(T^2 D(z / T)) / dz = T * D'
    logits_CV.add_(soft_CV, alpha=temperature)
    return nll_C, None if ce_CM is None else ce_CM * temperature**2


def _at_one_temperature(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    clm_C: torch.Tensor,
    part: ChunkSources | None,
    divergence: Divergence,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    wide = logits_CV.dtype
    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    index_CJ, present_CMK = labels_C[:, None], None
    if part is not None:
        ids_CMK = part.ids_CMK.long()
        if divergence.sorts:
            ids_CMK = logits_CV.topk(ids_CMK.shape[2]).indices[:, None].expand(ids_CMK.shape)
        present_CMK = ids_CMK >= 0
        # A padding entry points at the label, which is a slot anyway.
        ids_CMK = torch.where(present_CMK, ids_CMK, labels_C[:, None, None])
        index_CJ = torch.cat([index_CJ, ids_CMK.flatten(1)], 1)
    logits_CJ = logits_CV.gather(1, index_CJ).double()
    slots = _take_slots(logits_CV.exp_(), index_CJ)
    logq_CJ = logits_CJ - slots.sum_C1.log()
    q_CJ = slots.exp_CJ / slots.sum_C1
    slope_CJ, ce_CM = -clm_C[:, None].double(), None
    if part is not None and present_CMK is not None:
        mass_CM = (slots.exp_CJ[:, 1:].view(present_CMK.shape) * present_CMK).sum(-1)
        classes = Classes(
            _sorted(part.probs_CMK.double()) if divergence.sorts else part.probs_CMK.double(),
            part.tail_CM.double(),
            q_CJ[:, 1:].view(present_CMK.shape) * present_CMK,
            logq_CJ[:, 1:].view(present_CMK.shape).masked_fill(~present_CMK, 0.0),
            ((slots.sum_C1 - mass_CM) / slots.sum_C1).clamp(min=MIN_TAIL),
        )
        ce_CM, slope_CMK = divergence.value_and_slope(classes)
        slope_CMK = slope_CMK * part.fusion_CM.double()[..., None]
        slope_CJ = torch.cat([slope_CJ, slope_CMK.flatten(1)], 1)
    # d / d z_j = [j is a slot] * slope - q_j * sum of slopes
    factor_C1 = -slope_CJ.sum(1, keepdim=True)
    logits_CV.mul_((factor_C1 / slots.sum_C1).to(wide))
    slots.put_back(logits_CV, index_CJ, slope_CJ + factor_C1 * q_CJ * slots.first_CJ)
    return -logq_CJ[:, 0].to(wide), None if ce_CM is None else ce_CM.to(wide)


def _sorted(probs_CMK: torch.Tensor) -> torch.Tensor:
    return probs_CMK.sort(-1, descending=True).values


@dataclass(frozen=True, slots=True)
class _Slots:
    """Exponentials taken out of the buffer.

    Args:
        exp_CJ: float64; the same token may have several slots.
        holder_CJ: For each slot, the slot that represents its token.
        first_CJ: Whether the slot is that one itself.
        sum_C1: Sum of the whole row, float64.
    """

    exp_CJ: torch.Tensor
    holder_CJ: torch.Tensor
    first_CJ: torch.Tensor
    sum_C1: torch.Tensor

    def put_back(self, into_CV: torch.Tensor, index_CJ: torch.Tensor, add_CJ: torch.Tensor) -> None:
        """Write to each token the sum of `add_CJ` over its slots."""
        sum_CJ = torch.zeros_like(add_CJ).scatter_add_(1, self.holder_CJ, add_CJ)
        into_CV.scatter_(1, index_CJ, sum_CJ.gather(1, self.holder_CJ).to(into_CV.dtype))


def _take_slots(exp_CV: torch.Tensor, index_CJ: torch.Tensor) -> _Slots:
    """Take the slots out of `exp_CV`, leaving zeros, and sum each row without cancellation."""
    exp_CJ = exp_CV.gather(1, index_CJ).double()
    # All slots of a token write their numbers to it; the one that is read back represents them.
    number_J = torch.arange(index_CJ.shape[1], device=exp_CV.device)
    exp_CV.scatter_(1, index_CJ, number_J.to(exp_CV.dtype).expand(index_CJ.shape))
    holder_CJ = exp_CV.gather(1, index_CJ).long()
    first_CJ = holder_CJ == number_J
    exp_CV.scatter_(1, index_CJ, 0.0)
    rest_C1 = exp_CV.sum(1, keepdim=True).double()
    sum_C1 = rest_C1 + (exp_CJ * first_CJ).sum(1, keepdim=True)
    return _Slots(exp_CJ, holder_CJ, first_CJ, sum_C1)
