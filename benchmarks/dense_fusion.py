"""FuseLLM's way of fusing, as its paper and public code have it: our plain reading, not its code.

The collator turns each source's stored top-k logits into a dense target over the vocabulary, position
by position in Python: softmax over the k, written at their ids into a row of zeros (the rest of the
mass is lost). Targets of all sources are [B, T, V]. The loss weighs them (AvgCE: softmax of exp(-CE)
of the sequence; MinCE would stack them first and need more memory) into one dense target, and takes
cross-entropy of full logits with it, beside the ground truth's.

    collate:  4 sources, 32k ids, 2,048 positions -> 4 x 268 MB
    loss:     lambda * CE(label) + (1 - lambda) * CE(sum_m w_m P_m)

Departures, all in its favour: float32 at once instead of lists of Python numbers, entries as arrays,
no padding. `dense_total` is another thing: the fused loss that ours computes (tail as a bucket), in
dense lines for any precision, what gradient errors are measured against.

Shape suffixes: B segments, T positions, R = B * T rows, M sources, K entries, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, softmax

from fuse_train.losses.losses import MIN_TAIL, SourceRows


@dataclass(frozen=True, slots=True)
class StoredLogits:
    """What FuseLLM's data set holds of one source.

    Args:
        ids_BTK: Token ids of the top k.
        logits_BTK: Their logits.
        ce_B: Mean NLL of each sequence.
    """

    ids_BTK: torch.Tensor
    logits_BTK: torch.Tensor
    ce_B: torch.Tensor


def collate(sources: list[StoredLogits], vocab_size: int) -> list[torch.Tensor]:
    """Dense targets [B, T, V] float32, one for each source."""
    targets = []
    for source in sources:
        num_segments, num_tokens, _ = source.ids_BTK.shape
        target_BTV = torch.zeros(num_segments, num_tokens, vocab_size)
        for b in range(num_segments):
            for t in range(num_tokens):
                probs_K = softmax(source.logits_BTK[b, t], dim=-1)
                target_BTV[b, t].scatter_(-1, source.ids_BTK[b, t], probs_K)
        targets.append(target_BTV)
    return targets


def loss(
    logits_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    targets: list[torch.Tensor],
    ce_MB: torch.Tensor,
    clm_weight: float,
) -> torch.Tensor:
    """Mean over positions of ground truth and fusion."""
    vocab_size = logits_BTV.shape[-1]
    weights_MB = softmax(torch.exp(-ce_MB), dim=0)
    target_BTV = weights_MB[0][:, None, None] * targets[0]
    for weight_B, other_BTV in zip(weights_MB[1:], targets[1:], strict=True):
        target_BTV = target_BTV + weight_B[:, None, None] * other_BTV
    flat_RV = logits_BTV.view(-1, vocab_size)
    clm = cross_entropy(flat_RV, labels_BT.flatten())
    fusion = cross_entropy(flat_RV, target_BTV.view(-1, vocab_size))
    return clm_weight * clm + (1 - clm_weight) * fusion


def dense_total(
    logits_RV: torch.Tensor,
    labels_R: torch.Tensor,
    clm_R: torch.Tensor,
    rows: SourceRows,
    fusion_RM: torch.Tensor,
) -> torch.Tensor:
    """sum(clm * nll) + sum(fusion * CE with a bucket for the tail), in the dtype of the logits."""
    logq_RV = logits_RV.log_softmax(-1)
    target_RV = torch.zeros_like(logq_RV)
    target_RV.scatter_(1, labels_R[:, None], clm_R[:, None].to(logq_RV.dtype))
    total = logq_RV.new_zeros(())
    for m in range(fusion_RM.shape[1]):
        ids_RK = rows.entry_ids_RMK[:, m].long()
        weight_R = fusion_RM[:, m].to(logq_RV.dtype)
        mass_RK = rows.entry_probs_RMK[:, m].to(logq_RV.dtype) * weight_R[:, None]
        target_RV.scatter_add_(1, ids_RK, mass_RK)
        inside_RV = torch.zeros_like(logq_RV, dtype=torch.bool).scatter_(1, ids_RK, True)
        rest_R = logq_RV.exp().masked_fill(inside_RV, 0.0).sum(-1).clamp(min=MIN_TAIL)
        total = total - (weight_R * rows.tail_RM[:, m].to(logq_RV.dtype) * rest_R.log()).sum()
    return total - (target_RV * logq_RV).sum()
