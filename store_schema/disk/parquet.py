"""Read Parquet files that may be damaged or hostile, without allocating more than a stated limit.

Text columns are read as dictionaries first, so that a long string that a small file repeats a million
times is refused before each row gets its own copy.

All of the package reads Parquet by `ParquetFile` here, which uses none of Arrow's threads: one that
lets go of Python's memory while the interpreter shuts down ends the process with SIGABRT (pyarrow
26.0.1; seen in 5 of 320 short commands on two busy cores).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from store_schema.errors import CorruptionError, LogitfuseError


class ParquetFile(pq.ParquetFile):  # type: ignore[misc]  # pyarrow has no types
    """pyarrow's reader, on the caller's thread alone.

    Args:
        source: Path, open file or Arrow buffer.
        options: As pyarrow's, but `pre_buffer`.
    """

    def __init__(self, source: Path | BinaryIO | pa.BufferReader, **options: Any) -> None:
        super().__init__(source, pre_buffer=False, **options)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows."""
        return super().read(columns, use_threads=False)

    def read_row_group(self, i: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one row group."""
        return super().read_row_group(i, columns, use_threads=False)

    def read_row_groups(self, row_groups: Sequence[int]) -> pa.Table:
        """The rows of some row groups."""
        return super().read_row_groups(row_groups, use_threads=False)

    def iter_batches(
        self,
        batch_size: int,
        row_groups: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """The rows in batches of this many at most."""
        yield from super().iter_batches(batch_size, row_groups, columns, use_threads=False)


def read_parquet(
    source: bytes | BinaryIO,
    schema: pa.Schema,
    *,
    max_rows: int,
    max_bytes: int,
    where: str,
    hint: str,
    row_group: int | None = None,
    since: Collection[str] = (),
) -> pa.Table:
    """Read a table of known schema.

    Args:
        source: The file.
        schema: Its columns; nulls are not checked for.
        max_rows: Rows that are read, at most.
        max_bytes: Decoded bytes that are read, at most.
        where: The file, for messages.
        hint: What to do when it is damaged, for messages.
        row_group: Index of the only row group to read; None reads all.
        since: The last columns of the schema, if files of earlier versions lack them: null there.

    Raises:
        CorruptionError: The file is damaged, has another schema, or exceeds a limit.
    """
    damaged = partial(CorruptionError, where=where, hint=hint)

    def require_at_most(what: str, limit: int, got: int) -> None:
        if not 0 <= got <= limit:
            what = f"more {what} than there can be"
            raise damaged(what, expected=f"at most {limit}", got=got)

    try:
        file = _opened(source, schema, since)
        chosen = list(range(file.num_row_groups)) if row_group is None else [row_group]
        # Only totals of row groups: asked for the metadata of damaged columns, Arrow aborts the
        # process.
        groups = [file.metadata.row_group(i) for i in chosen]
        require_at_most("rows", max_rows, sum(group.num_rows for group in groups))
        require_at_most("bytes", max_bytes, sum(group.total_byte_size for group in groups))
        names = file.schema_arrow.names
        earlier = [name for name in schema.names if name not in since]
        if names != schema.names and names != earlier:
            raise damaged("other columns", expected=schema.names, got=str(names)[:200])
        table = file.read_row_groups(chosen)
        table.validate(full=True)
        require_at_most("rows", max_rows, len(table))
        require_at_most("bytes", max_bytes, sum(_decoded_bytes(c) for c in table.columns))
        for name in schema.names[len(names) :]:
            table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
        return _decoded(table, schema)
    except LogitfuseError:
        raise
    # The Parquet reader may raise any of these for damaged bytes.
    except (pa.ArrowException, ValueError, TypeError, OSError, LookupError, OverflowError) as error:
        raise damaged("not readable as Parquet", got=str(error)[:200]) from error


@contextmanager
def parquet_errors(where: str, hint: str) -> Iterator[None]:
    """Turn the errors that the Parquet reader raises for damaged bytes into CorruptionError.

    An OSError with an errno comes from the disk and is raised as it is; the reader's have none.
    """
    try:
        yield
    except (pa.ArrowException, ValueError, IndexError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        got = str(error)[:200]
        raise CorruptionError("not readable as Parquet", where=where, got=got, hint=hint) from error


def _opened(source: bytes | BinaryIO, schema: pa.Schema, since: Collection[str]) -> ParquetFile:
    def opened(texts: Sequence[str]) -> ParquetFile:
        return ParquetFile(
            pa.BufferReader(source) if isinstance(source, bytes) else source,
            read_dictionary=list(texts),
            page_checksum_verification=True,
            thrift_string_size_limit=1 << 24,
        )

    texts = [field.name for field in schema if field.type in (pa.string(), pa.binary())]
    if since:  # Arrow refuses read_dictionary for a column that is not there
        there = opened(()).schema_arrow.names
        texts = [name for name in texts if name in there or name not in since]
    return opened(texts)


def _decoded_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of a text column once each row has its own copy."""
    total = 0
    for chunk in column.chunks:
        if isinstance(chunk, pa.DictionaryArray):
            lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
            total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total


def _decoded(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with dictionary columns as plain ones."""
    return pa.table(
        [_plain(c, f.type) for c, f in zip(table.columns, schema, strict=True)], schema=schema
    )


def _plain(column: pa.ChunkedArray, dtype: pa.DataType) -> pa.ChunkedArray:
    chunks = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in column.chunks]
    return pa.chunked_array(chunks, type=dtype)
