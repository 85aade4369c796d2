"""A vocabulary as a table id -> bytes: all that the rest of the project knows about a tokenizer.

The table is found from what the tokenizer says of itself (its own serialised decoder), never from
its class, and is proved on every text that is tokenised: the tokens' joined bytes are the text.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from store_schema.errors import CorruptionError, TokenizerError
from store_schema.fingerprint import fingerprint

VOCABULARY_SCHEMA = pa.schema([("bytes", pa.binary()), ("special", pa.bool_())])


@dataclass(frozen=True)
class Vocabulary:
    """Bytes of every token.

    Args:
        spelt: Bytes by id; for special tokens how they are spelt, b"" for unused ids.
        special: [V] bool, True where an id stands for a role (BOS, EOS, padding, unknown).
    """

    spelt: tuple[bytes, ...]
    special: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.spelt)

    @cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """Bytes by id as a model means them: a special token stands for no text."""
        pairs = zip(self.spelt, self.special.tolist(), strict=True)
        return tuple(b"" if special else token for token, special in pairs)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[V] bytes of each token."""
        return np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the table: tokenizers with one table may still split otherwise."""
        special = np.flatnonzero(self.special).tolist()
        return fingerprint([[token.hex() for token in self.spelt], special])

    def byte_ends(self, ids: Sequence[int], text: bytes, *, where: str) -> npt.NDArray[np.uint32]:
        """End of each token in `text`, proved.

        A tokenizer that puts a space of its own before the text (SentencePiece's dummy prefix) is
        met half-way: that one space takes no bytes.

        Args:
            ids: Tokens of the whole text.
            text: UTF-8 bytes.
            where: Document or segment and tokenizer, for the message.

        Returns:
            [N] uint32, rising, the last one len(text).

        Raises:
            TokenizerError: The joined bytes are not the text; names the first byte that differs.
        """
        table = self.tokens
        joined = b"".join([table[i] for i in ids])
        if joined not in (text, b" " + text) and any(self.special[i] for i in ids):
            # Some tokenizers read "<s>" in a text as their BOS whatever they are told.
            table = self.spelt
            joined = b"".join([table[i] for i in ids])
        if joined not in (text, b" " + text):
            raise self._difference(ids, joined, text, where)
        virtual = len(joined) - len(text)
        ends = np.cumsum([len(table[i]) for i in ids], dtype=np.int64) - virtual
        return np.maximum(ends, 0).astype(np.uint32)

    def _difference(
        self, ids: Sequence[int], joined: bytes, text: bytes, where: str
    ) -> TokenizerError:
        same = next(
            (i for i, (a, b) in enumerate(zip(joined, text, strict=False)) if a != b),
            min(len(joined), len(text)),
        )
        unknown = [i for i in ids if self.special[i]]
        hint = "the tokenizer changes text (normaliser or unknown token); it cannot be aligned"
        if unknown:
            hint = f"token id {unknown[0]} stands for no text (unknown token); {hint}"
        return TokenizerError(
            f"tokens do not join to the text, first difference at byte {same}",
            where=where,
            expected=repr(text[max(same - 8, 0) : same + 16]),
            got=repr(joined[max(same - 8, 0) : same + 16]),
            hint=hint,
        )

    def to_parquet(self) -> bytes:
        """The table as a Parquet file, for a store."""
        table = pa.table({"bytes": pa.array(self.spelt, pa.binary()), "special": self.special})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes, *, where: str) -> Vocabulary:
        """Read what `to_parquet` wrote.

        Raises:
            CorruptionError: Not such a file.
        """
        try:
            # Not buffered ahead: a thread of Arrow's that lets go of a Python buffer while the
            # interpreter ends takes the process down with it.
            table = pq.read_table(
                pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False
            )
            matches = table.schema.equals(VOCABULARY_SCHEMA)
        # Damaged bytes come out of the Parquet reader as any of these.
        except (pa.ArrowException, ValueError, TypeError, OSError) as error:
            raise CorruptionError("vocabulary unreadable", where=where, got=str(error)) from error
        sound = matches and not any(column.null_count for column in table.columns)
        if not sound:
            raise CorruptionError(
                "not a vocabulary", where=where, expected=VOCABULARY_SCHEMA, got=table.schema
            )
        return cls(tuple(table["bytes"].to_pylist()), table["special"].to_numpy())


def vocabulary_of(tokenizer_json: str, *, where: str) -> Vocabulary:
    """The byte table of a serialised `tokenizers` tokenizer (the content of tokenizer.json).

    Understood: byte-level alphabets (GPT-2, Llama 3, Qwen), SentencePiece pieces with word marks
    and byte fallback (Llama 2, Mistral, Gemma), WordPiece continuations, and plain characters.

    Args:
        tokenizer_json: As `Tokenizer.to_str()` gives it.
        where: The model's name, for messages.

    Raises:
        TokenizerError: The decoder is of a kind whose bytes are not known.
    """
    spec = json.loads(tokenizer_json)
    pieces = _pieces(spec["model"])
    added = {item["id"]: item for item in spec.get("added_tokens", [])}
    size = max([*pieces.values(), *added], default=-1) + 1
    to_bytes = _piece_decoder(spec, where)
    tokens = [b""] * size
    for piece, index in pieces.items():
        if index not in added:
            tokens[index] = to_bytes(piece)
    special = np.ones(size, bool)
    special[list(pieces.values())] = False
    for index, item in added.items():
        special[index] = item["special"]
        tokens[index] = item["content"].encode()
    for index in _unknown_ids(spec["model"], pieces):
        special[index] = True
    return Vocabulary(tuple(tokens), special)


def _pieces(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {piece: index for index, (piece, _score) in enumerate(vocab)}


def _unknown_ids(model: dict[str, Any], pieces: dict[str, int]) -> list[int]:
    if isinstance(model.get("unk_id"), int):
        return [model["unk_id"]]
    unknown = model.get("unk_token")
    return [pieces[unknown]] if unknown in pieces else []


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The flat list of steps of a decoder or pre-tokenizer."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in _steps(inner, key)]
    return [part]


def _piece_decoder(spec: dict[str, Any], where: str) -> Any:
    decoders = _steps(spec.get("decoder"), "decoders")
    if not decoders:
        decoders = [
            step
            for step in _steps(spec.get("pre_tokenizer"), "pretokenizers")
            if step["type"] == "ByteLevel"
        ]
    kinds = {step["type"] for step in decoders}
    if "ByteLevel" in kinds:
        return _byte_level
    if "WordPiece" in kinds:
        prefix = next(step["prefix"] for step in decoders if step["type"] == "WordPiece")
        return lambda piece: (
            piece.removeprefix(prefix).encode()
            if piece.startswith(prefix)
            else b" " + piece.encode()
        )
    unknown = kinds - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if unknown:
        raise TokenizerError(
            "decoder of unknown kind",
            where=where,
            expected="ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip or WordPiece",
            got=", ".join(sorted(unknown)),
        )
    return _sentencepiece(decoders)


def _sentencepiece(decoders: list[dict[str, Any]]) -> Any:
    replacements = [
        (step["pattern"]["String"], step["content"])
        for step in decoders
        if step["type"] == "Replace" and "String" in step["pattern"]
    ]
    replacements += [(s["replacement"], " ") for s in decoders if s["type"] == "Metaspace"]
    fallback = any(step["type"] == "ByteFallback" for step in decoders)

    def to_bytes(piece: str) -> bytes:
        if fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass
        for mark, content in replacements:
            piece = piece.replace(mark, content)
        return piece.encode()

    return to_bytes


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE (Radford et al. 2019): character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in piece])
    except KeyError:
        return piece.encode()  # an added token kept as it is
