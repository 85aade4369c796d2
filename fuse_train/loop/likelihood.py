"""NLL of given text under a model, row by row, with logits of a few rows in memory at a time.

Shape suffixes: B segments, L input positions, T rows, R rows with a label and logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from fuse_train.data.batch import padded_inputs, predicting_positions
from fuse_train.losses.head_pass import product_dtype
from fuse_train.model.heads import (
    CHUNK_BYTES_CPU,
    CHUNK_BYTES_DEVICE,
    Head,
    check_head,
    default_chunk_rows,
    head_of,
    hidden_states,
    widen,
)
from store_schema.errors import ModelError
from store_schema.model.models import max_positions
from store_schema.text.encoded import token_lengths
from store_schema.text.prefixes import prefix_groups
from store_schema.text.tokenizer import EncodedSegment

SCORED_ROWS = 1024
"""Rows scored at a time: enough for an efficient product with a slice of the head."""


@dataclass(frozen=True, slots=True)
class SegmentNll:
    """NLL of one segment.

    Args:
        nats: Sum over all rows but a first token without context, which nothing predicts.
        num_bytes: UTF-8 bytes of these rows.
        num_rows: Number of these rows.
    """

    nats: float
    num_bytes: int
    num_rows: int


def segment_nll_of(segment: EncodedSegment, nats: npt.NDArray[np.float64]) -> SegmentNll:
    """The sums over a segment's rows from `row_nats`."""
    known = ~np.isnan(nats)
    sizes = token_lengths(segment.byte_ends)
    return SegmentNll(float(nats[known].sum()), int(sizes[known].sum()), int(known.sum()))


@torch.no_grad()
def row_nats(
    model: Any,
    encoded: Sequence[EncodedSegment],
    *,
    batch_segments: int = 16,
    head_chunk_rows: int | None = None,
    on_scored: Callable[[int], None] | None = None,
    most: Callable[[int], int] | None = None,
) -> list[npt.NDArray[np.float64]]:
    """NLL of each row of each segment.

    Args:
        model: transformers causal model, on its device.
        encoded: Segments as the model's own SegmentTokenizer gives them.
        batch_segments: Segments per forward pass; those that are a prefix of one are not counted.
        head_chunk_rows: Rows whose logits are in memory at one time; None chooses.
        on_scored: Called after each batch with its number of segments.
        most: From the number of batches to how often the model must be used, where all processes have
            to use it equally often.

    Returns:
        For each segment [N] float64 nats, NaN for a first token that nothing predicts.

    Raises:
        ModelError: Ids beyond the vocabulary, too many tokens, or NLLs that are not finite.
    """
    check_inputs(model, encoded)
    direct = _head_known(model)
    if not direct:
        batch_segments = 1  # its own logits come for all tokens of a batch at once
    groups = prefix_groups([np.asarray(segment.input_ids) for segment in encoded])
    # Longest first: memory runs out at once or never. Neighbours of one length waste no padding.
    groups.sort(key=lambda group: -len(encoded[group[0]].token_ids))
    nats_by_segment: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(encoded)
    made = -(-len(groups) // batch_segments)
    passes = made if most is None else most(made)  # before any of them: all processes meet here
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(groups), batch_segments):
            batch = groups[start : start + batch_segments]
            chosen = [i for group in batch for i in group]
            placed = [(row, encoded[i]) for row, group in enumerate(batch) for i in group]
            nats = _batch_nats(model, placed, direct, head_chunk_rows)
            for i, nats_T in zip(chosen, nats, strict=True):
                nats_by_segment[i] = nats_T
            if on_scored is not None:
                on_scored(len(chosen))
        for _ in range(made, passes):
            hidden_states(model, torch.zeros((1, 1), dtype=torch.int64, device=model.device))
    finally:
        model.train(was_training)
    return nats_by_segment


def check_inputs(model: Any, encoded: Sequence[EncodedSegment]) -> None:
    """Refuse ids and lengths that the model's embeddings do not have.

    Raises:
        ModelError: Ids beyond the vocabulary, or more tokens than positions.
    """
    where = str(model.config.name_or_path)
    vocab = int(model.get_input_embeddings().weight.shape[0])
    limit = max_positions(vars(model.config.get_text_config()))
    for segment in encoded:
        highest = max(segment.input_ids, default=0)
        if highest >= vocab:
            raise ModelError(
                "tokenizer gives an id the model does not have",
                where=where,
                expected=f"ids below {vocab}",
                got=highest,
                hint="the tokenizer belongs to another model, or the embedding was not resized",
            )
        length = len(segment.context_ids) + len(segment.token_ids)
        if limit is not None and length > limit:
            raise ModelError(
                "segment is longer than the model's positions",
                where=where,
                expected=f"at most {limit} tokens",
                got=length,
                hint="plan with a smaller max_tokens",
            )


def _head_known(model: Any) -> bool:
    """Whether hidden states and head give the model's logits; else its own logits are taken."""
    try:
        check_head(model, where=str(model.config.name_or_path))
    except ModelError:
        return False
    return True


