"""Bits per byte on the way: some segments of the valid split, by domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fuse_train.likelihood import check_inputs, segment_nll
from fuse_train.processes import progress_stream
from launch.progress import Progress
from store_schema.errors import InputError
from store_schema.plan import Plan, ShardRecord
from store_schema.tokenizer import EncodedSegment, SegmentTokenizer


@dataclass(frozen=True, slots=True)
class ValidSet:
    """Segments that are evaluated.

    Args:
        encoded: As the target reads them.
        domains: Domain of each.
    """

    encoded: tuple[EncodedSegment, ...]
    domains: tuple[str, ...]


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
    encoded = tuple(part.text_only for part in tokenizer.encode(chosen))
    return ValidSet(encoded, tuple(s.domain for s in chosen))


def check_valid(model: Any, valid: ValidSet) -> None:
    """Refuse segments that the model cannot take, before any time is spent."""
    check_inputs(model, valid.encoded)


def valid_bpb(
    model: Any,
    valid: ValidSet,
    accelerator: Any,
    *,
    batch_segments: int,
    head_chunk_rows: int | None,
    label: str | None = None,
) -> dict[str, float]:
    """Bits per byte by domain; each process scores its share, with a bar where it has a label.

    A first token without context is in neither nats nor bytes.

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
        found = segment_nll(
            model,
            segments,
            batch_segments=batch_segments,
            head_chunk_rows=head_chunk_rows,
            on_scored=None if bar is None else bar.add,
        )
    sums = torch.zeros((len(names), 2), dtype=torch.float64)
    for domain, nll in zip(valid.domains[share], found, strict=True):
        sums[names.index(domain)] += torch.tensor([nll.nats, nll.num_bytes], dtype=torch.float64)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device)).cpu()
    silent = [name for name, (_, size) in zip(names, sums.tolist(), strict=True) if not size]
    if silent:
        raise InputError(
            "domains without text that can be scored",
            where="the split of evaluations",
            got="no bytes of " + ", ".join(silent),
            hint="add documents of theirs to that split; a text of one token without BOS has none",
        )
    return {
        name: nats / math.log(2) / size
        for name, (nats, size) in zip(names, sums.tolist(), strict=True)
    }
