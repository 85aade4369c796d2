"""Cutting documents into segments that fit every tokenizer, at natural breaks, losing no byte.

Pure functions over bytes. A piece is tokenised by itself with every tokenizer; if it fits all of
them it is a segment, else it is cut at the ends of those tokens and its parts are tokenised in the
next round. So each segment is measured alone, as it will be read (a part may take more tokens than
its share of the whole), and each round tokenises a whole batch at once. Time is linear in the text,
except in tokenizers, which get at most `BLOCK_BYTES` at once.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 1 << 18
"""Longer documents are cut into blocks before any tokenizer sees them: one letter repeated a
million times is a single word to a tokenizer whose time grows faster than its words."""

Ends = npt.NDArray[np.uint32]
Encoder = Callable[[Sequence["Piece"]], list[Ends]]
"""Byte ends of the tokens of each piece, tokenised by itself."""

_ONE_NEWLINE = rb"(?:\r\n?+|\n)"
_BREAKS: tuple[tuple[re.Pattern[bytes], float], ...] = (
    # Paragraph: after a blank line.
    (re.compile(_ONE_NEWLINE + rb"{2,}()"), 0.5),
    # Line: after its end.
    (re.compile(_ONE_NEWLINE + rb"()"), 0.5),
    # Sentence: before the space that follows it; after CJK full stops, which have no space.
    (
        re.compile(
            rb"[.!?][\"')\]]*+()(?= [^\s])|(?:\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f)()", re.DOTALL
        ),
        0.75,
    ),
    # Word: before the space that belongs to it in most vocabularies.
    (re.compile(rb"()[ \t](?=[^\s])"), 0.25),
)
"""Kinds of break, best first, each with the share of the limit that a segment must at least fill to
end there."""

_MAX_CLUSTER = 32
"""Characters to step back in search of the start of a visible character."""


@dataclass(frozen=True)
class Piece:
    """Part of a document.

    Args:
        document: Index in the batch.
        start: First byte in the document.
        data: UTF-8 bytes.
    """

    document: int
    start: int
    data: bytes

    @property
    def end(self) -> int:
        """End byte in the document."""
        return self.start + len(self.data)

    @cached_property
    def text(self) -> str:
        """The piece as text."""
        return self.data.decode("utf-8")


@dataclass(frozen=True, slots=True)
class Cut:
    """A segment: its first and end byte in the document, and its number of tokens by tokenizer."""

    start: int
    end: int
    num_tokens: tuple[int, ...]


class UnfitCharacterError(ValueError):
    """One character takes more tokens than a segment may have."""

    def __init__(self, piece: Piece, num_tokens: tuple[int, ...]) -> None:
        super().__init__(f"{piece.text!r} takes {num_tokens} tokens")
        self.piece = piece
        self.num_tokens = num_tokens


def cut_documents(
    texts: Sequence[bytes],
    budgets: Sequence[Sequence[int]],
    encoders: Sequence[Encoder],
    leads: Sequence[int | None] | None = None,
) -> list[list[Cut]]:
    """Cut documents so that each segment fits every tokenizer.

    Args:
        texts: UTF-8 bytes of each document, not empty.
        budgets: [documents][tokenizers] maximal tokens of a segment's text.
        encoders: One for each tokenizer.
        leads: For each document the index of the tokenizer that reads it first: text over that one's
            budget is cut by its tokens before the other tokenizers read the parts. None: all read it
            whole, and it is cut by all their tokens.

    Returns:
        For each document its segments in order; joined they are the document.

    Raises:
        UnfitCharacterError: A single character does not fit.
    """
    done: list[list[Cut]] = [[] for _ in texts]
    work = [piece for i, data in enumerate(texts) for piece in _blocks(i, data)]
    if leads is not None:
        work = _cut_by_leads(work, budgets, encoders, leads)
    while work:
        ends_by_tokenizer = [encoder(work) for encoder in encoders]
        left = []
        for piece, *ends in zip(work, *ends_by_tokenizer, strict=True):
            budget = budgets[piece.document]
            num_tokens = tuple(map(len, ends))
            if all(n <= most for n, most in zip(num_tokens, budget, strict=True)):
                done[piece.document].append(Cut(piece.start, piece.end, num_tokens))
                continue
            parts = list(_parts(piece, cut_points(piece.data, ends, budget)))
            if len(parts) == 1:
                raise UnfitCharacterError(piece, num_tokens)
            left += parts
        work = left
    for cuts in done:
        cuts.sort(key=lambda cut: cut.start)
    return done


def _cut_by_leads(
    pieces: Sequence[Piece],
    budgets: Sequence[Sequence[int]],
    encoders: Sequence[Encoder],
    leads: Sequence[int | None],
) -> list[Piece]:
    """The pieces; those over the budget of their lead tokenizer are cut into parts that about fit."""
    parts: dict[int, list[Piece]] = {}
    for lead, encode in enumerate(encoders):
        chosen = [i for i, piece in enumerate(pieces) if leads[piece.document] == lead]
        for i, ends in zip(chosen, encode([pieces[i] for i in chosen]), strict=True):
            most = budgets[pieces[i].document][lead]
            if len(ends) > most:
                parts[i] = list(_parts(pieces[i], cut_points(pieces[i].data, [ends], [most])))
    return [part for i, piece in enumerate(pieces) for part in parts.get(i, [piece])]


def _blocks(document: int, data: bytes) -> Iterator[Piece]:
    """The document, or parts of it short enough for any tokenizer, cut at natural breaks."""
    whole = Piece(document, 0, data)
    if len(data) <= BLOCK_BYTES:
        yield whole
        return
    breaks = _find_breaks(data)
    points = []
    start = 0
    while len(data) - start > BLOCK_BYTES:
        start = _best_break(data, breaks, start, start + BLOCK_BYTES)
        points.append(start)
    yield from _parts(whole, points)


def _parts(piece: Piece, points: Sequence[int]) -> Iterator[Piece]:
    bounds = [0, *points, len(piece.data)]
    for start, end in itertools.pairwise(bounds):
        yield Piece(piece.document, piece.start + start, piece.data[start:end])


def cut_points(data: bytes, ends: Sequence[Ends], budget: Sequence[int]) -> list[int]:
    """Where to cut a piece that does not fit, by its own tokens.

    Args:
        data: UTF-8 bytes of the piece.
        ends: For each tokenizer the byte ends of the piece's tokens.
        budget: For each tokenizer the maximal tokens of a part.

    Returns:
        Rising offsets inside the piece, each at a character's start; [] for a single character.
    """
    breaks = _find_breaks(data)
    points: list[int] = []
    start = 0
    while True:
        limit, share = _limit(ends, budget, start, len(data))
        if share <= 1 and points:
            return points
        if 1 < share <= 1.5:
            # Two parts of similar size rather than a full one and a tiny one without context.
            limit = min(limit, start + (len(data) - start) * 13 // 20)
        # A piece that does not fit is always cut.
        start = _best_break(data, breaks, start, min(limit, len(data) - 1))
        if start >= len(data):
            return points
        points.append(start)


def _limit(ends: Sequence[Ends], budget: Sequence[int], start: int, size: int) -> tuple[int, float]:
    """The last byte up to which a part from `start` fits every budget, and how many budgets the rest
    of the piece takes."""
    limit, share = size, 0.0
    for tokens, most in zip(ends, budget, strict=True):
        first = int(np.searchsorted(tokens, start, side="right")) if start else 0
        share = max(share, (len(tokens) - first) / most)
        if first + most < len(tokens):
            limit = min(limit, int(tokens[first + most - 1]))
    return limit, share


def _find_breaks(data: bytes) -> list[npt.NDArray[np.int64]]:
    """Offsets of each kind of break."""
    return [
        np.fromiter((m.end(m.lastindex or 0) for m in pattern.finditer(data)), np.int64)
        for pattern, _ in _BREAKS
    ]


def _best_break(
    data: bytes, breaks: Sequence[npt.NDArray[np.int64]], start: int, limit: int
) -> int:
    """The best offset to end a part that begins at `start`: after `start`, at most `limit`, or the
    end of its first character if that is beyond the limit."""
    for (_, least), offsets in zip(_BREAKS, breaks, strict=True):
        last = int(np.searchsorted(offsets, limit, side="right")) - 1
        if last >= 0 and offsets[last] > start + least * (limit - start):
            return int(offsets[last])
    boundary = _character_start(data, limit)
    if boundary <= start:
        return _next_character(data, start)
    return _cluster_start(data, boundary, start)


def _character_start(data: bytes, offset: int) -> int:
    while 0 < offset < len(data) and data[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset


def _next_character(data: bytes, offset: int) -> int:
    offset += 1
    while offset < len(data) and data[offset] & 0xC0 == 0x80:
        offset += 1
    return offset


def _cluster_start(data: bytes, offset: int, start: int) -> int:
    """`offset`, or the start of the visible character around it if within `_MAX_CLUSTER` steps."""
    here = offset
    for _ in range(_MAX_CLUSTER):
        if here <= start or here >= len(data):
            return offset
        before = _character_start(data, here - 1)
        if not _joined(
            data[before:here].decode(), data[here : _next_character(data, here)].decode()
        ):
            return here
        here = before
    return offset


def _joined(left: str, right: str) -> bool:
    """Whether two characters are parts of one visible character: a few cheap rules of UAX 29."""
    if left == "\r" and right == "\n":
        return True
    if unicodedata.category(right).startswith("M") or "\U0001f3fb" <= right <= "\U0001f3ff":
        return True
    if "\u200d" in (left, right):
        return True
    flags = "\U0001f1e6", "\U0001f1ff"
    return flags[0] <= left <= flags[1] and flags[0] <= right <= flags[1]
