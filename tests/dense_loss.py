"""The fusion loss in plain dense lines, for any divergence: what the fast passes are held against.

R rows, M sources, K entries, V vocabulary. Everything is float64 and differentiable; sources are
dense [R, V] targets, the tail is one more column.
"""

from __future__ import annotations

import torch

from fuse_train.divergences.divergence import Divergence
from fuse_train.divergences.reverse_kl import MIN_PROBABILITY
from fuse_train.losses.losses import SourceRows


def dense_logq(hidden, weight, bias=None, scale=1.0, cap=None, temperature=1.0):
    """log_softmax over the whole vocabulary."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return (logits / temperature).log_softmax(-1)


def classes_of(logq_RV, rows: SourceRows, m: int):
    """(p, log q) over V + 1 columns: entries where they stand, the tail last, others p = log q = 0.

    Also which columns are classes.
    """
    num_rows, vocab = logq_RV.shape
    ids_RK = rows.entry_ids_RMK[:, m].long()
    p = torch.zeros(num_rows, vocab + 1, dtype=torch.float64)
    is_class = torch.zeros(num_rows, vocab + 1, dtype=torch.bool)
    for r in range(num_rows):
        for k, token in enumerate(ids_RK[r].tolist()):
            if token >= 0:
                p[r, token] = rows.entry_probs_RMK[r, m, k].double()
                is_class[r, token] = True
    p[:, -1] = rows.tail_RM[:, m].double()
    is_class[:, -1] = True
    rest_R1 = (logq_RV.exp() * ~is_class[:, :-1]).sum(-1, keepdim=True).log()
    logq = torch.cat([torch.where(is_class[:, :-1], logq_RV, 0.0), rest_R1], 1)
    return p, logq, is_class


def sorted_classes(logq_RV, rows: SourceRows, m: int):
    """The same with the K most probable tokens of both sides beside each other."""
    p_RK = rows.entry_probs_RMK[:, m].double().sort(-1, descending=True).values
    logq_RK = logq_RV.topk(p_RK.shape[1]).values
    rest_R1 = (1 - logq_RK.exp().sum(-1, keepdim=True)).log()
    p = torch.cat([p_RK, rows.tail_RM[:, m : m + 1].double()], 1)
    return p, torch.cat([logq_RK, rest_R1], 1), torch.ones_like(p, dtype=torch.bool)


def dense_divergence(logq_RV, rows: SourceRows, m: int, kind: Divergence):
    """D [R] of source m, without the temperature's square."""
    made = sorted_classes if kind.name == "uld" else classes_of
    p, logq, is_class = made(logq_RV, rows, m)
    if kind.source_share is not None:
        share = kind.source_share
        power = p**share * logq.detach().exp() ** (1 - share) * (p > 0) * is_class
        p = power / power.sum(-1, keepdim=True)
    q = logq.exp() * is_class
    if kind.name == "cross_entropy":
        return -(p * logq).sum(-1)
    if kind.name == "kl":
        return (torch.xlogy(p, p) - p * logq).sum(-1)
    if kind.name == "reverse_kl":
        return (q * (logq - p.clamp(min=MIN_PROBABILITY).log())).sum(-1)
    if kind.name == "jsd":
        beta = kind.options
        mix = torch.where(is_class, beta * p + (1 - beta) * q, 1.0)
        of_source = torch.xlogy(p, p / mix).sum(-1)
        return beta * of_source + (1 - beta) * (q * (logq - mix.log())).sum(-1)
    if kind.name == "uld":
        return (p - q).abs().sum(-1)
    raise NotImplementedError(f"write the plain formula of divergence {kind.name} here")


def dense_total(hidden, weight, labels, clm, rows, fusion, kind: Divergence, **head):
    """sum(clm * nll) + T^2 * sum(fusion * D)."""
    logq = dense_logq(hidden, weight, **head)
    total = (clm * -logq[torch.arange(len(labels)), labels]).sum()
    temperature = kind.target_temperature
    soft = dense_logq(hidden, weight, **head, temperature=temperature)
    for m in range(rows.tail_RM.shape[1]):
        distance = dense_divergence(soft, rows, m, kind)
        total = total + temperature**2 * (fusion[:, m] * distance).sum()
    return total
