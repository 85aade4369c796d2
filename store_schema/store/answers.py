"""Decode the answers of a generated store from its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from store_schema.layout import Arrays, Finish
from store_schema.text.vocabulary import Vocabulary

TEXT_ARRAYS = ("segment_ids", "answer_index", "finish", "token_offsets", "token_ids", "byte_ends")
"""The arrays that answers are decoded from."""


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """One answer.

    Args:
        row: Row of the plan's segment table whose context is the prompt.
        number: Index among the prompt's answers.
        finish: How it ended.
        num_tokens: Number of tokens, with the final end-of-sequence token.
        text: UTF-8, unless the model wrote invalid bytes or was stopped inside a character.
    """

    row: int
    number: int
    finish: Finish
    num_tokens: int
    text: bytes


def read_answers(arrays: Arrays, vocabulary: Vocabulary) -> Iterator[StoredAnswer]:
    """Yield every answer of a shard, in order.

    Args:
        arrays: At least `TEXT_ARRAYS` of the shard.
        vocabulary: The store's vocabulary.
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
        # A token that ends an answer is no text, even if the vocabulary has bytes for it.
        text_ids = ids[(sizes > 0) & (ids < len(table))].tolist()
        text = b"".join([table[i] for i in text_ids])
        yield StoredAnswer(row, number, Finish(finish), stop - start, text)
