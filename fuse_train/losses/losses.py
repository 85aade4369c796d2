"""The loss of a fusion run, as sums over rows. No dense target and no [B, T, V] tensor exists.

What `head_loss` computes equals these plain lines, for row r with label y, coefficients a_r (ground
truth) and b_rm (source m), entries (id_k, p_k) and tail mass t_m of source m:

    logq   = log_softmax(head(hidden))                                    [R, V]
    nll_r  = -logq[r, y_r]
    S_rm   = sum_k exp(logq[r, id_rmk])
    ce_rm  = -sum_k p_rmk * logq[r, id_rmk] - t_rm * log(1 - S_rm)
    total  = sum_r a_r * nll_r + sum_rm b_rm * ce_rm

and because cross-entropy is linear in its first argument, sum_m w_m CE(P_m, Q) = CE(sum_m w_m P_m, Q):
the sources are never merged. Other divergences take the place of ce_rm (fuse_train/divergences/); they
are weighted source by source all the same: sum_m w_m D(P_m, Q).

Everything is a sum; callers divide once, by the count over all processes and micro-batches.

Shape suffixes: R rows (positions that have a label and logits), M sources, K entries, V vocabulary,
H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuse_train.divergences.divergence import Divergence
from fuse_train.losses.head_pass import MIN_TAIL as MIN_TAIL
from fuse_train.losses.head_pass import HeadPass
from fuse_train.losses.head_pass import RowGate as RowGate
from fuse_train.model.heads import Head, default_chunk_rows
from store_schema.presets import TailPolicy


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
        ce_RM: CE(P_m, Q) or the divergence in its place, nats, no gradient; None without sources.
        kept_R: Share of its coefficients of the sources that the gate left each row; 1 without one.
    """

    total: torch.Tensor
    nll_R: torch.Tensor
    ce_RM: torch.Tensor | None
    kept_R: torch.Tensor


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


def with_temperature(rows: SourceRows, temperature: float) -> SourceRows:
    """The same distributions softened: p^(1 / temperature), scaled to sum 1 again.

    Departure from a softmax of logits over the whole vocabulary (Hinton et al. 2015): the tail is one
    class, since nothing is known of its tokens. A row without mass stays as it is.

    Args:
        rows: After `with_tail_policy`.
        temperature: Above 0; 1 changes nothing.
    """
    if temperature == 1.0:
        return rows
    probs_RMK = rows.entry_probs_RMK.pow(1 / temperature)
    tail_RM = rows.tail_RM.pow(1 / temperature)
    mass_RM = probs_RMK.sum(-1) + tail_RM
    mass_RM = torch.where(mass_RM > 0, mass_RM, torch.ones_like(mass_RM))
    return SourceRows(rows.entry_ids_RMK, probs_RMK / mass_RM[..., None], tail_RM / mass_RM)


def row_coefficients(
    weights_RM: torch.Tensor, covered_RM: torch.Tensor, clm_weight: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of ground truth and of the sources at each row.

    A row that no source covers has the ground truth alone, with weight 1, so that it does not count
    less than covered rows.

    Args:
        weights_RM: Selector's weights, sum 1 on covered sources.
        covered_RM: bool.
        clm_weight: lambda, one for all rows or [R].

    Returns:
        clm_R and fusion_RM, coefficients of the row's NLL and of its divergences.
    """
    clm_R = torch.as_tensor(clm_weight, dtype=weights_RM.dtype, device=weights_RM.device)
    clm_R = torch.where(covered_RM.any(-1), clm_R, 1.0)
    return clm_R, (1.0 - clm_R)[:, None] * weights_RM


def importance_cv2(importance_M: torch.Tensor) -> torch.Tensor:
    """CV^2 = Var(I) / mean(I)^2 of the importance I_m, the sum of a source's weights over a batch.

    Source: Shazeer et al. 2017 (1701.06538), eq. 6; Fusion-X's feedback loss. The variance is the
    population's, so that one source gives 0.
    """
    mean = importance_M.mean()
    variance = ((importance_M - mean) ** 2).mean()
    return variance / mean.clamp(min=1e-12) ** 2


def head_loss(
    hidden_RH: torch.Tensor,
    head: Head,
    labels_R: torch.Tensor,
    clm_R: torch.Tensor,
    sources: SourceRows | None = None,
    fusion_RM: torch.Tensor | None = None,
    *,
    divergence: Divergence | None = None,
    chunk_rows: int | None = None,
    gate: RowGate | None = None,
) -> HeadLoss:
    """The sums that the module's docstring defines, with logits of `chunk_rows` rows at a time.

    Gradients are computed in the forward pass, chunk by chunk, and kept ([R, H] and [V, H]), so that
    only one chunk of logits is in memory and none is computed twice. What needs no gradient, such as a
    frozen head, gets none.

    Args:
        hidden_RH: Hidden states that predict the rows, float32, bfloat16 or float64.
        head: Output layer of the model.
        labels_R: Token ids, int64.
        clm_R: Coefficients a of the ground truth, no gradient.
        sources: Distributions, or None for ground truth alone.
        fusion_RM: Coefficients b of the sources; may need a gradient.
        divergence: None is cross-entropy.
        chunk_rows: Rows whose logits are in memory at one time; None chooses.
        gate: Moves coefficients of the sources to the ground truth, row by row.

    Returns:
        Sums and rows; `ce_RM` holds `divergence`.

    Source: FuseLLM (2401.10491) eq. 5-6 with D = CE. Departures: several weighted sources; the tail
    is a class of its own unless `with_tail_policy` removed it.
    """
    if sources is None or fusion_RM is None:
        sources = fusion_RM = None
    entries = sources and (sources.entry_ids_RMK, sources.entry_probs_RMK, sources.tail_RM)
    chunk = chunk_rows or default_chunk_rows(len(head.weight_VH), hidden_RH.device)
    total, nll_R, ce_RM, kept_R = HeadPass.apply(  # type: ignore[no-untyped-call]
        hidden_RH,
        head.weight_VH,
        head.bias_V,
        fusion_RM,
        clm_R.detach(),
        labels_R,
        entries,
        (head.scale, head.softcap, divergence or Divergence(), chunk),
        gate,
    )
    return HeadLoss(total, nll_R, ce_RM if sources is not None else None, kept_R)
