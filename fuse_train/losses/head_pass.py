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
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fuse_train.divergences.classes import Classes
from fuse_train.divergences.divergence import Divergence
from fuse_train.model.heads import Head

MIN_TAIL = 1e-6
"""Least mass of the target outside a source's entries; bounds the slope of the tail's term."""


@dataclass(frozen=True, slots=True)
class ChunkSources:
    """The sources' distributions of the rows of a chunk."""

    ids_CMK: torch.Tensor
    probs_CMK: torch.Tensor
    tail_CM: torch.Tensor

    def __getitem__(self, rows: slice) -> ChunkSources:
        return ChunkSources(self.ids_CMK[rows], self.probs_CMK[rows], self.tail_CM[rows])


@dataclass(frozen=True, slots=True)
class RowGate:
    """How much of its fusion coefficients each row keeps; the rest moves to its label.

    It keeps the posterior probability that the label is the pool's and not the target's, given the
    prior weight w of the pool in a mixture of the two: sigmoid(logit w + target's NLL - pool's NLL).

    Args:
        prior_logit_R: logit w.
        pool_nll_R: NLL of the label under the pool, nats; NaN where not known, which keeps nothing.
        first_nll_R: NLL of the label under the target when it first read the row, nats; NaN where it
            reads it now.
    """

    prior_logit_R: torch.Tensor
    pool_nll_R: torch.Tensor
    first_nll_R: torch.Tensor

    def __getitem__(self, rows: slice) -> RowGate:
        return RowGate(self.prior_logit_R[rows], self.pool_nll_R[rows], self.first_nll_R[rows])

    def kept(self, nll_R: torch.Tensor) -> torch.Tensor:
        """Shares [R], float64, of the coefficients that stay.

        Args:
            nll_R: NLL of the label under the target now.
        """
        target_R = torch.where(self.first_nll_R.isnan(), nll_R, self.first_nll_R).double()
        kept_R = torch.sigmoid(self.prior_logit_R.double() + target_R - self.pool_nll_R.double())
        return torch.where(self.pool_nll_R.isnan(), 0.0, kept_R)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Of the losses of some rows.

    Args:
        clm_C: Of the label's NLL.
        fusion_CM: Of the sources' divergences; None without sources.
        gate: Moves some of `fusion_CM` to `clm_C`; None leaves them.
    """

    clm_C: torch.Tensor
    fusion_CM: torch.Tensor | None = None
    gate: RowGate | None = None

    def __getitem__(self, rows: slice) -> Coefficients:
        return Coefficients(
            self.clm_C[rows],
            None if self.fusion_CM is None else self.fusion_CM[rows],
            None if self.gate is None else self.gate[rows],
        )

    def gated(self, nll_C: torch.Tensor) -> tuple[Coefficients, torch.Tensor | None]:
        """The coefficients at these NLLs of the labels, and the shares [C] that the gate kept."""
        if self.gate is None or self.fusion_CM is None:
            return self, None
        kept_C = self.gate.kept(nll_C)
        fusion_CM = self.fusion_CM.double()
        moved_C = (1.0 - kept_C) * fusion_CM.sum(-1)
        return Coefficients(self.clm_C.double() + moved_C, fusion_CM * kept_C[:, None]), kept_C


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
        gate: RowGate | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, softcap, divergence, chunk_rows = options
        ctx.dtypes = [t if t is None else t.dtype for t in (hidden_RH, weight_VH, bias_V)]
        hidden_RH = hidden_RH.to(product_dtype(hidden_RH))
        head = Head(weight_VH.to(hidden_RH.dtype), bias_V, scale, softcap)
        wide = torch.promote_types(hidden_RH.dtype, torch.float32)
        sources = None
        if entries is not None and fusion_RM is not None:
            sources = ChunkSources(*entries)
        coefficients = Coefficients(clm_R, fusion_RM, gate)
        num_rows, num_sources = len(hidden_RH), 0 if sources is None else sources.tail_CM.shape[1]
        nll_R = hidden_RH.new_empty(num_rows, dtype=wide)
        ce_RM = hidden_RH.new_empty((num_rows, num_sources), dtype=wide)
        kept_R = torch.ones_like(nll_R)
        total = hidden_RH.new_zeros((), dtype=torch.float64)
        grads = _Gradients(hidden_RH, weight_VH, bias_V, ctx.needs_input_grad[:3])
        buffer_CV = hidden_RH.new_empty((min(chunk_rows, num_rows), len(weight_VH)), dtype=wide)
        with torch.autocast(hidden_RH.device.type, enabled=False):
            for start in range(0, num_rows, chunk_rows):
                rows = slice(start, min(start + chunk_rows, num_rows))
                logits_CV = buffer_CV[: rows.stop - start]
                slope_CV = _write_logits(head, hidden_RH[rows], logits_CV)
                part = None if sources is None else sources[rows]
                found = losses_to_gradient(
                    logits_CV, labels_R[rows], coefficients[rows], part, divergence
                )
                nll_R[rows] = found.nll_C
                total += found.total
                if found.ce_CM is not None:
                    ce_RM[rows] = found.ce_CM
                if found.kept_C is not None:
                    kept_R[rows] = found.kept_C.to(wide)
                if any(ctx.needs_input_grad[:3]):
                    if slope_CV is not None:
                        logits_CV.mul_(slope_CV)
                    grads.add(logits_CV, rows, head)
        ctx.made = [grads.hidden_RH, grads.weight_VH, grads.bias_V]
        ctx.save_for_backward(ce_RM * kept_R[:, None])
        ctx.mark_non_differentiable(nll_R, ce_RM, kept_R)
        return total.to(wide), nll_R, ce_RM, kept_R

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
        (kept_ce_RM,) = ctx.saved_tensors
        of_fusion_RM = kept_ce_RM * grad_total if ctx.needs_input_grad[3] else None
        return (*scaled, of_fusion_RM, *(None,) * 5)


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


class ChunkLosses(NamedTuple):
    """Of the rows of a chunk.

    Args:
        total: sum(clm * nll) + sum(fusion * ce), after the gate.
        nll_C: NLL of the labels, nats.
        ce_CM: Divergences of the sources, nats; None without sources.
        kept_C: Share of its fusion coefficients that each row kept; None without a gate.
    """

    total: torch.Tensor
    nll_C: torch.Tensor
    ce_CM: torch.Tensor | None = None
    kept_C: torch.Tensor | None = None


def losses_to_gradient(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    coefficients: Coefficients,
    part: ChunkSources | None,
    divergence: Divergence,
) -> ChunkLosses:
    """Losses of a chunk. Overwrites `logits_CV` with the gradient of their total; coefficients that
    the gate moves are constants there."""
    temperature = divergence.target_temperature
    if part is None or temperature == 1.0:
        return _at_one_temperature(logits_CV, labels_C, coefficients, part, divergence)
    soft_CV = logits_CV / temperature
    of_labels = _at_one_temperature(logits_CV, labels_C, coefficients, None, divergence)
    fusion_CM = coefficients.gated(of_labels.nll_C)[0].fusion_CM
    alone = Coefficients(torch.zeros_like(coefficients.clm_C), fusion_CM)
    of_sources = _at_one_temperature(soft_CV, labels_C, alone, part, divergence)
    # d(T^2 D(z / T)) / dz = T * D'
    logits_CV.add_(soft_CV, alpha=temperature)
    square = temperature**2
    return ChunkLosses(
        of_labels.total + of_sources.total * square,
        of_labels.nll_C,
        None if of_sources.ce_CM is None else of_sources.ce_CM * square,
        of_labels.kept_C,
    )


def _at_one_temperature(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    coefficients: Coefficients,
    part: ChunkSources | None,
    divergence: Divergence,
) -> ChunkLosses:
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
    nll_C, ce_CM = -logq_CJ[:, 0], None
    coefficients, kept_C = coefficients.gated(nll_C)
    clm_C, fusion_CM = coefficients.clm_C.double(), coefficients.fusion_CM
    slope_CJ, total = -clm_C[:, None], (clm_C * nll_C).sum()
    if part is not None and present_CMK is not None and fusion_CM is not None:
        mass_CM = (slots.exp_CJ[:, 1:].view(present_CMK.shape) * present_CMK).sum(-1)
        classes = Classes(
            _sorted(part.probs_CMK.double()) if divergence.sorts else part.probs_CMK.double(),
            part.tail_CM.double(),
            q_CJ[:, 1:].view(present_CMK.shape) * present_CMK,
            logq_CJ[:, 1:].view(present_CMK.shape).masked_fill(~present_CMK, 0.0),
            ((slots.sum_C1 - mass_CM) / slots.sum_C1).clamp(min=MIN_TAIL),
        )
        ce_CM, slope_CMK = divergence.value_and_slope(classes)
        slope_CMK = slope_CMK * fusion_CM.double()[..., None]
        total = total + (fusion_CM.double() * ce_CM).sum()
        slope_CJ = torch.cat([slope_CJ, slope_CMK.flatten(1)], 1)
    # d / d z_j = [j is a slot] * slope - q_j * sum of slopes
    factor_C1 = -slope_CJ.sum(1, keepdim=True)
    logits_CV.mul_((factor_C1 / slots.sum_C1).to(wide))
    slots.put_back(logits_CV, index_CJ, slope_CJ + factor_C1 * q_CJ * slots.first_CJ)
    ce_CM = None if ce_CM is None else ce_CM.to(wide)
    return ChunkLosses(total, nll_C.to(wide), ce_CM, kept_C)


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
