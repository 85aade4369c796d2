"""Tokens of a text that stands behind something, for tokenizers that put a space before every text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from store_schema.errors import TokenizerError

TextTokens = tuple[list[int], npt.NDArray[np.uint32]]
"""Ids of a text, and the end of each token in its UTF-8 bytes."""
Reader = Callable[[Sequence[str], Sequence[str]], list[TextTokens]]
"""Texts and where they stand to their tokens."""

MARKS = ("\n", ".")
"""What a text is read behind, so that it gets no space. The second is for texts whose beginning makes
one token with the first, and for tokenizers that change line ends."""


def read_behind(
    texts: Sequence[str], where: Sequence[str], opens: Sequence[bool], read: Reader
) -> list[TextTokens]:
    """Tokens of texts, without the space where a text does not open what the tokenizer reads.

    A text whose beginning makes a token with every mark is read with the space after all.

    Args:
        texts: To be read.
        where: Of each, for messages.
        opens: `ReadContext.opens` of each.
        read: The tokenizer's own way, with the space.
    """
    found: dict[int, TextTokens] = {}
    for mark in filter(lambda mark: _is_one_token(mark, read), MARKS):
        left = [i for i, opening in enumerate(opens) if not opening and i not in found]
        marked = read([mark + texts[i] for i in left], [where[i] for i in left])
        for i, tokens in zip(left, marked, strict=True):
            text_tokens = _without(tokens, len(mark.encode()))
            if text_tokens is not None:
                found[i] = text_tokens
    left = [i for i in range(len(texts)) if i not in found]
    found |= dict(zip(left, read([texts[i] for i in left], [where[i] for i in left]), strict=True))
    return [found[i] for i in range(len(texts))]


def _is_one_token(mark: str, read: Reader) -> bool:
    try:
        return _without(read([f"{mark}a"], [""])[0], len(mark.encode())) is not None
    except TokenizerError:
        return False


def _without(tokens: TextTokens, size: int) -> TextTokens | None:
    """Tokens behind the mark; None where one token is of both."""
    ids, ends = tokens
    first = int(np.searchsorted(ends, size, side="right"))
    if first == 0 or ends[first - 1] != size:
        return None
    return ids[first:], (ends[first:] - size).astype(ends.dtype)
