"""A vocabulary as a table id -> bytes: all that the rest of the project knows about a tokenizer.

The table is proved on every text that is tokenised: the tokens' joined bytes are the text.
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

from store_schema.errors import CorruptionError, TokenizerError
from store_schema.fingerprint import fingerprint

VOCABULARY_SCHEMA = pa.schema([("bytes", pa.binary()), ("special", pa.bool_())])
_NOT_NFC = (
    "set `corpus.unicode: nfc` and run `logitfuse corpus build` again, or leave such documents out "
    "with `corpus.on_bad: drop`"
)
_CHANGES_TEXT = (
    "the tokenizer changes text (normaliser, white space or unknown token): leave such documents out "
    "with `corpus.on_bad: drop`, or take a model whose tokenizer gives every text back"
)


@dataclass(frozen=True)
class Vocabulary:
    """Bytes of every token.

    Args:
        written: Bytes by id; for special tokens how they are written, b"" for unused ids.
        special: [V] bool, True where an id stands for a role (BOS, EOS, padding, unknown).
        unknown: Ids that the model gives text it has no piece for. Known where the tokenizer is at
            hand; a table read from a store has none.
    """

    written: tuple[bytes, ...]
    special: npt.NDArray[np.bool_]
    unknown: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.written)

    def first(self, size: int) -> Vocabulary:
        """The table of ids below `size` alone."""
        unknown = frozenset(i for i in self.unknown if i < size)
        return Vocabulary(self.written[:size], self.special[:size], unknown)

    @cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """Bytes by id as a model means them: a special token stands for no text."""
        pairs = zip(self.written, self.special.tolist(), strict=True)
        return tuple(b"" if special else token for token, special in pairs)

    def spelling(self, token_id: int) -> bytes:
        """How a token is written; models may have ids that their tokenizer does not know."""
        if token_id < len(self.written) and self.written[token_id]:
            return self.written[token_id]
        return f"<id {token_id}>".encode()

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[V] bytes of each token."""
        return np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))

    @cached_property
    def written_lengths(self) -> npt.NDArray[np.int64]:
        """[V] bytes of each token as it is written."""
        return np.fromiter(map(len, self.written), np.int64, len(self.written))

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the table: tokenizers with one table may still split otherwise."""
        special = np.flatnonzero(self.special).tolist()
        return fingerprint([[token.hex() for token in self.written], special])

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
        table, lengths = self.tokens, self.lengths
        joined = b"".join([table[i] for i in ids])
        if joined not in (text, b" " + text):
            # Some tokenizers read "<s>" in a text as their BOS whatever they are told. An unknown
            # token is none of them: that its spelling stands in the text is chance.
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
            what = "the tokenizer normalises text to NFC, and the corpus is not"
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
