"""Samples collated to tensors. Everything is indexed by ROW; the one shift of the project is here.

Shape suffixes: B segments (of inputs: rows of input), S segments where the two differ, L input
positions, T rows, M sources, K entries, F features, R rows with a label and logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fuse_train.data.samples import Sample
from fuse_train.data.span_batch import collate_spans, has_spans
from fuse_train.losses.losses import SourceRows
from fuse_train.losses.span_likelihood import SpanBatch
from fuse_train.selectors.features import FEATURES
from fuse_train.selectors.hedge import past_of
from fuse_train.selectors.pools import span_sums
from fuse_train.selectors.selectors import SourceView
from store_schema.layout import Origin
from store_schema.text.encoded import token_lengths
from store_schema.text.prefixes import prefix_groups

IGNORED = -1
"""Predicting position of a row that nothing predicts, and id of a padding entry."""


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """The sources' distributions of the rows.

    Args:
        entry_ids_BTMK: int32, -1 where there is no entry.
        entry_probs_BTMK: float32, 0 where there is no entry.
        tail_BTM: float32 mass outside the entries; 1 where not covered.
        covered_BTM: bool, whether there are entries.
        label_logprobs_BTM: float32 nats, NaN where not known.
        features_BTMF: float32, see features.py; F is 0 where the selector needs none.
        source_bpb_BM: float32 bits per byte of the segment, inf where not known.
        begins_BT: bool, rows where no source is inside one of its tokens (see pools.py); None is all.
        author_B: int64, the source that wrote a segment, -1 for none; None where none wrote any.
    """

    entry_ids_BTMK: torch.Tensor
    entry_probs_BTMK: torch.Tensor
    tail_BTM: torch.Tensor
    covered_BTM: torch.Tensor
    label_logprobs_BTM: torch.Tensor
    features_BTMF: torch.Tensor
    source_bpb_BM: torch.Tensor
    begins_BT: torch.Tensor | None = None
    author_B: torch.Tensor | None = None

    @property
    def view(self) -> SourceView:
        """What a selector may read; of labels, only those of earlier rows."""
        past_BTM = past_of(self.label_logprobs_BTM)
        return SourceView(
            self.covered_BTM,
            self.features_BTMF,
            self.source_bpb_BM,
            past_BTM,
            self.begins_BT,
            self.author_B,
        )

    def rows(self, where: tuple[torch.Tensor, torch.Tensor]) -> SourceRows:
        """Distributions of the rows at indices `where` (segment, row)."""
        return SourceRows(
            self.entry_ids_BTMK[where], self.entry_probs_BTMK[where], self.tail_BTM[where]
        )


@dataclass(frozen=True, slots=True)
class Packs:
    """Where each segment is in the rows of input, in a batch whose segments share rows.

    Args:
        position_ids_BL: int64, from 0 in each segment; 0 on padding. None where a row holds one input,
            which other segments share only as prefixes of it.
        row_S: int64 row of input of each segment.
        start_S: int64 input position of each segment's first token.
    """

    position_ids_BL: torch.Tensor | None
    row_S: torch.Tensor
    start_S: torch.Tensor

    def of_all(self, groups: Sequence[Sequence[int]]) -> Packs:
        """The places of all segments, from those of the first of each group, whose prefixes the rest
        of the group are."""
        group_S = np.empty(sum(map(len, groups)), np.int64)
        for g, members in enumerate(groups):
            group_S[list(members)] = g
        return Packs(self.position_ids_BL, self.row_S[group_S], self.start_S[group_S])


@dataclass(frozen=True, slots=True)
class Batch:
    """Some segments, padded to the longest.

    Args:
        input_ids_BL: int64 context and tokens, padded on the right.
        predicted_by_BT: int64 input position, from the segment's start, whose logits predict row i; -1
            where none does.
        labels_BT: int64 tokens, 0 on padding.
        label_bytes_BT: int64 bytes of each label, 0 on padding and for end-of-sequence.
        domains_B: int64 index into `domains`.
        domains: Names.
        segment_ids: For messages.
        sources: None for ground truth alone.
        packs: Rows of input that segments share, as prefixes of one another or packed one after the
            other; None where every segment has a row of input of its own.
        spans: Spans that sources and target share, if they were loaded.
        weights_B: float32 loss weight of each segment in its stage; None is 1 for each.
    """

    input_ids_BL: torch.Tensor
    predicted_by_BT: torch.Tensor
    labels_BT: torch.Tensor
    label_bytes_BT: torch.Tensor
    domains_B: torch.Tensor
    domains: tuple[str, ...]
    segment_ids: tuple[str, ...]
    sources: SourceBatch | None
    packs: Packs | None = None
    spans: SpanBatch | None = None
    weights_B: torch.Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Rows that have a label and something that predicts them."""
        return int((self.predicted_by_BT >= 0).sum())

    def label_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment and row indices of those rows, [R] each."""
        segment_R, row_R = torch.nonzero(self.predicted_by_BT >= 0, as_tuple=True)
        return segment_R, row_R

    def predicted_from(
        self, at: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position of input whose hidden states predict the rows at indices `at`."""
        position_R = self.predicted_by_BT[at]
        if self.packs is None:
            return at[0], position_R
        return self.packs.row_S[at[0]], self.packs.start_S[at[0]] + position_R


