"""The first token of the target's tokenizer for every suffix (piece) of every source token.

The tokenizer encodes all distinct pieces in one batch; nothing depends on its class. A piece that is
not valid UTF-8 (cut inside a character) gets the longest target token that is a prefix of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary

NO_TOKEN = -1

# Text that is put before a piece, tried in order, until a token begins exactly at the piece: a letter
# would merge with a word, white space with white space.
_ANCHORS_BEFORE_SPACE = ("a", ".", "\n")
_ANCHORS_BEFORE_TEXT = ("\n", " ", ".", "a")


class PieceTable(NamedTuple):
    """The bytes of a source vocabulary, end to end, and at each byte the target's first token.

    Args:
        data: [bytes] uint8, tokens one after the other; special tokens have no bytes.
        offsets: [V+1] int64, where each token begins in `data`.
        middle: [bytes] int32, first target token of the piece from this byte to its source token's end,
            in running text; -1 for none.
        start: [bytes] int32, the same where the piece is the beginning of the whole text.
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    middle: npt.NDArray[np.int32]
    start: npt.NDArray[np.int32]


def piece_table(source: Vocabulary, target: SegmentTokenizer) -> PieceTable:
    """The table for a source vocabulary and the target's tokenizer."""
    pieces: dict[bytes, int] = {}
    index = []
    for token in source.tokens:
        for cut in range(len(token)):
            index.append(pieces.setdefault(token[cut:], len(pieces)))
    distinct = list(pieces)
    rows = np.asarray(index, np.int64)
    middle, start = _first_in_text(distinct, target), _first_at_start(distinct, target)
    return PieceTable(
        data=np.frombuffer(b"".join(source.tokens), np.uint8),
        offsets=np.concatenate(([0], np.cumsum(source.lengths))),
        middle=middle[rows] if len(rows) else np.empty(0, np.int32),
        start=start[rows] if len(rows) else np.empty(0, np.int32),
    )


def _first_at_start(pieces: Sequence[bytes], target: SegmentTokenizer) -> npt.NDArray[np.int32]:
    """[P] first token that has bytes, where the piece is the beginning of the whole text."""
    tokens_P = _longest_prefix(pieces, target.vocabulary)
    texts, rows = _as_text(pieces, range(len(pieces)))
    lengths = target.vocabulary.lengths
    for row, ids in zip(rows, target.encode_text(texts), strict=True):
        first = next((i for i in ids if i >= len(lengths) or lengths[i] > 0), NO_TOKEN)
        if first < len(lengths):  # else a token that the target has no row for
            tokens_P[row] = first
    return tokens_P


def _first_in_text(pieces: Sequence[bytes], target: SegmentTokenizer) -> npt.NDArray[np.int32]:
    """[P] first token of each piece where other text stands before it."""
    tokens_P = _longest_prefix(pieces, target.vocabulary)
    left = list(range(len(pieces)))
    for attempt in range(len(_ANCHORS_BEFORE_TEXT)):
        texts, rows = _as_text(pieces, left)
        anchors = [_anchor(text, attempt) for text in texts]
        batch = target.encode_text([a + text for a, text in zip(anchors, texts, strict=True)])
        left = []
        for row, anchor, ids in zip(rows, anchors, batch, strict=True):
            token = _token_after(ids, anchor, pieces[row], target.vocabulary)
            if token == NO_TOKEN:
                left.append(row)
            else:
                tokens_P[row] = token
        if not left:
            break
    return tokens_P


def _anchor(text: str, attempt: int) -> str:
    anchors = _ANCHORS_BEFORE_SPACE if text[:1].isspace() else _ANCHORS_BEFORE_TEXT
    return anchors[min(attempt, len(anchors) - 1)]


def _token_after(ids: Sequence[int], anchor: str, piece: bytes, vocabulary: Vocabulary) -> int:
    """The token right after `anchor`, NO_TOKEN where no token starts there; a space that the tokenizer
    itself puts before the text is ignored."""
    tokens = vocabulary.tokens
    read = b""
    wanted = (anchor.encode(), b" " + anchor.encode())
    for i, token in enumerate(ids[:-1]):
        following = ids[i + 1]
        if max(token, following) >= len(tokens):  # a token that the target has no row for
            return NO_TOKEN
        read += tokens[token]
        if (read in wanted and not anchor.isspace()) or read == wanted[0]:
            starts = tokens[following] and piece.startswith(tokens[following])
            return following if starts else NO_TOKEN
    return NO_TOKEN


def _as_text(pieces: Sequence[bytes], rows: Sequence[int]) -> tuple[list[str], list[int]]:
    texts, kept = [], []
    for row in rows:
        try:
            texts.append(pieces[row].decode())
            kept.append(row)
        except UnicodeDecodeError:
            continue
    return texts, kept


def _longest_prefix(pieces: Sequence[bytes], vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """[P] longest target token that is a prefix of each piece: right for single bytes, else a guess."""
    by_bytes = {token: i for i, token in enumerate(vocabulary.tokens) if token}
    longest = max(map(len, by_bytes), default=0)
    tokens_P = np.full(len(pieces), NO_TOKEN, np.int32)
    for row, piece in enumerate(pieces):
        for length in range(min(len(piece), longest), 0, -1):
            token = by_bytes.get(piece[:length])
            if token is not None:
                tokens_P[row] = token
                break
    return tokens_P
