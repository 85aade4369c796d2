"""Parquet is read on the caller's thread alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNTED = """
import io, os
import pyarrow as pa, pyarrow.parquet as pq
from store_schema.disk.parquet import ParquetFile

sink = io.BytesIO()
table = pa.table({name: pa.array(range(3000)).cast(pa.string()) for name in "abcdef"})
pq.write_table(table, sink, row_group_size=1000)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
for source in (sink, pa.BufferReader(sink.getvalue())):
    file = ParquetFile(source)
    got = [
        file.read(["b", "c"]).num_rows,
        file.read_row_group(1).num_rows,
        file.read_row_groups([0, 2]).num_rows,
        sum(len(batch) for batch in file.iter_batches(100, columns=["a", "b", "c"])),
    ]
    assert got == [3000, 1000, 2000, 3000], got
ours = threads() - before
pq.ParquetFile(sink).read()
print(ours, threads() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_no_thread_of_arrow_is_started() -> None:
    """One that frees Python's memory while the interpreter shuts down ends the process."""
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True)
    ours, pyarrows = map(int, done.stdout.split())
    assert (ours, pyarrows > 0) == (0, True), done.stderr