def _batch_nats(
    model: Any, placed: Sequence[tuple[int, EncodedSegment]], direct: bool, chunk_rows: int | None
) -> Iterator[npt.NDArray[np.float64]]:
    """NLL of each segment of `placed`, which are (row of the model's input, segment). The first segment
    of a row is what the model reads there; the others are prefixes of it."""
    batch = [segment for _, segment in placed]
    num_rows = [len(segment.token_ids) for segment in batch]
    position_BT = torch.from_numpy(
        predicting_positions([len(segment.context_ids) for segment in batch], num_rows)
    )
    labels_BT = torch.from_numpy(padded_inputs([s.token_ids.astype(np.int64) for s in batch]))
    fed = {row: segment.input_ids[:-1] or [0] for row, segment in reversed(placed)}
    inputs = [np.asarray(fed[row], np.int64) for row in sorted(fed)]
    input_ids_BL = torch.from_numpy(padded_inputs(inputs)).to(model.device)
    segment_R, row_R = torch.nonzero(position_BT >= 0, as_tuple=True)
    input_R = torch.tensor([row for row, _ in placed])[segment_R]
    at = (input_R.to(model.device), position_BT[segment_R, row_R].to(model.device))
    labels_R = labels_BT[segment_R, row_R].to(model.device)
    if direct:
        states_RH = hidden_states(model, input_ids_BL)[at]
        head = head_of(model, where=str(model.config.name_or_path))
        nats_R = label_nats(states_RH, head, labels_R, chunk_rows)
    else:
        logits_RV = model(input_ids=input_ids_BL, use_cache=False).logits[at]
        rows = chunk_rows or default_chunk_rows(logits_RV.shape[-1], logits_RV.device)
        parts = zip(torch.split(logits_RV, rows), torch.split(labels_R, rows), strict=True)
        nats_R = torch.cat([cross_entropy(widen(z), y, reduction="none") for z, y in parts])
    nats_R = nats_R.double().cpu()
    if not bool(nats_R.isfinite().all()):
        raise ModelError(
            "log-probabilities are not finite",
            where=str(model.config.name_or_path),
            hint="the weights hold NaN or the dtype overflows; try dtype float32",
        )
    nats_BT = torch.full(position_BT.shape, float("nan"), dtype=torch.float64)
    nats_BT[segment_R, row_R] = nats_R
    for row_T, count in zip(nats_BT.numpy(), num_rows, strict=True):
        yield row_T[:count]


def label_nats(
    hidden_RH: torch.Tensor, head: Head, labels_R: torch.Tensor, chunk_rows: int | None = None
) -> torch.Tensor:
    """NLL of each label, with logits of some rows and a slice of the vocabulary at a time.

    Slices of the head are the outer loop: a head of half precision is widened slice by slice, once per
    call, and never copied to float32 as a whole.

    Args:
        hidden_RH: Hidden states that predict the rows.
        head: Output layer of the model.
        labels_R: Token ids, int64.
        chunk_rows: Maximum rows at a time; None chooses.

    Returns:
        [R] nats, in float32 or float64 as `score_dtype` of the hidden states.
    """
    dtype = score_dtype(hidden_RH)
    size = CHUNK_BYTES_CPU if hidden_RH.device.type == "cpu" else CHUNK_BYTES_DEVICE
    num_rows = max(1, min(chunk_rows or SCORED_ROWS, len(hidden_RH)))
    step = max(16, size // (4 * num_rows))
    with torch.autocast(hidden_RH.device.type, enabled=False):
        hidden_RH = hidden_RH.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        top_R = hidden_RH.new_full((len(hidden_RH),), -torch.inf, dtype=wide)
        sum_R, own_R = torch.zeros_like(top_R), torch.zeros_like(top_R)
        for first in range(0, len(head.weight_VH), step):
            part = head.part(slice(first, first + step), dtype)
            for start in range(0, len(hidden_RH), num_rows):
                rows = slice(start, start + num_rows)
                logits_RV = part.logits(hidden_RH[rows])
                place_R = labels_R[rows] - first
                here_R = (place_R >= 0) & (place_R < logits_RV.shape[1])
                own = logits_RV.gather(1, place_R.clamp(0, logits_RV.shape[1] - 1)[:, None])[:, 0]
                own_R[rows] = torch.where(here_R, own, own_R[rows])
                higher_R = torch.maximum(top_R[rows], logits_RV.amax(1))
                sum_R[rows] *= (top_R[rows] - higher_R).exp()
                sum_R[rows] += logits_RV.sub_(higher_R[:, None]).exp_().sum(1)
                top_R[rows] = higher_R
        return top_R + sum_R.log() - own_R


def score_dtype(hidden_RH: torch.Tensor) -> torch.dtype:
    """dtype of the product of hidden states and head when scoring: the model's own, or autocast's.

    Rounding logits to bfloat16 moves the bits per byte of a text by some 0.003 % (measured); float32
    products would take half as long again. A CPU that only imitates bfloat16 takes float32.
    """
    device = hidden_RH.device.type
    if torch.is_autocast_enabled(device):
        hidden_RH = hidden_RH.new_empty(0, dtype=torch.get_autocast_dtype(device))
    return product_dtype(hidden_RH)
