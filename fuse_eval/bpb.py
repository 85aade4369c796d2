"""Bits per byte of any model on a split of the plan, on bytes that every model of the run shares.

Bits per byte are total nats / ln 2 / total UTF-8 bytes. Tokens of different tokenizers are not
comparable, bytes are (Gao et al. 2020, The Pile, section 3.1). Which bytes count: `common_bytes`.

One model is in memory at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fuse_eval.common_bytes import block_ends, common_boundaries, counted_from, nats_by_block
from fuse_train.model.identity import identity
from launch.progress import Progress
from launch.signals import StopFlag
from store_schema import SCHEMA_VERSION
from store_schema.config import ModelRef, RunConfig, StrictModel
from store_schema.disk.location import Location
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import ConfigError, MismatchError
from store_schema.fingerprint import fingerprint
from store_schema.plan.plan import Plan, Segment
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer

if TYPE_CHECKING:  # not loaded for an evaluation that is complete
    import torch

BLOCK_BYTES = 128
"""Target size of a block, some 32 tokens: a document's noise is estimated from its blocks."""


@dataclass(frozen=True, slots=True)
class ScoredText:
    """The text that models are compared on.

    Args:
        segments: Segments of the split, in plan order.
        starts: [D] byte of each segment from which all models are scored.
        num_bytes: [D] bytes scored; 0 if the tokenizers share no boundary.
        block_ends: For each segment the ends of its blocks, relative to its start.
    """

    segments: tuple[Segment, ...]
    starts: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    block_ends: tuple[npt.NDArray[np.int64], ...]


class ModelScore(StrictModel):
    """One model's NLL of every block, saved so that a stopped evaluation can resume."""

    schema_version: int = SCHEMA_VERSION
    model: str
    request_fingerprint: str
    """Of the model, the text and the bytes that are scored."""
    nats: tuple[float, ...]
    """NLL of all blocks, segment by segment in plan order."""
    num_bytes: tuple[int, ...]
    """Bytes of the same blocks."""
    seconds: float = Field(ge=0)


def split_segments(plan: Plan, split: str) -> tuple[Segment, ...]:
    """All segments of a split, in plan order.

    Raises:
        ConfigError: The plan has no such split.
    """
    splits = plan.splits()
    if split not in splits:
        raise ConfigError(
            "no such split in the plan",
            where="evaluate.split",
            expected=" or ".join(splits),
            got=split,
        )
    return tuple(segment for shard in splits[split] for segment in plan.segments(shard))


def run_tokenizers(run: RunConfig, plan: Plan) -> dict[str, SegmentTokenizer]:
    """Tokenizers of all sources, checked against the plan, and of the target.

    The target may be another than the plan's: its aligned stores are checked against it.

    Raises:
        MismatchError: A source's tokenizer was changed after planning.
    """
    tokenizers = {}
    for name, ref in {**run.sources, "target": run.target}.items():
        tokenizer = SegmentTokenizer.load(ref, name=name)
        planned = plan.record.tokenizers.get(name)
        if name != "target" and tokenizer.fingerprint != planned:
            raise MismatchError(
                f"tokenizer of {name} is not the plan's",
                where=ref.model,
                expected=f"tokenizer {planned}",
                got=f"tokenizer {tokenizer.fingerprint}",
                hint="undo the change, or give the run another name and plan again",
            )
        tokenizers[name] = tokenizer
    return tokenizers


def scored_text(
    segments: Sequence[Segment], tokenizers: Mapping[str, SegmentTokenizer]
) -> ScoredText:
    """Choose the bytes to score and their blocks, from all tokenizers of the run."""
    shared = common_boundaries({name: _texts(segments, t) for name, t in tokenizers.items()})
    starts = np.asarray([offsets[0] for offsets in shared], np.int64)
    lengths = np.asarray([len(segment.text.encode()) for segment in segments], np.int64)
    blocks = tuple(block_ends(offsets, BLOCK_BYTES) for offsets in shared)
    return ScoredText(tuple(segments), starts, lengths - starts, blocks)


def counted_segments(text: ScoredText, tokenizer: SegmentTokenizer) -> list[EncodedSegment]:
    """The segments as one model reads them, with rows only for the scored bytes."""
    encoded = _texts(text.segments, tokenizer)
    return [counted_from(e, int(start)) for e, start in zip(encoded, text.starts, strict=True)]


