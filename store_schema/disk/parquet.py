"""Reading a Parquet file that may be hostile: refused where it claims more than its bytes can hold.

Text is first read as a dictionary with one number for each row, so that one long string which a
small file repeats a million times is seen before it is written out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from store_schema.errors import CorruptionError, LogitfuseError


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
    """A table of known schema.

    Args:
        source: The file.
        schema: Its columns; whether they may hold nulls is the caller's to say.
        max_rows: In what is read.
        max_bytes: Of what is read, decoded.
        where: The file, for messages.
        hint: What to do when it is damaged.
        row_group: The only one to read; None reads all.
        since: Last columns of the schema that files of earlier versions lack: null there.

    Raises:
        CorruptionError: Not such a table, damaged, or larger than it may be.
    """

    def fault(what: str, expected: object = None, got: object = None) -> CorruptionError:
        return CorruptionError(what, where=where, expected=expected, got=got, hint=hint)

    def require_at_most(what: str, limit: int, got: int) -> None:
        if not 0 <= got <= limit:
            raise fault(f"more {what} than there can be", f"at most {limit}", got)

    try:
        file = _opened(source, schema, since)
        chosen = list(range(file.num_row_groups)) if row_group is None else [row_group]
        # Not what a row group says of its columns: asked for damaged ones, Arrow aborts.
        groups = [file.metadata.row_group(i) for i in chosen]
        require_at_most("rows", max_rows, sum(group.num_rows for group in groups))
        require_at_most("bytes", max_bytes, sum(group.total_byte_size for group in groups))
        names = file.schema_arrow.names
        earlier = [name for name in schema.names if name not in since]
        if names != schema.names and names != earlier:
            raise fault("other columns", schema.names, str(names)[:200])
        table = file.read_row_groups(chosen)
        table.validate(full=True)
        require_at_most("rows", max_rows, len(table))
        require_at_most("bytes", max_bytes, sum(_decoded_bytes(c) for c in table.columns))
        for name in schema.names[len(names) :]:
            table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
        return _decoded(table, schema)
    except LogitfuseError:
        raise
    # Damaged bytes come out of the Parquet reader as any of these.
    except (pa.ArrowException, ValueError, TypeError, OSError, LookupError, OverflowError) as error:
        raise fault("not readable as Parquet", None, str(error)[:200]) from error


@contextmanager
def parquet_errors(where: str, hint: str) -> Iterator[None]:
    """CorruptionError for what the Parquet reader makes of damaged bytes.

    An OSError with a number is the disk's own and goes on as it is; the reader's has none.
    """
    try:
        yield
    except (pa.ArrowException, ValueError, IndexError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        got = str(error)[:200]
        raise CorruptionError("not readable as Parquet", where=where, got=got, hint=hint) from error


def _opened(source: bytes | BinaryIO, schema: pa.Schema, since: Collection[str]) -> pq.ParquetFile:
    def opened(texts: Sequence[str]) -> pq.ParquetFile:
        return pq.ParquetFile(
            pa.BufferReader(source) if isinstance(source, bytes) else source,
            read_dictionary=list(texts),
            page_checksum_verification=True,
            # Not ahead: a thread of Arrow's that lets go of a Python buffer while the interpreter
            # ends takes the process down with it.
            pre_buffer=False,
            thrift_string_size_limit=1 << 24,
        )

    texts = [field.name for field in schema if field.type in (pa.string(), pa.binary())]
    if since:  # Arrow takes no dictionary of a column that is not there
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
    """The table without dictionaries."""
    return pa.table(
        [_plain(c, f.type) for c, f in zip(table.columns, schema, strict=True)], schema=schema
    )


def _plain(column: pa.ChunkedArray, dtype: pa.DataType) -> pa.ChunkedArray:
    chunks = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in column.chunks]
    return pa.chunked_array(chunks, type=dtype)
