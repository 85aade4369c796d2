"""Which segment of a plan a person names, and what was perhaps meant where there is none."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from difflib import SequenceMatcher
from heapq import nlargest
from itertools import takewhile
from operator import eq

import pyarrow.parquet as pq

from store_schema.disk.parquet import parquet_errors
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, MissingError
from store_schema.plan.plan import RESTORE, SEGMENTS_FILE, Plan, Segment, ShardRecord

_COMPARED = 500
"""Names that are compared letter by letter with one that is not there: the comparison is slow."""

_ALIKE = 0.6
"""Least share of two names' characters in common, in order, for one to be taken for the other."""

_LONGEST = 200
"""Characters of a name that are compared and told."""


def row_number(wanted: str) -> int | None:
    """A row where digits are given: ids of segments always have a '#'."""
    return int(wanted) if wanted.isascii() and wanted.isdecimal() and len(wanted) < 16 else None


def find_segment(plan: Plan, wanted: str) -> tuple[ShardRecord, Segment]:
    """A segment and the shard that holds it, by the segment's id or row.

    Raises:
        MissingError: The plan has no such segment.
        CorruptionError: The segment file is damaged.
    """
    record, row = find_shard(plan, wanted), row_number(wanted)
    segments = plan.segments(record)
    return record, next(
        s for s in segments if (s.segment_id == wanted if row is None else s.index == row)
    )


def find_shard(plan: Plan, wanted: str) -> ShardRecord:
    """The shard that holds a segment, by the segment's id or row.

    Raises:
        MissingError: The plan has no such segment.
        CorruptionError: The segment file is damaged.
    """
    row = row_number(wanted)
    if row is not None and row < plan.record.num_segments:
        starts = [record.start for record in plan.shards]
        # Shards without segments begin where the next one does: the last of equals has the row.
        return plan.shards[bisect_right(starts, row) - 1]
    if row is None:
        for record in plan.shards:
            if wanted in _column(plan, "segment_id", record):
                return record
    raise _missing("segment", wanted, plan, _column(plan, "segment_id"))


def segment_in_document(plan: Plan, document: str, wanted: str | None) -> str:
    """Id of a segment of one document.

    Args:
        plan: That has both.
        document: Its id.
        wanted: The segment's id or its number within the document; None is the only one.

    Raises:
        MissingError: The plan has no such document, or the document no such segment.
        ConfigError: None is asked for and there are several.
    """
    documents = _column(plan, "document_id")
    pairs = zip(documents, _column(plan, "segment_id"), strict=True)
    found = [segment for name, segment in pairs if name == document]
    if not found:
        raise _missing("document", document, plan, dict.fromkeys(documents))
    if wanted is None and len(found) == 1:
        return found[0]
    full = f"{document}#{wanted}"
    for name in (wanted, full):
        if name in found:
            return name
    where = f"document {_told(document)}"
    names = ", ".join(map(_told, found[:8])) + (f" and {len(found) - 8} more" if found[8:] else "")
    if wanted is None:
        raise ConfigError(
            "the document has several segments", where=where, expected=f"one of {names}"
        )
    raise MissingError(
        "no such segment", where=where, expected=f"one of {names}", got=_told(wanted)
    )


def _missing(kind: str, wanted: str, plan: Plan, names: Iterable[str]) -> MissingError:
    """What names look like, and the one that is most like what was asked for."""
    names = list(names)
    looks = [f"an id such as {_told(names[0])}"] if names else []
    if kind == "segment":
        looks.append(f"a row below {plan.record.num_segments}")
    near = nearest_name(wanted, names)
    return MissingError(
        f"no such {kind}",
        where=plan.location.url,
        expected=" or ".join(looks),
        got=_told(wanted),
        hint=("" if near is None else f"the nearest is {_told(near)}; ")
        + "`logitfuse store show` without --segment lists the first segments",
    )


def nearest_name(wanted: str, names: Iterable[str]) -> str | None:
    """The name most like the one that was asked for; None where none is like it."""
    wanted = wanted[:_LONGEST]

    def shared_ends(name: str) -> int:
        ends = map(eq, wanted, name), map(eq, reversed(wanted), reversed(name))
        return sum(sum(takewhile(bool, same)) for same in ends)

    def likeness(name: str) -> tuple[float, int]:
        return SequenceMatcher(None, name, wanted).ratio(), shared_ends(name)

    likely = nlargest(_COMPARED, (name for name in names if len(name) <= _LONGEST), shared_ends)
    best = max(likely, key=likeness, default=None)
    return None if best is None or likeness(best)[0] < _ALIKE else best


def _told(name: str) -> str:
    """A name of any characters, for a message."""
    return ascii(name[:_LONGEST])[1:-1]


def _column(plan: Plan, column: str, record: ShardRecord | None = None) -> list[str]:
    """A column of a shard's segments, or of all, without reading texts."""
    shard = "" if record is None else f", shard {record.index}"
    where = f"{plan.location.url}/{SEGMENTS_FILE}{shard}"
    with storage_errors(where), plan.location.open_read(SEGMENTS_FILE) as file:
        with parquet_errors(where, RESTORE):
            file = pq.ParquetFile(file, pre_buffer=False)
            table = (
                file.read(columns=[column])
                if record is None
                else file.read_row_group(record.index, columns=[column])
            )
            found: list[str] = table[column].to_pylist()
    return found