def _texts(segments: Sequence[Segment], tokenizer: SegmentTokenizer) -> list[EncodedSegment]:
    """Segments as one model reads them, without end-of-turn tokens: bits per byte are of text."""
    return [encoded.text_only for encoded in tokenizer.encode(segments)]


def score_request(
    ref: ModelRef, plan: Plan, split: str, tokenizers: Mapping[str, SegmentTokenizer]
) -> str:
    """Fingerprint of all that a score depends on: model, text, and every tokenizer of the run, since
    these determine the bytes that are scored."""
    return fingerprint(
        {
            "model": identity(ref),
            "text": [[s.start, s.fingerprint] for s in plan.splits().get(split, ())],
            "tokenizers": {name: t.fingerprint for name, t in tokenizers.items()},
            "split": split,
            "block_bytes": BLOCK_BYTES,
        }
    )


def load_score(location: Location, key: str, request: str) -> ModelScore | None:
    """The saved score, if it was made by the same request; else None."""
    if not location.exists(key):
        return None
    score = unseal(ModelScore, location.read_bytes(key), where=f"{location.url}/{key}")
    return score if score.request_fingerprint == request else None


def save_score(location: Location, key: str, score: ModelScore) -> None:
    """Save a score."""
    location.write_atomic(key, seal(score))


def device_of(name: str | None) -> torch.device:
    """The device to score on.

    Raises:
        ConfigError: torch does not know it.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            "unknown device", where="evaluate.device", got=str(error).splitlines()[0]
        ) from error


def score_dtype(ref: ModelRef) -> Any:
    """dtype to load in: the run file's, or 'auto' (the checkpoint's own)."""
    import torch

    return ref.dtype if ref.dtype == "auto" else getattr(torch, ref.dtype)


def model_rows(
    ref: ModelRef,
    encoded: Sequence[EncodedSegment],
    *,
    name: str,
    batch_tokens: int,
    device: torch.device,
    stop: StopFlag,
) -> list[npt.NDArray[np.float64]]:
    """NLL of every row under one model, which is loaded and freed again.

    Args:
        ref: The model.
        encoded: Segments as its tokenizer gives them.
        name: Name for progress and messages.
        batch_tokens: Padded tokens of one forward pass.
        device: Device to score on.
        stop: Checked between passes.

    Returns:
        [N] nats for each segment, NaN for a first token without context.

    Raises:
        ConfigError: A pass does not fit in memory.
    """
    import torch

    from fuse_train.loop.likelihood import row_nats
    from fuse_train.machine.memory_fit import memory_errors
    from fuse_train.model.models import load_model

    model = load_model(ref, where=name, dtype=score_dtype(ref), device=device)
    lengths = [len(e.context_ids) + len(e.token_ids) for e in encoded]
    nats_by_segment: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(encoded)
    try:
        full = memory_errors(
            f"scoring of {batch_tokens:,} tokens at a time",
            where=f"model {name}",
            hint=f"set evaluate.batch_tokens to {max(batch_tokens // 2, 1)} or less",
        )
        with Progress(f"score {name}", sum(lengths), unit="tok") as progress, full:
            for batch in _batches(lengths, batch_tokens):
                stop.check()
                chosen = [encoded[i] for i in batch]
                for i, nats in zip(
                    batch, row_nats(model, chosen, batch_segments=len(batch)), strict=True
                ):
                    nats_by_segment[i] = nats
                progress.add(sum(lengths[i] for i in batch))
    finally:
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return nats_by_segment


def score_model(
    ref: ModelRef,
    text: ScoredText,
    tokenizer: SegmentTokenizer,
    *,
    name: str,
    batch_tokens: int,
    device: torch.device,
    stop: StopFlag,
) -> list[npt.NDArray[np.float64]]:
    """NLL (nats) of each segment's blocks; 0 where no byte is scored."""
    encoded = counted_segments(text, tokenizer)
    rows = model_rows(ref, encoded, name=name, batch_tokens=batch_tokens, device=device, stop=stop)
    return [
        nats_by_block(nats, one.byte_ends, ends)
        for nats, one, ends in zip(rows, encoded, text.block_ends, strict=True)
    ]


def checkpoint_ref(folder: Path, target: ModelRef) -> ModelRef:
    """Reference to a trained model's folder, with the target's options of loading."""
    return target.model_copy(update={"model": str(folder), "gguf_file": None, "revision": None})


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices with rows, longest first, in groups of at most `batch_tokens` padded tokens."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    width = 0
    for i in order:
        if not batches or width * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches
