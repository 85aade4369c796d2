"""The files of a shard are byte for byte those that zarr writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from store_schema.disk.pco import DTYPES, PcoCodec
from store_schema.encoding import shard_io
from store_schema.encoding.group import StoredSpec

Arrays = dict[str, npt.NDArray[Any]]


def by_zarr(arrays: Arrays, specs: list[StoredSpec], chunk_size: int) -> dict[str, bytes]:
    """The plain way: zarr makes the group and every array."""
    store = MemoryStore()
    group = zarr.create_group(store)
    for spec in specs:
        data = arrays[spec.name]
        chunk = min(chunk_size, max(len(data), 1))
        array = group.create_array(
            spec.name,
            shape=data.shape,
            dtype=data.dtype,
            chunks=(chunk,),
            shards=(chunk * max(-(-len(data) // chunk), 1),),
            serializer=PcoCodec(delta_spec="auto" if spec.delta else "none"),
            compressors=[Crc32cCodec()],
            fill_value=0,
            attributes={"axis": spec.axis},
            config={"write_empty_chunks": True},
        )
        if len(data):
            array[:] = data
    return {key: buffer.to_bytes() for key, buffer in store._store_dict.items()}


@st.composite
def groups(draw: st.DrawFn) -> tuple[Arrays, list[StoredSpec]]:
    arrays, specs = {}, []
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        length = draw(st.integers(0, 40))
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        steps = rng.integers(0, draw(st.sampled_from([1, 5, 1 << 20])), length)
        name = f"a{number}"
        arrays[name] = (np.cumsum(steps) if draw(st.booleans()) else steps).astype(dtype)
        specs.append(StoredSpec(name, arrays[name].dtype.str, "N", delta=draw(st.booleans())))
    return arrays, specs


@given(groups(), st.integers(1, 17))
@settings(max_examples=60)
def test_any_arrays_in_chunks_of_any_size(
    made: tuple[Arrays, list[StoredSpec]], chunk: int
) -> None:
    arrays, specs = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_io, "CHUNK", chunk)
        files = shard_io.shard_files(arrays, specs)
    assert files == by_zarr(arrays, specs, chunk)
    records = shard_io.file_records(files)
    assert {key: record.size for key, record in records.items()} == {
        key: len(data) for key, data in files.items()
    }


@pytest.mark.parametrize("length", [0, 1, shard_io.CHUNK - 1, shard_io.CHUNK, shard_io.CHUNK + 1])
def test_around_the_size_of_a_chunk(length: int) -> None:
    arrays = {"ids": np.random.default_rng(length).geometric(0.02, length).astype("<u4")}
    specs = [StoredSpec("ids", "<u4", "E")]
    assert shard_io.shard_files(arrays, specs) == by_zarr(arrays, specs, shard_io.CHUNK)


@pytest.mark.filterwarnings("ignore:Numcodecs codecs")
def test_zarr_reads_it() -> None:
    values = np.arange(100_000, dtype="<i8") ** 2
    store = MemoryStore()
    files = shard_io.shard_files({"x": values}, [StoredSpec("x", "<i8", "N", delta=True)])
    prototype = zarr.core.buffer.default_buffer_prototype()
    for key, data in files.items():
        store._store_dict[key] = prototype.buffer.from_bytes(data)
    opened = zarr.open_group(store, mode="r")["x"]
    assert isinstance(opened, zarr.Array)
    np.testing.assert_array_equal(opened[:], values)
    assert opened.attrs["axis"] == "N"