def predicting_positions(
    context_lengths: Sequence[int], num_rows: Sequence[int]
) -> npt.NDArray[np.int64]:
    """THE shift: which input position's logits are the model's distribution of each row.

    Row i is the distribution OF token i given what is before it. A model's logits at input position
    j predict the token at j + 1. With C context tokens, token i is at input position C + i, so row i
    is compared with the logits at C + i - 1. A first token without context is predicted by no logits,
    and is left out of every loss and every score.

    Args:
        context_lengths: C of each segment.
        num_rows: Rows of each segment.

    Returns:
        [B, T] int64, -1 where nothing predicts the row and on padding.
    """
    context_B1 = np.asarray(context_lengths, np.int64)[:, None]
    rows_T = np.arange(max(num_rows, default=0))
    position_BT = context_B1 + rows_T - 1
    position_BT[rows_T >= np.asarray(num_rows)[:, None]] = IGNORED
    return position_BT


def padded_inputs(inputs: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Token ids as one array [B, L], padded on the right with 0, where causal attention never looks."""
    out_BL = np.zeros((len(inputs), max(1, *map(len, inputs))), np.int64)
    for row_L, ids in zip(out_BL, inputs, strict=True):
        row_L[: len(ids)] = ids
    return out_BL


def collate(
    samples: Sequence[Sample],
    domains: Sequence[str],
    *,
    with_entries: bool = True,
    pack_tokens: int | None = None,
    weights: Sequence[float] | None = None,
) -> Batch:
    """One batch of samples.

    Args:
        samples: At least one; all with sources or all without.
        domains: Names of all domains of the run.
        with_entries: False leaves the distributions empty (K = 0), for scoring pools.
        pack_tokens: Most tokens of a row of input that segments share; None gives each its own.
        weights: Loss weight of each sample; None is 1 for each.
    """
    labels = [sample.labels for sample in samples]
    num_rows = [len(ids) for ids in labels]
    position_BT = predicting_positions([len(s.context_ids) for s in samples], num_rows)
    # The last label predicts nothing, so it is no input; but each row has at least one input token.
    inputs = [
        np.concatenate([np.asarray(s.context_ids, np.int64), ids])[
            : len(s.context_ids) + len(ids) - 1 or 1
        ]
        for s, ids in zip(samples, labels, strict=True)
    ]
    groups = prefix_groups(inputs)
    sources, packs, rows = None, None, [inputs[longest] for longest, *_ in groups]
    if pack_tokens is not None:
        rows, packs = pack(rows, pack_tokens)
    elif len(rows) < len(inputs):
        starts = torch.zeros(len(rows), dtype=torch.int64)
        packs = Packs(None, torch.arange(len(rows)), starts)
    if packs is not None:
        packs = packs.of_all(groups)
    if samples[0].shard.sources:
        sources = _sources(samples, position_BT.shape[1], with_entries)
    return Batch(
        torch.from_numpy(padded_inputs(rows)),
        torch.from_numpy(position_BT),
        torch.from_numpy(padded_inputs(labels)),
        torch.from_numpy(_label_bytes(samples, position_BT.shape)),
        torch.tensor([domains.index(s.segment.domain) for s in samples]),
        tuple(domains),
        tuple(s.segment.segment_id for s in samples),
        sources,
        packs,
        collate_spans(samples, position_BT.shape[1]) if has_spans(samples[0]) else None,
        None if weights is None else torch.tensor(weights, dtype=torch.float32),
    )


def pack(
    inputs: Sequence[npt.NDArray[np.int64]], max_tokens: int
) -> tuple[list[npt.NDArray[np.int64]], Packs]:
    """Put inputs one after the other into rows, first fit by decreasing length.

    Position ids begin with 0 in each segment, by which attention separates them; padding is all 0, so
    that it belongs to none.

    Args:
        inputs: Token ids of each segment, at least one.
        max_tokens: Most tokens of a row; a longer input has a row of its own.

    Returns:
        Token ids of each row, and the places of the segments in them.
    """
    room: list[int] = []
    members: list[list[int]] = []
    row_S, start_S = np.zeros(len(inputs), np.int64), np.zeros(len(inputs), np.int64)
    for s in sorted(range(len(inputs)), key=lambda s: -len(inputs[s])):
        size = len(inputs[s])
        row = next((row for row, left in enumerate(room) if left >= size), len(room))
        if row == len(room):
            room.append(max(max_tokens, size))
            members.append([])
        start_S[s] = sum(len(inputs[other]) for other in members[row])
        row_S[s] = row
        members[row].append(s)
        room[row] -= size
    rows = [np.concatenate([inputs[s] for s in row]) for row in members]
    positions = [np.concatenate([np.arange(len(inputs[s])) for s in row]) for row in members]
    packs = Packs(
        torch.from_numpy(padded_inputs(positions)),
        torch.from_numpy(row_S),
        torch.from_numpy(start_S),
    )
    return rows, packs


def _label_bytes(samples: Sequence[Sample], shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    out_BT = np.zeros(shape, np.int64)
    for row_T, sample in zip(out_BT, samples, strict=True):
        row_T[: sample.num_tokens] = token_lengths(sample.shard.byte_ends[sample.rows])
    return out_BT


def _sources(samples: Sequence[Sample], width: int, with_entries: bool) -> SourceBatch:
    size = (len(samples), width, len(samples[0].shard.sources))
    counts_BTM = np.zeros(size, np.int64)
    tail_BTM = np.ones(size, np.float32)
    labels_BTM = np.full(size, np.nan, np.float32)
    has_features = samples[0].shard.features_NMF is not None
    features_BTMF = np.zeros((*size, len(FEATURES) if has_features else 0), np.float32)
    bpb_BM = np.full((size[0], size[2]), np.inf, np.float32)
    begins_BT = np.ones(size[:2], bool)
    for b, sample in enumerate(samples):
        n, rows = sample.num_tokens, sample.rows
        if sample.shard.features_NMF is not None:
            features_BTMF[b, :n] = sample.shard.features_NMF[rows]
        for m, arrays in enumerate(sample.shard.sources):
            counts_BTM[b, :n, m] = np.diff(arrays["entry_offsets"][rows.start : rows.stop + 1])
            tail_BTM[b, :n, m] = arrays["tail_mass"][rows]
            labels_BTM[b, :n, m] = arrays["label_logprobs"][rows]
            begins_BT[b, :n] &= arrays["origin"][rows] != Origin.INSIDE
            num_bytes = arrays["source_bytes"][sample.index]
            if num_bytes > 0:
                bpb_BM[b, m] = arrays["source_nats"][sample.index] / num_bytes / np.log(2)
    ids_BTMK, probs_BTMK = _entries(samples, counts_BTM, with_entries)
    author_B = np.array([sample.author for sample in samples], np.int64)
    distributions = (ids_BTMK, probs_BTMK, tail_BTM, counts_BTM > 0)
    arrays_out = (*distributions, labels_BTM, features_BTMF, bpb_BM, begins_BT)
    batch = SourceBatch(*(torch.from_numpy(array) for array in arrays_out))
    if (author_B < 0).all():
        return batch
    return replace(batch, author_B=torch.from_numpy(author_B))


def _entries(
    samples: Sequence[Sample], counts_BTM: npt.NDArray[np.int64], with_entries: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """CSR rows of all samples as padded arrays, filled by one mask per source."""
    width = int(counts_BTM.max(initial=0)) if with_entries else 0
    ids_BTMK = np.full((*counts_BTM.shape, width), IGNORED, np.int32)
    probs_BTMK = np.zeros(ids_BTMK.shape, np.float32)
    for m in range(counts_BTM.shape[2] if width else 0):
        ids, logprobs = [], []
        for sample in samples:
            arrays = sample.shard.sources[m]
            offsets = arrays["entry_offsets"]
            part = slice(int(offsets[sample.rows.start]), int(offsets[sample.rows.stop]))
            ids.append(arrays["entry_ids"][part])
            logprobs.append(arrays["entry_logprobs"][part])
        # Row-major order of the mask is segment, row, entry: the order the CSR rows are in.
        filled_BTK = np.arange(width) < counts_BTM[:, :, m, None]
        ids_BTMK[:, :, m][filled_BTK] = np.concatenate(ids)
        probs_BTMK[:, :, m][filled_BTK] = np.exp(np.concatenate(logprobs))
    return ids_BTMK, probs_BTMK


def whole_spans(batch: Batch) -> torch.Tensor:
    """First rows (bool [B, T]) of the spans that pools are scored on: those in which every source
    knows the probability of every label, and whose first row some source covers."""
    sources = sources_of(batch)
    unknown_BT = sources.label_logprobs_BTM.isnan().any(-1)
    whole_BT = span_sums(unknown_BT.long(), sources.begins_BT) == 0
    some_BT = span_sums(batch.label_bytes_BT, sources.begins_BT) > 0
    return whole_BT & some_BT & sources.covered_BTM.any(-1)


def sources_of(batch: Batch) -> SourceBatch:
    """The sources of a batch that has some."""
    if batch.sources is None:
        raise TypeError("batches of ground truth alone have no pool")
    return batch.sources


Moved = TypeVar("Moved", bound=Batch | SourceBatch | Packs | SpanBatch)


def to_device(batch: Moved, device: torch.device) -> Moved:
    """The batch with every tensor on `device`."""
    moved: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, SourceBatch | Packs | SpanBatch):
            moved[field.name] = to_device(value, device)
    return replace(batch, **moved)
