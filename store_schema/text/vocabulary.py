"""A vocabulary as a table from id to bytes.

The table is checked on every text that is tokenised: the joined bytes of its tokens must be the text.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from store_schema.disk.parquet import ParquetFile
from store_schema.errors import CorruptionError, TokenizerError
from store_schema.fingerprint import fingerprint

VOCABULARY_SCHEMA = pa.schema([("bytes", pa.binary()), ("special", pa.bool_())])
_NOT_NFC = (
    "set `corpus.unicode: nfc` and run `logitfuse corpus build` again, or leave such documents out "
    "with `corpus.on_bad: drop`"
)
_CHANGES_TEXT = (
    "the tokenizer changes text (normaliser, white space or unknown token): leave such documents out "
    "with `corpus.on_bad: drop`, or take a model whose tokenizer does not change text"
)


@dataclass(frozen=True)
class Vocabulary:
    """Bytes of every token.

    Args:
        written: Bytes by id; the name of a special token, b"" for unused ids.
        special: [V] bool, True for special tokens (BOS, EOS, padding, unknown).
        unknown: Ids of tokens for text without a piece. Empty in a table read from a store.
    """

    written: tuple[bytes, ...]
    special: npt.NDArray[np.bool_]
    unknown: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.written)

    def first(self, size: int) -> Vocabulary:
        """The table of the ids below `size`."""
        unknown = frozenset(i for i in self.unknown if i < size)
        return Vocabulary(self.written[:size], self.special[:size], unknown)

    @cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """Bytes of text by id: as `written`, but b"" for special tokens."""
        tokens = list(self.written)
        for special in np.flatnonzero(self.special).tolist():
            tokens[special] = b""
        return tuple(tokens)

    def spelling(self, token_id: int) -> bytes:
        """`written` of a token; "<id N>" for ids that the tokenizer does not have."""
        if token_id < len(self.written) and self.written[token_id]:
            return self.written[token_id]
        return f"<id {token_id}>".encode()

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[V] lengths of `tokens` in bytes."""
        return np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))

    @cached_property
    def written_lengths(self) -> npt.NDArray[np.int64]:
        """[V] lengths of `written` in bytes."""
        return np.fromiter(map(len, self.written), np.int64, len(self.written))

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the table. Tokenizers with the same table may still split differently."""
        special = np.flatnonzero(self.special).tolist()
        return fingerprint([[token.hex() for token in self.written], special])

    def byte_ends(self, ids: Sequence[int], text: bytes, *, where: str) -> npt.NDArray[np.uint32]:
        """Byte after each token in `text`; checks that the tokens join to the text.

        A space that the tokenizer puts before the text (SentencePiece's dummy prefix) is accepted and
        counts no byte.

        Args:
            ids: Tokens of the whole text.
            text: UTF-8 bytes.
            where: Document or segment and tokenizer, for the message.

        Returns:
            [N] uint32, rising, the last one len(text).

        Raises:
            TokenizerError: The joined bytes are not the text; names the first byte that differs.
        """
        table, lengths = self.tokens, self.lengths
        joined = b"".join([table[i] for i in ids])
        if joined not in (text, b" " + text):
            # Some tokenizers always read "<s>" in a text as their BOS. An unknown token is different:
            # if its name is in the text, that is chance.
            if not any(self.special[i] for i in ids) or not self.unknown.isdisjoint(ids):
                raise self._difference(ids, text, where)
            table, lengths = self.written, self.written_lengths
            joined = b"".join([table[i] for i in ids])
            if joined not in (text, b" " + text):
                raise self._difference(ids, text, where)
        virtual = len(joined) - len(text)
        ends = np.cumsum(lengths[np.asarray(ids, np.int64)]) - virtual
        return np.maximum(ends, 0).astype(np.uint32)

    def _difference(self, ids: Sequence[int], text: bytes, where: str) -> TokenizerError:
        joined = b"".join([self.tokens[i] for i in ids])
        joined = joined[joined.startswith(b" ") and not text.startswith(b" ") :]
        if joined == unicodedata.normalize("NFC", text.decode(errors="replace")).encode():
            what = "the tokenizer normalises text to NFC, but the corpus is not in NFC"
            return TokenizerError(what, where=where, hint=_NOT_NFC)
        same = next(
            (i for i, (a, b) in enumerate(zip(joined, text, strict=False)) if a != b),
            min(len(joined), len(text)),
        )
        unknown = [i for i in ids if i in self.unknown] or [i for i in ids if self.special[i]]
        hint = _CHANGES_TEXT
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
        table = pa.table({"bytes": pa.array(self.written, pa.binary()), "special": self.special})
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
            table = ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
            matches = table.schema.equals(VOCABULARY_SCHEMA)
        # The Parquet reader may raise any of these for damaged bytes.
        except (pa.ArrowException, ValueError, TypeError, OSError) as error:
            raise CorruptionError("vocabulary unreadable", where=where, got=str(error)) from error
        sound = matches and not any(column.null_count for column in table.columns)
        if not sound:
            raise CorruptionError(
                "not a vocabulary", where=where, expected=VOCABULARY_SCHEMA, got=table.schema
            )
        return cls(tuple(table["bytes"].to_pylist()), table["special"].to_numpy())
