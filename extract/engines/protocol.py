"""The protocol of engines.

For each token of a segment that has tokens before it, an engine returns the `top_k` most probable ids
of the model's full softmax at temperature 1 (or a sample of it, `extract.engines.sampling`) and the
label's log-probability. Everything after that is the same for all engines (`extract.scoring.rows`).

Shapes: N positions of a segment, R rows with a distribution (N, or N - 1 if the first token has no
context), K entries, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from store_schema.errors import ConfigError, ModelError
from store_schema.model.class_config import model_rows
from store_schema.model.models import max_positions, model_config, resolved_dtype, with_folder

# For types only: an engine also runs where only its own libraries are installed.
if TYPE_CHECKING:
    from extract.config import ExtractSection
    from extract.engines.ending import AnswerRules
    from store_schema.config import ModelRef
    from store_schema.layout import Finish
    from store_schema.text.tokenizer import EncodedSegment


CHECK_WEIGHTS = "check the weights, or load the model in float32 or bfloat16"
"""Hint for a model with NaN in its outputs."""


class EngineMemoryError(ModelError):
    """Memory of the CPU or GPU ran out in a batch; a smaller batch may fit."""


@dataclass(frozen=True, slots=True)
class DenseRows:
    """The distributions of one segment, from an engine.

    Args:
        ids: [R, K] ids of the model's vocabulary, the most probable or sampled ones, in any order.
        logprobs: [R, K] float32 nats; -inf for no entry.
        label_logprobs: [R] float32 nats of the text's own tokens, never estimated.
        sampled: Whether the rows are estimates of the whole distribution, which sum to 1.
    """

    ids: npt.NDArray[np.integer[Any]]
    logprobs: npt.NDArray[np.float32]
    label_logprobs: npt.NDArray[np.float32]
    sampled: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in (self.ids, self.logprobs, self.label_logprobs))


@dataclass(frozen=True, slots=True)
class Branches:
    """Where the model is asked to go on from entries that are not a segment's own tokens.

    Args:
        segment: Context and text.
        positions: [B] int64 positions of the entries; there is a token before each.
        token_ids: [B] int64 the entries.
    """

    segment: EncodedSegment
    positions: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for one answer.

    Args:
        input_ids: All input tokens, with BOS and chat template.
        seed: Seed of this answer's sampling alone, in [0, 2^63).
        where: Prompt and model, for messages.
    """

    input_ids: tuple[int, ...]
    seed: int
    where: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Args:
        token_ids: [N] int64 generated tokens, with the final end-of-sequence token.
        finish: How it ended.
    """

    token_ids: npt.NDArray[np.int64]
    finish: Finish


class Engine(Protocol):
    """A loaded model."""

    @property
    def description(self) -> str:
        """Engine and device in a few words."""
        ...

    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        """Score segments, in any order.

        The rows of a segment may depend on the other segments only by rounding, and are bitwise the
        same for the same list.

        Yields:
            Index in `segments`, and its rows. The caller may stop between two of them.

        Raises:
            EngineMemoryError: Memory ran out; the engine may be unusable.
        """
        ...

    def branch(self, segments: Sequence[Branches]) -> Iterator[tuple[int, DenseRows]]:
        """The distributions after entries; only of engines whose kind `has_branches`.

        Yields:
            Index in `segments`, and a row for each of its branches: that of the token after the text
            before the position and the entry. Label log-probabilities are 0, as there are no labels.

        Raises:
            EngineMemoryError: Memory ran out; the engine may be unusable.
        """
        ...

    def answer(self, prompts: Sequence[Prompt], rules: AnswerRules) -> Iterator[tuple[int, Answer]]:
        """Generate one answer for each prompt, in any order.

        The same list gives the same answers. Every prompt must leave room for `generate.max_tokens`.

        Yields:
            Index in `prompts`, and its answer.

        Raises:
            ModelError: The model's logits are NaN.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory; it cannot be used afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is opened with.

    Args:
        source: The source's name in the run.
        folder: Model folder.
        ref: The model in the run file.
        section: Section `extract` of the run file.
        dtype: Name of the torch dtype.
        vocab_size: Ids of the tokenizer that the model has rows for.
        model_vocab_size: Ids of the model's output, with padding rows.
        longest: Tokens of the longest input, with its context.
        seed: Seed of sampling.
        generates: Whether the engine answers prompts; otherwise it scores text.
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
    generates: bool = False

    @property
    def fp32_head(self) -> bool:
        """Whether logits are computed in float32 for a model in another dtype."""
        return _has_fp32_head(self.section, self.dtype)


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
        name: Name of the source.
        folder: Model folder.
        ref: The model in the run file.
        section: Section `extract` of the run file.
        vocab_size: Ids of the tokenizer that the model has rows for.
        longest: Tokens of the longest input.
        seed: The run's seed.

    Raises:
        ConfigError: top_k or sampled_head is larger than the vocabulary, or inputs are longer than
            the model's context.
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
    size = model_rows(with_folder(ref, folder))
    if size is None:
        raise ModelError("model folder has no config.json", where=folder)
    if size < vocab_size:
        raise ModelError(
            "the model's vocabulary is smaller than its tokenizer's",
            where=f"source {name}, {folder}",
            expected=f"at least {vocab_size} ids",
            got=size,
        )
    most = max_positions(config)
    if most is not None and longest > most and section.on_bad == "record":
        longest = most  # longer segments are not scored
    if most is not None and longest > most:
        raise ConfigError(
            f"segments are longer than {name} can read",
            where="plan.max_tokens",
            expected=f"at most {most}",
            got=longest,
            hint="plan again, or set extract.on_bad to record: such segments are then left unscored",
        )
    dtype = resolved_dtype(ref, config)
    return EngineSpec(
        source=name,
        folder=folder,
        ref=ref,
        section=settled_section(section, dtype),
        dtype=dtype,
        vocab_size=vocab_size,
        model_vocab_size=size,
        longest=longest,
        seed=seed,
    )


def settled_section(section: ExtractSection, dtype: str) -> ExtractSection:
    """The section with `engine: auto` replaced by the engine for this machine.

    Args:
        section: Section `extract` of the run file.
        dtype: Name of the model's dtype.
    """
    if section.engine != "auto":
        return section
    import torch

    on_cpu = not torch.cuda.is_available()
    return section.settled(on_cpu=on_cpu, fp32_head=_has_fp32_head(section, dtype))


def _has_fp32_head(section: ExtractSection, dtype: str) -> bool:
    return section.fp32_head and dtype != "float32"


def first_known(segment: EncodedSegment) -> int:
    """Index of the first token with a distribution: 1 without a context, else 0."""
    return 0 if segment.context_ids else 1
