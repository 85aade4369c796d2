"""The positions of one segment: a forward pass, and the terms of the loss at each row.

Shape suffixes: B segments (one), T rows, M sources, R rows with a label, K entries, H hidden, J tokens
that are shown, G domains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fuse_train.data.batch import collate, sources_of, to_device
from fuse_train.data.samples import Sample
from fuse_train.loop.likelihood import label_nats
from fuse_train.loop.objective import FusionObjective, label_reference, select
from fuse_train.losses.losses import SourceRows, row_coefficients
from fuse_train.model.heads import Head, default_chunk_rows, head_of, hidden_states
from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from store_schema.text.vocabulary import Vocabulary

SHOWN = 3
"""Most probable tokens shown of target and pool."""


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most probable tokens.

    Args:
        token_id: In the target's vocabulary.
        data: Its bytes; of a special token its text.
        probability: Under the target or the pool.
    """

    token_id: int
    data: bytes
    probability: float


@dataclass(frozen=True, slots=True)
class Position:
    """One token of the text (the label), and what target and pool predict in its place.

    Args:
        index: Row within the segment.
        start: First byte in the segment's text.
        end: One past its last byte; equal to `start` for the end-of-sequence token.
        token_id: In the target's vocabulary.
        data: Its bytes; of a special token its text.
        target_nats: NLL under the target; None where nothing predicts the row.
        pool_nats: NLL under the pool; None where no source with a weight has a probability for it.
        weights: Weight of each source, sum 1; all 0 where none covers the row.
        fusion_weight: 1 - lambda: weight of the fusion loss at the row; the rest is ground truth.
        begins: False where a source is inside one of its tokens, and so hardly uncertain of the label.
        target_top: The target's most probable tokens, best first.
        pool_top: The pool's, of the entries as stored.
    """

    index: int
    start: int
    end: int
    token_id: int
    data: bytes
    target_nats: float | None = None
    pool_nats: float | None = None
    weights: tuple[float, ...] = ()
    fusion_weight: float = 0.0
    begins: bool = True
    target_top: tuple[TopToken, ...] = ()
    pool_top: tuple[TopToken, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether a source has a weight here."""
        return any(self.weights)

    @property
    def ahead_nats(self) -> float | None:
        """Target's NLL minus the pool's; None where one is not known."""
        if self.target_nats is None or self.pool_nats is None:
            return None
        return self.target_nats - self.pool_nats


@torch.no_grad()
def explain_sample(
    objective: FusionObjective, sample: Sample, domains: tuple[str, ...], vocabulary: Vocabulary
) -> tuple[Position, ...]:
    """Every position of a sample.

    Args:
        objective: Target and selector, in evaluation mode, with the step's weights and shares.
        sample: With sources.
        domains: Names of all domains of the run.
        vocabulary: The target's.
    """
    model: Any = objective.model
    if objective.selector is None:
        raise TypeError("a pool needs a selector")
    batch = to_device(collate([sample], domains), model.device)
    sources, at = sources_of(batch), batch.label_rows()
    weights_RM = select(objective.selector, sources.view)[1][at]
    logprobs_RM = sources.label_logprobs_BTM[at].clamp(min=PROBABILITY_FLOOR)
    _, fusion_RM = row_coefficients(
        weights_RM, sources.covered_BTM[at], objective.weights.clm_weight
    )
    hidden_RH = hidden_states(model, batch.input_ids_BL)[batch.predicted_from(at)]
    head = head_of(model, where=str(model.config.name_or_path))
    chunk = objective.section.head_chunk_rows
    nll_R = label_nats(hidden_RH, head, batch.labels_BT[at], chunk)
    fusion_R = fusion_RM.double().sum(-1)
    gate = objective.row_gate(batch, at, weights_RM, logprobs_RM)
    if gate is not None:
        fusion_R *= gate.kept(nll_R)
    columns = zip(
        at[1].tolist(),
        nll_R.tolist(),
        label_reference(weights_RM, logprobs_RM, None).tolist(),
        weights_RM.tolist(),
        fusion_R.tolist(),
        _target_top(hidden_RH, head, chunk),
        pool_top(sources.rows(at), weights_RM, SHOWN),
        strict=True,
    )
    positions = _unknown(sample, vocabulary)
    begins_T = None if sources.begins_BT is None else sources.begins_BT[0].tolist()
    for row, target_nats, pool_nats, weights, fusion, target, pool in columns:
        positions[row] = replace(
            positions[row],
            target_nats=target_nats,
            pool_nats=None if pool_nats != pool_nats else pool_nats,
            weights=tuple(weights),
            fusion_weight=fusion,
            begins=begins_T is None or bool(begins_T[row]),
            target_top=_top_tokens(target, vocabulary),
            pool_top=_top_tokens(pool, vocabulary),
        )
    return tuple(positions)


def _unknown(sample: Sample, vocabulary: Vocabulary) -> list[Position]:
    """The positions of a sample, without figures."""
    text = sample.segment.text.encode()
    ends = [*sample.shard.byte_ends[sample.rows].tolist()]
    positions, start = [], 0
    for index, token in enumerate(sample.labels.tolist()):
        end = ends[index] if index < len(ends) else start
        data = text[start:end] or vocabulary.spelling(token)
        weights = (0.0,) * len(sample.shard.sources)
        positions.append(Position(index, start, end, token, data, weights=weights))
        start = end
    return positions


def _target_top(
    hidden_RH: torch.Tensor, head: Head, chunk_rows: int | None
) -> list[list[tuple[int, float]]]:
    """The target's most probable tokens [R][J], best first, logits of some rows at a time."""
    chunk = chunk_rows or default_chunk_rows(len(head.weight_VH), hidden_RH.device)
    tops: list[list[tuple[int, float]]] = []
    for part_RH in torch.split(hidden_RH, chunk):
        best = head.logits(part_RH).softmax(-1).topk(min(SHOWN, len(head.weight_VH)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        tops += [list(zip(ids, probs, strict=True)) for ids, probs in pairs]
    return tops


def pool_top(
    rows: SourceRows, weights_RM: torch.Tensor, count: int
) -> list[list[tuple[int, float]]]:
    """The most probable tokens of sum_m w_m P_m, row by row, among the entries.

    Args:
        rows: Distributions of the sources.
        weights_RM: Weights of the sources.
        count: Most tokens of a row; tokens without probability are left out.

    Returns:
        [R] lists of (id, probability), best first, ties by lower id.
    """
    mass_RMK = weights_RM.double()[..., None] * rows.entry_probs_RMK.double()
    tops = []
    for ids_MK, mass_MK in zip(
        rows.entry_ids_RMK.cpu().numpy(), mass_RMK.cpu().numpy(), strict=True
    ):
        there_MK = mass_MK > 0
        ids, place = np.unique(ids_MK[there_MK], return_inverse=True)
        sums = np.bincount(place, mass_MK[there_MK], len(ids))
        best = np.argsort(-sums, kind="stable")[:count]
        tops.append(list(zip(ids[best].tolist(), sums[best].tolist(), strict=True)))
    return tops


def _top_tokens(pairs: list[tuple[int, float]], vocabulary: Vocabulary) -> tuple[TopToken, ...]:
    return tuple(TopToken(i, vocabulary.spelling(i), p) for i, p in pairs)
