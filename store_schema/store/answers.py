"""What the answers of a generated store say, read back from its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from store_schema.layout import Arrays, Finish
from store_schema.text.vocabulary import Vocabulary

TEXT_ARRAYS = ("segment_ids", "answer_index", "finish", "token_offsets", "token_ids", "byte_ends")
"""Arrays that say which prompts were answered, and what the answers say."""


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """One answer.

    Args:
        row: Segment whose context is the prompt, in the plan's segment table.
        number: Which of the prompt's answers.
        finish: How it ended.
        num_tokens: The final end-of-sequence token included.
        text: UTF-8, unless the model wrote otherwise or was cut inside a character.
    """

    row: int
    number: int
    finish: Finish
    num_tokens: int
    text: bytes


def read_answers(arrays: Arrays, vocabulary: Vocabulary) -> Iterator[StoredAnswer]:
    """Every answer of a shard, in order.

    Args:
        arrays: At least `TEXT_ARRAYS`.
        vocabulary: Of the store.
    """
    table = vocabulary.tokens
    columns = zip(
        arrays["segment_ids"].tolist(),
        arrays["answer_index"].tolist(),
        arrays["finish"].tolist(),
        arrays["token_offsets"][:-1].tolist(),
        arrays["token_offsets"][1:].tolist(),
        strict=True,
    )
    for row, number, finish, start, stop in columns:
        ids = arrays["token_ids"][start:stop]
        sizes = np.diff(arrays["byte_ends"][start:stop].astype(np.int64), prepend=0)
        # A token that ends an answer says nothing, even where the vocabulary spells it.
        said = ids[(sizes > 0) & (ids < len(table))].tolist()
        text = b"".join([table[i] for i in said])
        yield StoredAnswer(row, number, Finish(finish), stop - start, text)
