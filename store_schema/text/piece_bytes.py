"""The bytes of a tokenizer's pieces, from the rules in its tokenizer.json.

Its decoder (or pre-tokenizer) determines how pieces are written: in the byte alphabet, with word marks
and byte pieces, or with continuation marks.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from store_schema.errors import TokenizerError
from store_schema.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

ToBytes = Callable[[list[str]], list[bytes]]
"""From pieces to their bytes."""


def vocabulary_of(backend: Tokenizer, *, where: str) -> Vocabulary:
    """The vocabulary, as bytes, of a `tokenizers` tokenizer.

    Supported are byte-level alphabets (GPT-2, Llama 3, Qwen), SentencePiece pieces with word marks and
    byte fallback (Llama 2, Mistral, Gemma), WordPiece continuations, and plain characters.

    Args:
        backend: The tokenizer of tokenizer.json.
        where: The model's name, for messages.

    Raises:
        TokenizerError: The decoder is of an unknown kind.
    """
    pieces: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    size = max(max(pieces.values(), default=-1), max(added, default=-1)) + 1
    to_bytes = _piece_decoder(backend, pieces, where)
    tokens = [b""] * size
    for index, token in zip(pieces.values(), to_bytes(list(pieces)), strict=True):
        tokens[index] = token
    special = np.ones(size, bool)
    special[np.fromiter(pieces.values(), np.int64, len(pieces))] = False
    for index, item in added.items():
        special[index] = item.special
        tokens[index] = item.content.encode()
        if _MARK in item.content and _is_also_a_piece(item, backend, pieces):
            [tokens[index]] = to_bytes([item.content])
    unknown = _unknown_ids(backend, pieces)
    special[unknown] = True
    return Vocabulary(tuple(tokens), special, frozenset(unknown))


def _is_also_a_piece(item: AddedToken, backend: Tokenizer, pieces: Mapping[str, int]) -> bool:
    """Whether an added token is matched in normalised text, where its word marks stand for spaces.

    So it is with Gemma's runs of word marks: a run of spaces in the text becomes one such token.
    """
    if item.special or type(backend.model).__name__ == "WordPiece":
        return False
    return item.normalized or item.content in pieces


def _unknown_ids(backend: Tokenizer, pieces: Mapping[str, int]) -> list[int]:
    if type(backend.model).__name__ == "Unigram":
        unknown = json.loads(backend.model.__getstate__()).get("unk_id")
        return [] if unknown is None else [unknown]
    token = backend.model.unk_token
    return [pieces[token]] if token in pieces else []


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The flat list of steps of a decoder or pre-tokenizer."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in _steps(inner, key)]
    return [part]


_MARK = "▁"
"""SentencePiece's word mark."""


def _rules(part: Any) -> dict[str, Any] | None:
    """A decoder or pre-tokenizer as in tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


def _piece_decoder(backend: Tokenizer, pieces: Mapping[str, int], where: str) -> ToBytes:
    decoders = _steps(_rules(backend.decoder), "decoders")
    if not decoders:
        decoders = [
            step
            for step in _steps(_rules(backend.pre_tokenizer), "pretokenizers")
            if step["type"] == "ByteLevel"
        ]
    kinds = {step["type"] for step in decoders}
    if "ByteLevel" in kinds:
        return _byte_level
    if "WordPiece" in kinds or (not kinds and type(backend.model).__name__ == "WordPiece"):
        return _word_pieces(backend, pieces)
    unknown = kinds - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if unknown:
        raise TokenizerError(
            "decoder of unknown kind",
            where=where,
            expected="ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip or WordPiece",
            got=", ".join(sorted(unknown)),
        )
    return _sentencepiece(decoders)


def _word_pieces(backend: Tokenizer, pieces: Mapping[str, int]) -> ToBytes:
    """Pieces that begin a word get a space before them, unless they may directly follow a letter.

    The tokenizer is tried with each piece directly after a letter. Pieces that it separates from the
    letter (punctuation and CJK characters in BERT's) occur in a text with or without a space, and get
    none.
    """
    trial = copy.deepcopy(backend)
    trial.no_padding()
    trial.no_truncation()
    trial.encode_special_tokens = True
    prefix = trial.model.continuing_subword_prefix
    words = [piece for piece in pieces if not piece.startswith(prefix)]
    read = trial.encode_batch([f"a{word}" for word in words], add_special_tokens=False)
    apart = {
        word
        for word, encoding in zip(words, read, strict=True)
        if (pieces[word], 1)
        in [(i, begin) for i, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True)]
    }

    def to_bytes(piece: str) -> bytes:
        if piece.startswith(prefix):
            return piece.removeprefix(prefix).encode()
        return piece.encode() if piece in apart else b" " + piece.encode()

    return lambda pieces: [to_bytes(piece) for piece in pieces]


def _sentencepiece(decoders: list[dict[str, Any]]) -> ToBytes:
    replacements = [
        (step["pattern"]["String"], step["content"])
        for step in decoders
        if step["type"] == "Replace" and "String" in step["pattern"]
    ]
    replacements += [(s["replacement"], " ") for s in decoders if s["type"] == "Metaspace"]
    singles: dict[str, bytes] = {}
    if any(step["type"] == "ByteFallback" for step in decoders):
        for value in range(256):
            for digits in (f"{value:02X}", f"{value:02x}"):
                singles[f"<0x{digits}>"] = bytes([value])

    def replaced(text: str) -> str:
        for mark, content in replacements:
            text = text.replace(mark, content)
        return text

    def to_bytes(pieces: list[str]) -> list[bytes]:
        # In one call on all pieces joined: 250,000 calls would take half a second.
        tokens = replaced("\0".join(pieces)).encode().split(b"\0")
        if len(tokens) != len(pieces):  # NUL is part of a piece
            tokens = [replaced(piece).encode() for piece in pieces]
        for place, piece in enumerate(pieces):
            if piece in singles:
                tokens[place] = singles[piece]
        return tokens

    return to_bytes


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (Radford et al. 2019) writes bytes as: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    unprintable = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(unprintable)})
    return alphabet


_NO_BYTE = chr(256)
_BYTES = dict.fromkeys(range(256), _NO_BYTE) | {
    ord(character): chr(byte) for character, byte in _byte_alphabet().items()
}
"""Table for `str.translate`: from a character of the alphabet to the Latin-1 character of its byte."""


def _byte_level(pieces: list[str]) -> list[bytes]:
    try:
        joined = "".join(pieces).translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return [_byte_level_piece(piece) for piece in pieces]
    ends = list(itertools.accumulate(map(len, pieces)))
    return [joined[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _byte_level_piece(piece: str) -> bytes:
    try:
        return piece.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()  # an added token, which is not in the byte alphabet
