"""Find the segment of a plan that a command line names; suggest the nearest name if there is none."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from difflib import SequenceMatcher
from heapq import nlargest
from itertools import takewhile
from operator import eq

from store_schema.disk.parquet import ParquetFile, parquet_errors
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, MissingError
from store_schema.plan.plan import RESTORE, SEGMENTS_FILE, Plan, Segment, ShardRecord

_COMPARED = 500
"""Candidates that are compared by SequenceMatcher, which is slow."""

_ALIKE = 0.6
"""Least SequenceMatcher ratio of a name that is suggested."""

_LONGEST = 200
"""Characters of a name that are compared and shown."""


def row_number(wanted: str) -> int | None:
    """The row number that `wanted` is, None if it is an id (ids of segments always have a '#')."""
    return int(wanted) if wanted.isascii() and wanted.isdecimal() and len(wanted) < 16 else None


def find_segment(plan: Plan, wanted: str) -> tuple[ShardRecord, Segment]:
    """A segment and its shard, by the segment's id or row.

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
    """The shard of a segment, by the segment's id or row.

    Raises:
        MissingError: The plan has no such segment.
        CorruptionError: The segment file is damaged.
    """
    row = row_number(wanted)
    if row is not None and row < plan.record.num_segments:
        starts = [record.start for record in plan.shards]
        # A shard without segments has the same start as the next one: the last of them has the row.
        return plan.shards[bisect_right(starts, row) - 1]
    if row is None:
        for record in plan.shards:
            if wanted in _column(plan, "segment_id", record):
                return record
    raise _missing("segment", wanted, plan, _column(plan, "segment_id"))


def segment_in_document(plan: Plan, document: str, wanted: str | None) -> str:
    """Id of a segment of one document.

    Args:
        plan: The plan.
        document: The document's id.
        wanted: The segment's id or its number within the document; None for the only one.

    Raises:
        MissingError: The plan has no such document, or the document no such segment.
        ConfigError: `wanted` is None and there are several.
    """
    documents = _column(plan, "document_id")
    pairs = zip(documents, _column(plan, "segment_id"), strict=True)
    ids = [segment for name, segment in pairs if name == document]
    if not ids:
        raise _missing("document", document, plan, dict.fromkeys(documents))
    if wanted is None and len(ids) == 1:
        return ids[0]
    full = f"{document}#{wanted}"
    for name in (wanted, full):
        if name in ids:
            return name
    where = f"document {_printable(document)}"
    names = ", ".join(map(_printable, ids[:8])) + (f" and {len(ids) - 8} more" if ids[8:] else "")
    if wanted is None:
        raise ConfigError(
            "the document has several segments", where=where, expected=f"one of {names}"
        )
    raise MissingError(
        "no such segment", where=where, expected=f"one of {names}", got=_printable(wanted)
    )


def _missing(kind: str, wanted: str, plan: Plan, names: Iterable[str]) -> MissingError:
    """The error for a name that the plan does not have, with an example and the nearest name."""
    names = list(names)
    looks = [f"an id such as {_printable(names[0])}"] if names else []
    if kind == "segment":
        looks.append(f"a row below {plan.record.num_segments}")
    near = nearest_name(wanted, names)
    return MissingError(
        f"no such {kind}",
        where=plan.location.url,
        expected=" or ".join(looks),
        got=_printable(wanted),
        hint=("" if near is None else f"the nearest is {_printable(near)}; ")
        + "`logitfuse store show` without --segment lists the first segments",
    )


def nearest_name(wanted: str, names: Iterable[str]) -> str | None:
    """The name most similar to `wanted`; None where none is similar."""
    wanted = wanted[:_LONGEST]

    def shared_ends(name: str) -> int:
        ends = map(eq, wanted, name), map(eq, reversed(wanted), reversed(name))
        return sum(sum(takewhile(bool, same)) for same in ends)

    def likeness(name: str) -> tuple[float, int]:
        return SequenceMatcher(None, name, wanted).ratio(), shared_ends(name)

    def promise(name: str) -> tuple[int, int]:
        return shared_ends(name), -abs(len(name) - len(wanted))

    likely = nlargest(_COMPARED, (name for name in names if len(name) <= _LONGEST), promise)
    best = max(likely, key=likeness, default=None)
    return None if best is None or likeness(best)[0] < _ALIKE else best


def _printable(name: str) -> str:
    """A name with only ASCII characters, for a message."""
    return ascii(name[:_LONGEST])[1:-1]


def _column(plan: Plan, column: str, record: ShardRecord | None = None) -> list[str]:
    """A column of one shard's segments, or of all segments, without reading texts."""
    shard = "" if record is None else f", shard {record.index}"
    where = f"{plan.location.url}/{SEGMENTS_FILE}{shard}"
    with storage_errors(where), plan.location.open_read(SEGMENTS_FILE) as file:
        with parquet_errors(where, RESTORE):
            file = ParquetFile(file)
            table = (
                file.read(columns=[column])
                if record is None
                else file.read_row_group(record.index, columns=[column])
            )
            values: list[str] = table[column].to_pylist()
    return values
