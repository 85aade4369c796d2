"""A vocabulary as a table id -> bytes: all that the rest of the project knows about a tokenizer.

The table is proved on every text that is tokenised: the tokens' joined bytes are the text.
Where a run's file accepts a tokenizer that changes text, ends come from the tokenizer's own offsets
instead, and the table says so of itself (`exact` is False).
"""

from __future__ import annotations

import io
import itertools
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
_INEXACT = {b"logitfuse.exact": b"false"}
"""File metadata of a table whose joined bytes need not be the text; exact ones carry none."""


@dataclass(frozen=True)
class Vocabulary:
    """Bytes of every token.

    Args:
        written: Bytes by id; for special tokens how they are written, b"" for unused ids.
        special: [V] bool, True where an id stands for a role (BOS, EOS, padding, unknown).
        unknown: Ids that the model gives text it has no piece for. Known where the tokenizer is at
            hand; a table read from a store has none.
        exact: Whether joined token bytes are the text, proved. False: `written` is what a token most
            often stands for, byte ends came from offsets (`offset_ends`), and nothing may compare
            joined bytes with a text.
    """

    written: tuple[bytes, ...]
    special: npt.NDArray[np.bool_]
    unknown: frozenset[int] = frozenset()
    exact: bool = True

    def __len__(self) -> int:
        return len(self.written)

    def first(self, size: int) -> Vocabulary:
        """The table of ids below `size` alone."""
        unknown = frozenset(i for i in self.unknown if i < size)
        return Vocabulary(self.written[:size], self.special[:size], unknown, self.exact)

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
        inexact = [] if self.exact else ["inexact"]
        return fingerprint([[token.hex() for token in self.written], special, *inexact])

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
        ends = self._joined_ends(ids, text)
        if ends is None:
            raise self._difference(ids, text, where)
        return ends

    def _joined_ends(self, ids: Sequence[int], text: bytes) -> npt.NDArray[np.uint32] | None:
        """As `byte_ends`; None where the joined bytes are not the text."""
        table, lengths = self.tokens, self.lengths
        joined = b"".join([table[i] for i in ids])
        if joined not in (text, b" " + text):
            # Some tokenizers read "<s>" in a text as their BOS whatever they are told. An unknown
            # token is none of them: that its spelling stands in the text is chance.
            if not any(self.special[i] for i in ids) or not self.unknown.isdisjoint(ids):
                return None
            table, lengths = self.written, self.written_lengths
            joined = b"".join([table[i] for i in ids])
            if joined not in (text, b" " + text):
                return None
        virtual = len(joined) - len(text)
        ends = np.cumsum(lengths[np.asarray(ids, np.int64)]) - virtual
        return np.maximum(ends, 0).astype(np.uint32)

    def offset_ends(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str, *, where: str
    ) -> npt.NDArray[np.uint32]:
        """End of each token in `text` by the tokenizer's own offsets, where it changes text.

        Every byte belongs to one token. Text that the tokenizer drops (white space, control
        characters) goes to the token after it, at the end to the last. Of tokens that share a
        character, each ends at its own bytes where these are the text's; else the last of them
        takes the whole character, so that a row's probability is spent before its bytes are.
        Where the joined bytes are the text after all, the ends are those of `byte_ends`.

        Args:
            ids: Tokens of the whole text.
            offsets: The characters [first, stop) of the text that each token came from.
            text: As it was before the tokenizer changed it.
            where: Document or segment and tokenizer, for the message.

        Returns:
            [N] uint32, rising, the last one the text's length in bytes.

        Raises:
            TokenizerError: A token is the unknown one, or a text has no tokens at all.
        """
        data = text.encode()
        unknown = next((k for k, i in enumerate(ids) if i in self.unknown), None)
        if unknown is not None:
            first, last = offsets[unknown]
            raise TokenizerError(
                "the tokenizer has no piece for a part of the text",
                where=f"{where}, byte {len(text[:first].encode())}",
                got=f"{text[first:last][:24]!r} as token id {ids[unknown]} (unknown token)",
                hint="leave such documents out with `corpus.on_bad: drop`",
            )
        joined = self._joined_ends(ids, data)
        if joined is not None:
            return joined
        if not len(ids):
            raise TokenizerError(
                "the tokenizer drops the whole text",
                where=where,
                got=repr(text[:24]),
                hint="leave such documents out with `corpus.on_bad: drop`",
            )
        return self._spread_ends(ids, offsets, text, data)

    def _spread_ends(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str, data: bytes
    ) -> npt.NDArray[np.uint32]:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        byte_at = np.concatenate(([0], np.cumsum(sizes)))
        begins, stops = np.asarray(offsets, np.int64).T
        stops = np.maximum.accumulate(stops)
        following = np.append(np.minimum.accumulate(begins[::-1])[::-1][1:], len(text))
        shared = stops > following
        ends = byte_at[np.minimum(stops, following)]
        ends[-1] = len(data)
        firsts = np.flatnonzero(np.concatenate(([True], ~shared[:-1])))
        for first, after in itertools.pairwise([*firsts.tolist(), len(ids)]):
            if after == first + 1:
                continue
            start, stop = int(ends[first - 1]) if first else 0, int(ends[after - 1])
            tokens = [self.tokens[i] for i in ids[first:after]]
            joined, sums = b"".join(tokens), np.cumsum([len(token) for token in tokens])
            if data[start:stop].endswith(joined):
                ends[first:after] = stop - len(joined) + sums
            elif first == 0 and joined == b" " + data[:stop]:
                ends[:after] = np.maximum(sums - 1, 0)
        return np.asarray(ends, np.uint32)

    def num_changed(self, ids: Sequence[int], ends: npt.NDArray[np.uint32], text: bytes) -> int:
        """Tokens whose bytes in the table are not the text's: where an inexact table is wrong.

        A space of the tokenizer's own before the text is not counted.
        """
        changed, begin = 0, 0
        for i, end in zip(ids, ends.tolist(), strict=True):
            part = text[begin:end]
            own_space = begin == 0 and self.tokens[i] == b" " + part
            changed += self.tokens[i] != part and not own_space
            begin = end
        return changed

    def _difference(self, ids: Sequence[int], text: bytes, where: str) -> TokenizerError:
        joined = b"".join([self.tokens[i] for i in ids])
        joined = joined[joined.startswith(b" ") and not text.startswith(b" ") :]
        same = next(
            (i for i, (a, b) in enumerate(zip(joined, text, strict=False)) if a != b),
            min(len(joined), len(text)),
        )
        unknown = [i for i in ids if i in self.unknown] or [i for i in ids if self.special[i]]
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
        table = pa.table({"bytes": pa.array(self.written, pa.binary()), "special": self.special})
        if not self.exact:
            table = table.replace_schema_metadata(_INEXACT)
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
        exact = (table.schema.metadata or {}).get(b"logitfuse.exact") != b"false"
        return cls(tuple(table["bytes"].to_pylist()), table["special"].to_numpy(), exact=exact)
