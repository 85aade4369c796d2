"""Counts of token pairs as they are kept in an aligned store: `pair_counts.bin`.

    a sealed JSON record: what was counted, how many distinct pairs, SHA-256 of what follows
    source tokens [P] uint32, target tokens [P] uint32, counts [P] int64, little-endian

Pairs stand by source token, then target token, so the same counts are the same bytes from any worker,
and several that write the file at once do no harm. No reader of the store asks for it, no copy takes
it along, and whoever finds none that is sound and of the same text counts again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from align.counts.pair_counts import DistinctPairs, Ids
from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.bounded import read_bounded
from store_schema.disk.location import Location
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import CorruptionError, MismatchError
from store_schema.fingerprint import bytes_digest

COUNTS_FILE = "pair_counts.bin"
_MAX_HEAD_BYTES = 64 << 10
_PAIR_BYTES = 16
_HEAD_END = b"\n}\n"
_ANEW = "counted again"


class CountsHead(StrictModel):
    """The record on top of the file."""

    schema_version: int = SCHEMA_VERSION
    request: dict[str, str | int]
    """What was counted: plan, store, tokenizers, settings."""
    num_pairs: int = Field(ge=0)
    sha256: str
    """Of the bytes after the record."""


@dataclass(frozen=True, slots=True)
class KeptCounts:
    """Where counts are kept, and which.

    Args:
        location: The aligned store.
        request: What is to be counted.
        sizes: Of the two vocabularies.
        max_pairs: There cannot be more.
    """

    location: Location
    request: dict[str, str | int]
    sizes: tuple[int, int]
    max_pairs: int

    def write(self, pairs: DistinctPairs) -> None:
        """Publish the file, whole or not at all."""
        source, target, counts = pairs.counts()
        body = source.astype("<u4").tobytes() + target.astype("<u4").tobytes()
        body += counts.astype("<i8").tobytes()
        head = CountsHead(request=self.request, num_pairs=len(counts), sha256=bytes_digest(body))
        self.location.write_atomic(COUNTS_FILE, seal(head) + body)

    def read_into(self, pairs: DistinctPairs) -> bool:
        """Fill `pairs` with what is kept; False where nothing is.

        Raises:
            CorruptionError: The file is damaged.
            MismatchError: It was counted on something else.
            SchemaVersionError: Written by a newer logitfuse.
            StorageError: The disk or object store refused.
        """
        limit = _MAX_HEAD_BYTES + _PAIR_BYTES * self.max_pairs
        data = read_bounded(self.location, COUNTS_FILE, limit)
        if data is None:
            return False
        pairs.take(*self._parsed(data))
        return True

    def _parsed(self, data: bytes) -> tuple[Ids, Ids, Ids]:
        where = f"{self.location.url}/{COUNTS_FILE}"
        end = data.find(_HEAD_END, 0, _MAX_HEAD_BYTES) + len(_HEAD_END)
        if end < len(_HEAD_END):
            raise CorruptionError("no record on top", where=where, hint=_ANEW)
        head = unseal(CountsHead, data[:end], where=where, hint=_ANEW)
        self._require_same(head, where)
        body = memoryview(data)[end:]
        expected = head.num_pairs * _PAIR_BYTES
        if len(body) != expected or bytes_digest(body) != head.sha256:
            raise CorruptionError(
                "counts are cut or changed",
                where=where,
                expected=f"{expected} bytes, SHA-256 {head.sha256[:16]}",
                got=f"{len(body)} bytes, {bytes_digest(body)[:16]}",
                hint=_ANEW,
            )
        ids = np.frombuffer(body, "<u4", 2 * head.num_pairs).astype(np.int64)
        source, target = ids[: head.num_pairs], ids[head.num_pairs :]
        counts = np.frombuffer(body, "<i8", head.num_pairs, 8 * head.num_pairs).astype(np.int64)
        self._require_sound(source, target, counts, where)
        return source, target, counts

    def _require_same(self, head: CountsHead, where: str) -> None:
        names = sorted({**head.request, **self.request})
        different = [n for n in names if head.request.get(n) != self.request.get(n)]
        if different:
            raise MismatchError(
                f"counts were made with another {', '.join(different)[:200]}",
                where=where,
                expected=self.request.get(different[0]),
                got=repr(head.request.get(different[0]))[:64],
                hint=_ANEW,
            )

    def _require_sound(self, source: Ids, target: Ids, counts: Ids, where: str) -> None:
        """Compiled code looks up what ids name unasked."""
        height, width = self.sizes
        keys = source * width + target
        sound = (source < height).all() and (target < width).all() and (counts > 0).all()
        if not sound or (np.diff(keys) <= 0).any():
            raise CorruptionError("not counts of two vocabularies", where=where, hint=_ANEW)
