"""What an engine is, and how its rows become the store's.

An engine gives, for each token of a segment that has something before it, the `top_k` most probable
ids of the model's full softmax at temperature 1 (or a sample of it, `extract.sampling`) and the
label's log-probability. Everything after that (order, padding ids, trimming, tail mass, NaN) is one
pure function for all engines.

Shapes: R known rows of a segment (N, or N - 1 where the first token has nothing before it),
N positions, K entries, E entries of all positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from extract.config import ExtractSection
from store_schema.config import ModelRef
from store_schema.errors import ConfigError, ModelError
from store_schema.models import max_positions, model_config, resolved_dtype
from store_schema.tokenizer import EncodedSegment

LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    ImportError,
    AttributeError,
    SafetensorError,
)
"""What model libraries raise on a folder they cannot load."""

LABEL_SLACK = 1e-3
"""Nats above 0 that rounding may leave in a float32 log-probability."""


@dataclass(frozen=True, slots=True)
class DenseRows:
    """What an engine gives for one segment.

    Args:
        ids: [R, K] int64 most probable or drawn ids of the model's vocabulary, in any order.
        logprobs: [R, K] float32 nats; -inf: no entry.
        label_logprobs: [R] float32 nats of the tokens themselves, never estimated.
        sampled: Whether the rows are estimates of the whole distribution: then they sum to 1.
    """

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    label_logprobs: npt.NDArray[np.float32]
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class ScoredSegment:
    """Rows of one segment as the store keeps them; row i is the distribution OF token i.

    Args:
        counts: [N] int64 entries of each position.
        entry_ids: [E] uint32, most probable first, ties by id.
        entry_logprobs: [E] float32 nats, finite, <= 0.
        tail_mass: [N] float32, 1 - sum of the entries.
        label_logprobs: [N] float32 nats; NaN where nothing stands before the token.
    """

    counts: npt.NDArray[np.int64]
    entry_ids: npt.NDArray[np.uint32]
    entry_logprobs: npt.NDArray[np.float32]
    tail_mass: npt.NDArray[np.float32]
    label_logprobs: npt.NDArray[np.float32]


class Engine(Protocol):
    """A loaded model."""

    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        """Score segments, in whatever order is fastest.

        What one segment gets may depend on the others only by rounding, and the same list gives
        the same bits.

        Yields:
            Index in `segments`, and its rows. Between two yields the caller may stop.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that an engine needs to know.

    Args:
        source: Its name in the run.
        folder: Model folder.
        ref: The model as the run file names it.
        section: The run file's `extract`.
        dtype: torch dtype by name.
        vocab_size: Ids of the tokenizer.
        model_vocab_size: Ids of the model's output, padding rows included.
        longest: Tokens of the longest input, context included.
        seed: Of whatever an engine draws.
    """

    source: str
    folder: Path
    ref: ModelRef
    section: ExtractSection
    dtype: str
    vocab_size: int
    model_vocab_size: int
    longest: int
    seed: int = 0

    @property
    def fp32_head(self) -> bool:
        """Whether logits are computed in another type than the rest."""
        return self.section.fp32_head and self.dtype != "float32"


def engine_spec(
    name: str,
    folder: Path,
    ref: ModelRef,
    section: ExtractSection,
    *,
    vocab_size: int,
    longest: int,
    seed: int,
) -> EngineSpec:
    """Check a model against its tokenizer and the run file before anything is loaded.

    Args:
        name: Of the source.
        folder: Model folder.
        ref: The model as the run file names it.
        section: The run file's `extract`.
        vocab_size: Ids of the tokenizer.
        longest: Tokens of the longest input.
        seed: The run's.

    Raises:
        ConfigError: top_k or sampled_head is larger than the vocabulary, or inputs are longer than
            the model reads.
        ModelError: The model has fewer ids than its tokenizer.
    """
    option = "top_k" if section.estimator == "topk" else "sampled_head"
    if getattr(section, option) > vocab_size:
        raise ConfigError(
            f"{option} is larger than the vocabulary",
            where=f"extract.{option}, source {name}",
            expected=f"at most {vocab_size}",
            got=getattr(section, option),
        )
    config = model_config(folder)
    size = config.get("vocab_size")
    if not isinstance(size, int):
        raise ModelError("model's config has no vocab_size", where=folder / "config.json")
    if size < vocab_size:
        raise ModelError(
            "the model's vocabulary is smaller than its tokenizer's",
            where=f"source {name}, {folder}",
            expected=f"at least {vocab_size} ids",
            got=size,
        )
    most = max_positions(config)
    if most is not None and longest > most:
        raise ConfigError(
            f"segments are longer than {name} can read",
            where="plan.max_tokens",
            expected=f"at most {most}",
            got=longest,
        )
    return EngineSpec(
        source=name,
        folder=folder,
        ref=ref,
        section=section,
        dtype=resolved_dtype(ref, config),
        vocab_size=vocab_size,
        model_vocab_size=size,
        longest=longest,
        seed=seed,
    )


def open_engine(spec: EngineSpec) -> Engine:
    """Load the model in the engine that the run file asks for.

    Raises:
        ConfigError: The engine is not installed.
        ModelError: The model does not load.
    """
    if spec.section.engine == "vllm":
        from extract.vllm_engine import VllmEngine

        return VllmEngine(spec)
    from extract.transformers_engine import TransformersEngine

    return TransformersEngine(spec)


def first_known(segment: EncodedSegment) -> int:
    """First row that has something before it: 1 where there is no context, else 0."""
    return 0 if segment.context_ids else 1


def scored_segment(
    dense: DenseRows, num_positions: int, *, vocab_size: int, where: str
) -> ScoredSegment:
    """An engine's rows as the store keeps them.

    Entries are sorted by falling log-probability, ties by id. Ids beyond the tokenizer's (padding
    rows of the model) and entries of probability 0 are no entries: what mass they have is in the
    tail. Sampled rows have no tail.

    Args:
        dense: Rows of the last R of `num_positions` positions.
        num_positions: N.
        vocab_size: Ids of the tokenizer.
        where: Source and segment, for messages.

    Raises:
        ModelError: NaN, or a label of probability 0; names the position.
    """
    num_rows = len(dense.label_logprobs)
    unknown = num_positions - num_rows
    _require_sane(dense, unknown, where)
    ids, logprobs = _sorted_rows(dense.ids, dense.logprobs)
    keep = (ids < vocab_size) & (logprobs > -np.inf)
    probabilities = np.where(keep, np.exp(logprobs.astype(np.float64)), 0.0)
    counts = np.zeros(num_positions, np.int64)
    counts[unknown:] = keep.sum(axis=1)
    tail = np.ones(num_positions, np.float64)
    tail[unknown:] = 0.0 if dense.sampled else np.clip(1.0 - probabilities.sum(axis=1), 0.0, 1.0)
    labels = np.full(num_positions, np.nan, np.float32)
    labels[unknown:] = np.minimum(dense.label_logprobs, 0.0)
    return ScoredSegment(
        counts=counts,
        entry_ids=ids[keep].astype(np.uint32),
        entry_logprobs=np.minimum(logprobs[keep], 0.0).astype(np.float32),
        tail_mass=tail.astype(np.float32),
        label_logprobs=labels,
    )


def _require_sane(dense: DenseRows, unknown: int, where: str) -> None:
    labels, logprobs = dense.label_logprobs, dense.logprobs
    faults = [
        ("NaN from the model", np.isnan(labels) | np.isnan(logprobs).any(axis=1)),
        ("the model gives a token of the text probability 0", np.isneginf(labels)),
        (
            "log-probability above 0",
            (labels > LABEL_SLACK) | (logprobs > LABEL_SLACK).any(axis=1),
        ),
    ]
    for what, rows in faults:
        if rows.any():
            row = int(np.flatnonzero(rows)[0])
            raise ModelError(
                what,
                where=f"{where}, position {row + unknown}",
                hint="check the weights, or load the model in float32 or bfloat16",
            )


def _sorted_rows(ids: npt.NDArray[Any], logprobs: npt.NDArray[Any]) -> tuple[Any, Any]:
    """Rows by falling log-probability, ties by id; rows that are in order are left alone."""
    before, after = logprobs[:, :-1], logprobs[:, 1:]  # compared: -inf less -inf is NaN
    wrong = ((after > before) | ((after == before) & (np.diff(ids, axis=1) < 0))).any(axis=1)
    if wrong.any():
        ids, logprobs = ids.copy(), logprobs.copy()
        order = np.lexsort((ids[wrong], -logprobs[wrong]), axis=-1)
        ids[wrong] = np.take_along_axis(ids[wrong], order, axis=1)
        logprobs[wrong] = np.take_along_axis(logprobs[wrong], order, axis=1)
    return ids, logprobs
