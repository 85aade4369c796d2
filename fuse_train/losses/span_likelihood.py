"""Loss on the likelihood of common spans: two models' probabilities of the same bytes are compared.

A span is the text between two boundaries that both tokenizations share. Its probability under the
target is the product over the target's tokens; under the source it is stored in the aligned store. So
no token of one vocabulary is ever compared with a token of the other.

Shape suffixes: B segments, T rows, M sources, R rows with a label and logits, S spans of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuse_train.selectors.hedge import PROBABILITY_FLOOR

NO_SPAN = -1
LEAST_NATS = 1e-6
"""Least NLL of a span: keeps 1 - p above 0."""


@dataclass(frozen=True, slots=True)
class SpanBatch:
    """Spans of a batch's rows.

    Args:
        index_BTM: int32 span within the segment, -1 on padding, for end-of-sequence, and for sources
            without spans in the segment.
        logprobs_BTM: float32 nats of that whole span under the source, NaN where not known.
    """

    index_BTM: torch.Tensor
    logprobs_BTM: torch.Tensor


@dataclass(frozen=True, slots=True)
class SpanRows:
    """Spans of the rows of a batch that have a label.

    Args:
        number_RM: Span of each row and source, numbered over the batch, -1 for none.
        source_S: The source's log-probability of each span, nats.
        rows_S: Rows of each span; 0 for spans that do not count.
    """

    number_RM: torch.Tensor
    source_S: torch.Tensor
    rows_S: torch.Tensor


def span_rows(spans: SpanBatch, at: tuple[torch.Tensor, torch.Tensor]) -> SpanRows:
    """The spans of the labelled rows; one counts if all its rows have a label and it has a probability.

    Args:
        spans: Spans of a batch.
        at: Segment and row indices of the labelled rows.
    """
    index_BTM = spans.index_BTM.long()
    num_segments, _, num_sources = index_BTM.shape
    per_segment = int(index_BTM.max()) + 1 if index_BTM.numel() else 0
    device = index_BTM.device
    base_B1M = torch.arange(num_segments * num_sources, device=device).view(num_segments, 1, -1)
    number_BTM = base_B1M * per_segment + index_BTM
    number_BTM = number_BTM.masked_fill(index_BTM < 0, NO_SPAN)
    number_RM, size = number_BTM[at], num_segments * num_sources * per_segment
    in_text_S = torch.bincount(number_BTM[number_BTM >= 0], minlength=size)
    labelled_S = torch.bincount(number_RM[number_RM >= 0], minlength=size)
    source_S = torch.full((size,), torch.nan, device=device)
    nats_RM = spans.logprobs_BTM[at].clamp(min=PROBABILITY_FLOOR)
    source_S[number_RM[number_RM >= 0]] = nats_RM[number_RM >= 0]
    counts_S = (in_text_S == labelled_S) & ~source_S.isnan()
    return SpanRows(number_RM, source_S, torch.where(counts_S, labelled_S, 0))


def span_loss(
    nll_R: torch.Tensor, weights_RM: torch.Tensor, spans: SpanRows, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over spans and sources of w * D(p, q), with D between Bernoulli distributions.

        p = exp(source's nats / temperature), q = exp(target's nats / temperature)
        D = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

    and w the mean of the source's weights over the rows of the span.

    Args:
        nll_R: NLL of the labels under the target, nats.
        weights_RM: The selector's; may need a gradient.
        spans: Spans of the same rows.
        temperature: Above 0; the larger, the more equally short and long spans count.

    Returns:
        The sum, with a gradient to the weights alone, and its slope to `nll_R`.

    Source: ALM (2503.20083), with f the Kullback-Leibler divergence. Departures: spans as the
    store has them (the finest common ones); several weighted sources.
    """
    rows_S = spans.rows_S
    here_RM = spans.number_RM >= 0
    here_RM = (
        here_RM & (rows_S[spans.number_RM.clamp(min=0)] > 0) if len(rows_S) else here_RM & False
    )
    row_E, source_E = torch.nonzero(here_RM, as_tuple=True)
    number_E = spans.number_RM[here_RM]
    nll_R = nll_R.detach().double().requires_grad_()
    zeros_S = nll_R.new_zeros(len(rows_S))
    with torch.enable_grad():
        target_S = zeros_S.index_add(0, number_E, -nll_R[row_E])
        known_S = rows_S > 0
        source_S = torch.where(known_S, spans.source_S, -1.0).double()
        distance_S = torch.where(known_S, _binary_kl(source_S, target_S, temperature), 0.0)
        weight_E = weights_RM[row_E, source_E].double() / rows_S[number_E]
        weight_S = zeros_S.index_add(0, number_E, weight_E)
        (slope_R,) = torch.autograd.grad((weight_S.detach() * distance_S).sum(), nll_R)
        total = (weight_S * distance_S.detach()).sum()
    return total.to(weights_RM.dtype), slope_R.to(weights_RM.dtype)


def _binary_kl(source_S: torch.Tensor, target_S: torch.Tensor, temperature: float) -> torch.Tensor:
    logp_S = source_S.clamp(max=-LEAST_NATS) / temperature
    logq_S = target_S.clamp(max=-LEAST_NATS) / temperature
    log_not_p_S, log_not_q_S = (-torch.expm1(logp_S)).log(), (-torch.expm1(logq_S)).log()
    p_S = logp_S.exp()
    return p_S * (logp_S - logq_S) + (1 - p_S) * (log_not_p_S - log_not_q_S)
