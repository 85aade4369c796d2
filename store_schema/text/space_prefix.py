"""Tokens of a text that follows other text, for tokenizers that put a space before every text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from store_schema.errors import TokenizerError

TextTokens = tuple[list[int], npt.NDArray[np.uint32]]
"""Ids of a text, and the byte after each token in its UTF-8 bytes."""
Reader = Callable[[Sequence[str], Sequence[str]], list[TextTokens]]
"""From texts, and names of their segments for messages, to their tokens."""

MARKS = ("\n", ".")
"""Characters that are put before a text so that it gets no space. The second is for texts whose
beginning forms one token with the first, and for tokenizers that change line ends."""


def read_without_space(
    texts: Sequence[str], where: Sequence[str], opens: Sequence[bool], read: Reader
) -> list[TextTokens]:
    """Tokens of texts, without the space for those that do not get it (`ReadContext.opens`).

    A text whose beginning forms one token with every mark is tokenised with the space nevertheless.

    Args:
        texts: The texts.
        where: Name of each, for messages.
        opens: `ReadContext.opens` of each.
        read: Tokenises with the space.

    Returns:
        The tokens of each text.
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
    """Tokens after a mark of `size` bytes; None where a token has bytes of both."""
    ids, ends = tokens
    first = int(np.searchsorted(ends, size, side="right"))
    if first == 0 or ends[first - 1] != size:
        return None
    return ids[first:], (ends[first:] - size).astype(ends.dtype)
