"""Which shard of a plan holds a segment that a person names."""

from __future__ import annotations

from bisect import bisect_right

import pyarrow.parquet as pq

from store_schema.disk.parquet import parquet_errors
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import MissingError
from store_schema.plan.plan import RESTORE, SEGMENTS_FILE, Plan, ShardRecord


def row_number(wanted: str) -> int | None:
    """A row where digits are given: ids of segments always have a '#'."""
    return int(wanted) if wanted.isascii() and wanted.isdecimal() and len(wanted) < 16 else None


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
            if wanted in _segment_ids(plan, record):
                return record
    raise MissingError(
        "no such segment",
        where=plan.location.url,
        got=ascii(wanted)[1:-1],
        hint="`logitfuse store show` without --segment lists the first ones",
    )


def _segment_ids(plan: Plan, record: ShardRecord) -> list[str]:
    """Segment ids of a shard, without reading its texts; the shard found is checked when read."""
    where = f"{plan.location.url}/{SEGMENTS_FILE}, shard {record.index}"
    with storage_errors(where), plan.location.open_read(SEGMENTS_FILE) as file:
        with parquet_errors(where, RESTORE):
            table = pq.ParquetFile(file, pre_buffer=False).read_row_group(
                record.index, columns=["segment_id"]
            )
            found: list[str] = table["segment_id"].to_pylist()
    return found
