"""What an engine is.

An engine gives, for each token of a segment that has something before it, the `top_k` most probable
ids of the model's full softmax at temperature 1 (or a sample of it, `extract.engines.sampling`) and the
label's log-probability. Everything after that is the same for all engines (`extract.scoring.rows`).

Shapes: R known rows of a segment (N, or N - 1 where the first token has nothing before it),
N positions, K entries, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from store_schema.errors import ConfigError, ModelError
from store_schema.model.models import (
    max_positions,
    model_config,
    model_rows,
    resolved_dtype,
    with_folder,
)

# For types only: an engine also runs where nothing but its own libraries is installed.
if TYPE_CHECKING:
    from extract.config import ExtractSection
    from extract.engines.ending import AnswerRules
    from store_schema.config import ModelRef
    from store_schema.layout import Finish
    from store_schema.text.tokenizer import EncodedSegment


CHECK_WEIGHTS = "check the weights, or load the model in float32 or bfloat16"
"""What to do where a model gives NaN."""


class EngineMemoryError(ModelError):
    """Memory of the CPU or GPU ran out in a batch; a smaller batch may do."""


@dataclass(frozen=True, slots=True)
class DenseRows:
    """What an engine gives for one segment.

    Args:
        ids: [R, K] integer ids of the model's vocabulary, the most probable or drawn, in any order.
        logprobs: [R, K] float32 nats; -inf: no entry.
        label_logprobs: [R] float32 nats of the tokens themselves, never estimated.
        sampled: Whether the rows are estimates of the whole distribution: then they sum to 1.
    """

    ids: npt.NDArray[np.integer[Any]]
    logprobs: npt.NDArray[np.float32]
    label_logprobs: npt.NDArray[np.float32]
    sampled: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes it holds."""
        return sum(array.nbytes for array in (self.ids, self.logprobs, self.label_logprobs))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer is asked for.

    Args:
        input_ids: Everything the model is fed, chat template and BOS included.
        seed: Of this answer's draws alone, in [0, 2^63).
        where: What is asked, and whom, for messages.
    """

    input_ids: tuple[int, ...]
    seed: int
    where: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model generated after one prompt.

    Args:
        token_ids: [N] int64 generated tokens, the final end-of-sequence token included.
        finish: How it ended.
    """

    token_ids: npt.NDArray[np.int64]
    finish: Finish


class Engine(Protocol):
    """A loaded model."""

    @property
    def description(self) -> str:
        """What runs it and how, in a few words."""
        ...

    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        """Score segments, in whatever order is fastest.

        What one segment gets may depend on the others only by rounding, and the same list gives
        the same bits.

        Yields:
            Index in `segments`, and its rows. Between two yields the caller may stop.

        Raises:
            EngineMemoryError: Memory ran out; the engine may be unusable.
        """
        ...

    def answer(self, prompts: Sequence[Prompt], rules: AnswerRules) -> Iterator[tuple[int, Answer]]:
        """Generate one answer for each prompt, in whatever order is fastest.

        The same list gives the same answers; every prompt leaves room for the most tokens of one.

        Yields:
            Index in `prompts`, and its answer.

        Raises:
            ModelError: The model gives NaN.
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
        vocab_size: Ids of the tokenizer that the model has rows for.
        model_vocab_size: Ids of the model's output, padding rows included.
        longest: Tokens of the longest input, context included.
        seed: Of whatever an engine draws.
        generates: Whether the engine is to answer prompts; else it scores text.
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
        """Whether logits are computed in another type than the rest."""
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
        name: Of the source.
        folder: Model folder.
        ref: The model as the run file names it.
        section: The run file's `extract`.
        vocab_size: Ids of the tokenizer that the model has rows for.
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
    if most is not None and longest > most:
        raise ConfigError(
            f"segments are longer than {name} can read",
            where="plan.max_tokens",
            expected=f"at most {most}",
            got=longest,
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
    """The section with an engine chosen for this machine where the run file leaves it open.

    Args:
        section: The run file's `extract`.
        dtype: Of the model, by name.
    """
    if section.engine != "auto":
        return section
    import torch

    on_cpu = not torch.cuda.is_available()
    return section.settled(on_cpu=on_cpu, fp32_head=_has_fp32_head(section, dtype))


def _has_fp32_head(section: ExtractSection, dtype: str) -> bool:
    return section.fp32_head and dtype != "float32"


def first_known(segment: EncodedSegment) -> int:
    """First row that has something before it: 1 where there is no context, else 0."""
    return 0 if segment.context_ids else 1
