"""Answers as a generated store keeps them: bytes, arrays, and figures by reason.

Shapes: D answers, N tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.engines.ending import AnswerRules
from extract.engines.protocol import Answer
from extract.scoring.score import BYTES, TOKENS
from store_schema.layout import Arrays, Finish
from store_schema.plan.plan import Segment

PROMPTS, ANSWERS, PROMPT_TOKENS = "prompts", "answers", "prompt_tokens"
INVALID_UTF8 = "invalid_utf8"
NO_PROMPT, LATER_SEGMENTS = "without_prompt", "later_segments"
"""Segments that were not answered: documents without a prompt, and what follows a first segment."""


def finish_key(finish: Finish) -> str:
    """Name under which answers that ended so are counted."""
    return f"finish/{finish.name.lower()}"


def answer_seed(seed: int, source: str, segment_id: str, number: int) -> int:
    """Seed of one answer, from what it is and not from where it stands.

    Args:
        seed: The run's.
        source: Name of the source: sources that draw alike would write alike.
        segment_id: Of the prompt.
        number: Which of the prompt's answers.

    Returns:
        In [0, 2^63).
    """
    name = json.dumps([seed, source, segment_id, number])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def answer_text(data: bytes, finish: Finish) -> str | None:
    """The text of an answer; None where it is no UTF-8.

    An answer cut at its most tokens may end inside a character: what there is of it is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return decoder.decode(data, final=finish != Finish.LENGTH)
    except UnicodeDecodeError:
        return None


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """One answer as the store keeps it.

    Args:
        segment: Its context is the prompt.
        number: Which of the prompt's answers.
        finish: How it ended.
        token_ids: [N] uint32, the end token included.
        byte_ends: [N] uint32 end of each token in the answer's bytes.
        data: The bytes.
    """

    segment: Segment
    number: int
    finish: Finish
    token_ids: npt.NDArray[np.uint32]
    byte_ends: npt.NDArray[np.uint32]
    data: bytes


def kept_answer(segment: Segment, number: int, answer: Answer, rules: AnswerRules) -> KeptAnswer:
    """What an engine gave, as the store keeps it.

    Args:
        segment: Its context is the prompt.
        number: Which of the prompt's answers.
        answer: From the engine.
        rules: That it was made by.
    """
    ids = answer.token_ids.tolist()
    lengths = np.array([rules.lengths[i] for i in ids], np.int64)
    return KeptAnswer(
        segment,
        number,
        answer.finish,
        answer.token_ids.astype(np.uint32),
        np.cumsum(lengths).astype(np.uint32),
        b"".join([rules.tokens[i] for i in ids if i not in rules.end_ids]),
    )


NO_ANSWER = Answer(np.empty(0, np.int64), Finish.PROMPT_TOO_LONG)
"""To a prompt that did not fit."""


def answer_arrays(kept: Sequence[KeptAnswer]) -> Arrays:
    """The arrays of a generated store's shard (`store_schema.layout`).

    Args:
        kept: Answers by segment and number; none where a shard has no prompt.
    """

    def joined(parts: Sequence[npt.NDArray[Any]], dtype: str) -> npt.NDArray[Any]:
        whole: npt.NDArray[Any] = np.concatenate([np.empty(0, dtype), *parts])
        return whole.astype(dtype, copy=False)

    lengths = [len(answer.token_ids) for answer in kept]
    return {
        "segment_ids": np.array([answer.segment.index for answer in kept], np.int64),
        "answer_index": np.array([answer.number for answer in kept], np.uint32),
        "finish": np.array([answer.finish for answer in kept], np.uint8),
        "token_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "token_ids": joined([answer.token_ids for answer in kept], "<u4"),
        "byte_ends": joined([answer.byte_ends for answer in kept], "<u4"),
    }


def answer_stats(
    segments: Sequence[Segment], kept: Sequence[KeptAnswer], *, prompt_tokens: int, seconds: float
) -> dict[str, float]:
    """Figures of a shard: what was asked, what came of it and why, and what was passed over.

    Args:
        segments: All of the shard.
        kept: The answers.
        prompt_tokens: Tokens of the prompts, each counted once.
        seconds: That answering took.
    """
    stats: Counter[str] = Counter({finish_key(finish): 0 for finish in Finish})
    for answer in kept:
        stats[finish_key(answer.finish)] += 1
        stats[INVALID_UTF8] += answer_text(answer.data, answer.finish) is None
    tokens = sum(len(answer.token_ids) for answer in kept)
    return {
        **stats,
        PROMPTS: sum(segment.has_prompt for segment in segments),
        PROMPT_TOKENS: prompt_tokens,
        ANSWERS: len(kept),
        NO_PROMPT: sum(s.context is None and s.byte_start == 0 for s in segments),
        LATER_SEGMENTS: sum(segment.byte_start > 0 for segment in segments),
        INVALID_UTF8: stats[INVALID_UTF8],
        TOKENS: tokens,
        BYTES: sum(len(answer.data) for answer in kept),
        "seconds": seconds,
        "tokens_per_s": tokens / max(seconds, 1e-9),
    }
