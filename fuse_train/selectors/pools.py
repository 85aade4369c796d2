"""Pools of sources with different tokenizers: where their probabilities may be mixed.

Inside a source's token its aligned rows are not what it would predict there: the NLL of the whole token
is at the row where it begins, and much of the alternatives' mass is in the tail. Only products over
whole tokens are the source's own probabilities. So a pool mixes spans: a span begins where no source is
inside one of its tokens, its weights are those of its first row, and

    p(span) = sum_m w_m prod over rows of the span p_m(label)

Mixed row by row, a selector could leave a source where its token begins and return inside the token,
where its NLL is near 0: the pool's NLL would be lower than any of them can predict. With one tokenizer
for all, every row is a span and the pool is a true probability of the text. With several a small bias
is left: the start of a span tells that no source took a longer token, for which a selector that changes
source there need not account.

Shape suffixes: B segments, T rows, M sources.
"""

from __future__ import annotations

import torch

Begins = torch.Tensor | None
"""Rows [B, T] where a span begins; None is every row."""


def first_rows(begins_BT: torch.Tensor) -> torch.Tensor:
    """First row [B, T] int64 of each row's span; row 0 always begins one."""
    rows_T = torch.arange(begins_BT.shape[1], device=begins_BT.device)
    return torch.where(begins_BT, rows_T, 0).cummax(1).values


def hold_over_spans(weights_BTM: torch.Tensor, begins_BT: Begins) -> torch.Tensor:
    """The weights of each span's first row on all of its rows."""
    if begins_BT is None:
        return weights_BTM
    return weights_BTM.gather(1, first_rows(begins_BT)[..., None].expand(weights_BTM.shape))


def span_sums(values_BT: torch.Tensor, begins_BT: Begins) -> torch.Tensor:
    """Sums over spans, at their first rows; 0 at other rows. Also of [B, T, M] values."""
    if begins_BT is None:
        return values_BT
    first = first_rows(begins_BT)
    if values_BT.ndim == 3:
        first = first[..., None].expand(values_BT.shape)
    return torch.zeros_like(values_BT).scatter_add(1, first, values_BT)


def pool_nats(
    weights_BTM: torch.Tensor, label_logprobs_BTM: torch.Tensor, begins_BT: Begins
) -> torch.Tensor:
    """NLL of each span under the weighted pool, at its first row.

    As in `label_pool_nll` only sources that know all of a span's labels take part.

    Args:
        weights_BTM: Weights; only those of first rows are used.
        label_logprobs_BTM: Nats, NaN where not known.
        begins_BT: bool, rows where a span begins.

    Returns:
        [B, T] nats; 0 at other rows, and where no source with a weight knows the labels.
    """
    totals_BTM = span_sums(label_logprobs_BTM, begins_BT)
    if begins_BT is None:
        begins_BT = torch.ones_like(totals_BTM[..., 0], dtype=torch.bool)
    at_BT = first_rows(begins_BT) == torch.arange(begins_BT.shape[1], device=begins_BT.device)
    nats_BT = totals_BTM.new_zeros(begins_BT.shape)
    nats_BT[at_BT] = label_pool_nll(weights_BTM[at_BT], totals_BTM[at_BT])
    return nats_BT


def label_pool_nll(weights_RM: torch.Tensor, label_logprobs_RM: torch.Tensor) -> torch.Tensor:
    """NLL of the label under the weighted pool, -log sum_m w_m p_m(label), row by row.

    Only sources that know the label's probability take part, with weights scaled to sum 1. This is a
    proper score of the weights.

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
