"""The file `pair_counts.bin` of an aligned store: counts of token pairs, made by one worker for all.

    a sealed JSON record: what was counted, how many distinct pairs, SHA-256 of what follows
    source tokens [P] uint32, target tokens [P] uint32, counts [P] int64, little-endian

Pairs are sorted by source token, then target token, so the same counts give the same bytes in any
worker, and several may write the file at once. It is a cache: readers of the store do not need it,
copies of the store leave it out, and a file that is missing, damaged or of other text is counted again.
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
    """What was counted: text, store, tokenizer, settings."""
    num_pairs: int = Field(ge=0)
    sha256: str
    """SHA-256 of the bytes after the record."""


@dataclass(frozen=True, slots=True)
class KeptCounts:
    """The counts file of one aligned store.

    Args:
        location: The aligned store.
        request: What is to be counted; a file of anything else is not used.
        sizes: Vocabulary sizes of source and target.
        max_pairs: Upper bound of the number of distinct pairs.
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
        """Replace `pairs` by the counts of the file; False where there is no file.

        Raises:
            CorruptionError: The file is damaged.
            MismatchError: It has counts of another request.
            SchemaVersionError: Written by a newer logitfuse.
            StorageError: The disk or object store refused.
        """
        limit = _MAX_HEAD_BYTES + _PAIR_BYTES * self.max_pairs
        data = read_bounded(self.location, COUNTS_FILE, limit)
        if data is None:
            return False
        pairs.restore(*self._parsed(data))
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
        """Refuse ids outside the vocabularies: compiled code uses them without a bounds check."""
        height, width = self.sizes
        keys = source * width + target
        sound = (source < height).all() and (target < width).all() and (counts > 0).all()
        if not sound or (np.diff(keys) <= 0).any():
            raise CorruptionError("not counts of two vocabularies", where=where, hint=_ANEW)
