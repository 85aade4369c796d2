"""Read single columns of a plan's segments, without their texts."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from store_schema.disk.parquet import ParquetFile, parquet_errors
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import CorruptionError
from store_schema.plan.plan import RESTORE, SEGMENT_SCHEMA, SEGMENTS_FILE, Plan


def segment_columns(plan: Plan, names: Sequence[str]) -> pa.Table:
    """Some columns of all segments, in the plan's order.

    Args:
        plan: The plan.
        names: Columns of `SEGMENT_SCHEMA`; those that a plan of an earlier version lacks are null.

    Raises:
        CorruptionError: The segment file is damaged.
        StorageError: It cannot be read.
    """
    where = f"{plan.location.url}/{SEGMENTS_FILE}"
    with storage_errors(plan.location.url), plan.location.open_read(SEGMENTS_FILE) as file:
        with parquet_errors(where, RESTORE):
            opened = ParquetFile(file, page_checksum_verification=True)
            there = [name for name in names if name in opened.schema_arrow.names]
            table = opened.read(there)
    size = plan.record.num_segments
    if there and len(table) != size:
        raise CorruptionError(
            "wrong number of segments", where=where, expected=size, got=len(table), hint=RESTORE
        )
    columns = {
        name: table[name] if name in there else pa.nulls(size, SEGMENT_SCHEMA.field(name).type)
        for name in names
    }
    return pa.table(columns)
