"""Evaluation during training: bits per byte of some segments of the valid split, by domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fuse_train.loop.likelihood import check_inputs, row_nats, segment_nll_of
from fuse_train.machine.processes import progress_stream
from launch.progress import Progress
from store_schema.errors import InputError
from store_schema.plan.plan import Plan, ShardRecord
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer


@dataclass(frozen=True, slots=True)
class ValidSet:
    """Segments that are evaluated.

    Args:
        encoded: As the target reads them.
        domains: Domain of each.
        segment_ids: Name of each.
    """

    encoded: tuple[EncodedSegment, ...]
    domains: tuple[str, ...]
    segment_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ValidScores:
    """One evaluation.

    Args:
        bpb: Bits per byte by domain, over all processes.
        row_nats: NLL of each row of this process's segments, by segment; NaN where nothing predicts it.
    """

    bpb: dict[str, float]
    row_nats: dict[str, npt.NDArray[np.float64]]


def load_valid(
    plan: Plan, shards: Sequence[ShardRecord], tokenizer: SegmentTokenizer, limit: int | None
) -> ValidSet:
    """Segments of the shards, at most `limit`, spread evenly over all of them."""
    total = sum(shard.stop - shard.start for shard in shards)
    count = total if limit is None else min(limit, total)
    wanted = set(np.linspace(0, total - 1, count).round().astype(int).tolist())
    chosen, number = [], 0
    for shard in shards:
        size = shard.stop - shard.start
        if not wanted.isdisjoint(range(number, number + size)):
            segments = plan.segments(shard)
            chosen += [s for i, s in enumerate(segments, start=number) if i in wanted]
        number += size
    return ValidSet(
        tuple(part.text_only for part in tokenizer.encode(chosen)),
        tuple(s.domain for s in chosen),
        tuple(s.segment_id for s in chosen),
    )


def check_valid(model: Any, valid: ValidSet) -> None:
    """Refuse segments with ids or lengths that the model does not have."""
    check_inputs(model, valid.encoded)


def valid_scores(
    model: Any,
    valid: ValidSet,
    accelerator: Any,
    *,
    batch_segments: int,
    head_chunk_rows: int | None,
    label: str | None = None,
    most: Callable[[int], int] | None = None,
) -> ValidScores:
    """Scores by domain; each process scores its share, with a progress bar if `label` names one.

    `most` is as of `row_nats`.

    A first token without context counts in neither nats nor bytes.

    Raises:
        InputError: No byte of a domain can be scored, so that it would look perfect.
    """
    names = sorted(set(valid.domains))
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    segments = valid.encoded[share]
    bar = None
    if label is not None:
        bar = Progress(label, len(segments), unit="segment", stream=progress_stream())
    with accelerator.autocast(), bar or nullcontext():
        rows = row_nats(
            model,
            segments,
            batch_segments=batch_segments,
            head_chunk_rows=head_chunk_rows,
            on_scored=None if bar is None else bar.add,
            most=most,
        )
    sums = torch.zeros((len(names), 2), dtype=torch.float64)
    scored = zip(valid.domains[share], segments, rows, strict=True)
    for domain, segment, nats in scored:
        nll = segment_nll_of(segment, nats)
        sums[names.index(domain)] += torch.tensor([nll.nats, nll.num_bytes], dtype=torch.float64)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device)).cpu()
    unscored = [name for name, (_, size) in zip(names, sums.tolist(), strict=True) if not size]
    if unscored:
        raise InputError(
            "domains without text that can be scored",
            where="the split of evaluations",
            got="no bytes of " + ", ".join(unscored),
            hint="add documents of these domains to that split; "
            "a text's first token is scored only after a BOS or a context",
        )
    bpb = {
        name: nats / math.log(2) / size
        for name, (nats, size) in zip(names, sums.tolist(), strict=True)
    }
    return ValidScores(bpb, dict(zip(valid.segment_ids[share], rows, strict=True)))
