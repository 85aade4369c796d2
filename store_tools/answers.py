"""Checks of a generated store: do its answers belong to the plan's prompts?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from store_schema.errors import CorruptionError
from store_schema.layout import Arrays, Finish
from store_schema.plan.plan import Segment
from store_schema.store.guards import REPAIR
from store_schema.text.vocabulary import Vocabulary

ANSWERS_SETTING = "answers"
"""Key in the manifest's settings: number of answers to each prompt."""


def compare_answers(
    arrays: Arrays,
    segments: Sequence[Segment],
    per_prompt: object,
    vocabulary: Vocabulary | None,
    where: str,
) -> None:
    """Check that the answers of a shard are those to its prompts, and end where their tokens do.

    Args:
        arrays: `TEXT_ARRAYS` of the shard.
        segments: Segments of the shard in the plan.
        per_prompt: Number of answers to each prompt; anything but an int skips that check.
        vocabulary: The store's vocabulary; None skips the check of the tokens' bytes.
        where: Store and shard, for messages.

    Raises:
        CorruptionError: Names the array.
    """
    prompts = np.array([segment.index for segment in segments if segment.has_prompt], np.int64)
    rows, numbers = arrays["segment_ids"], arrays["answer_index"]
    answered = np.unique(rows)
    same = np.array_equal(answered, prompts)
    if type(per_prompt) is int:
        # Lengths first: the number is only a claim of the manifest.
        same = same and len(rows) == per_prompt * len(prompts)
        if same and len(rows):
            same = np.array_equal(numbers, np.tile(np.arange(per_prompt), len(prompts)))
    if not same:
        raise CorruptionError(
            "answers are not those to the plan's prompts",
            where=f"{where}, array segment_ids or answer_index",
            expected=f"the same number to each of {len(prompts)} prompts",
            got=f"{len(rows)} answers to {len(answered)} segments",
            hint=REPAIR,
        )
    if vocabulary is not None:
        _compare_sizes(arrays, vocabulary, where)


def _compare_sizes(arrays: Arrays, vocabulary: Vocabulary, where: str) -> None:
    """Check that each token has as many bytes as in the vocabulary."""
    ids, offsets = arrays["token_ids"], arrays["token_offsets"]
    if len(ids) and ids.max() >= len(vocabulary):
        raise CorruptionError(
            "token is not in the vocabulary",
            where=f"{where}, array token_ids",
            expected=f"below {len(vocabulary)}",
            got=int(ids.max()),
            hint=REPAIR,
        )
    if not np.array_equal(_ends(vocabulary.lengths[ids], offsets, arrays), arrays["byte_ends"]):
        raise CorruptionError(
            "byte ends are not those of the tokens",
            where=f"{where}, array byte_ends",
            hint=REPAIR,
        )


def _ends(
    lengths: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], arrays: Arrays
) -> npt.NDArray[np.int64]:
    """Byte ends [N] within each answer, from the bytes of each token; its end token has none."""
    by_token = (arrays["finish"] == Finish.STOP) | (arrays["finish"] == Finish.EMPTY)
    lengths[offsets[1:][by_token & (np.diff(offsets) > 0)] - 1] = 0
    totals = np.concatenate([[0], np.cumsum(lengths)])
    ends: npt.NDArray[np.int64] = totals[1:] - np.repeat(totals[offsets[:-1]], np.diff(offsets))
    return ends
