"""A shard's arrays as a Zarr v3 group with a checksum on every chunk; `guards` reads it.

A chunk, the unit of compression and of the checksum, has 65,536 numbers: enough for the codec to learn
their distribution, few enough to locate damage. All chunks of an array form one Zarr shard, so an array
is one object, since object stores charge and take time for each object. A shard of the plan is
written by one writer into a folder of its own.

The bytes are put together here, so that all objects can be written at once: with a shard of some ten
thousand positions zarr spends more time between its layers than in the codec. They are the same as
zarr's, byte for byte (tested), and zarr itself writes the metadata that they are filled into.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from store_schema.disk.pco import PcoCodec, compress
from store_schema.encoding.group import StoredSpec
from store_schema.layout import Arrays
from store_schema.manifest import FileRecord

CHUNK = 65_536
_METADATA = "zarr.json"


def shard_files(arrays: Arrays, specs: Iterable[StoredSpec]) -> dict[str, bytes]:
    """The files of a shard's group.

    Args:
        arrays: By name, with the dtypes of `specs`.
        specs: The arrays to write, in order.

    Returns:
        Contents by key.
    """
    files = {_METADATA: _group_metadata()}
    for spec in specs:
        data = np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)
        files[f"{spec.name}/{_METADATA}"] = _array_metadata(spec, len(data))
        if len(data):
            files[f"{spec.name}/c/0"] = _shard(data, spec)
    return files


def file_records(files: Mapping[str, bytes]) -> dict[str, FileRecord]:
    """Size and checksum of files, by key."""
    return {
        key: FileRecord(size=len(data), crc32c=int(google_crc32c.value(data)))
        for key, data in files.items()
    }


def _shard(data: npt.NDArray[Any], spec: StoredSpec) -> bytes:
    """All chunks of an array, each with its CRC-32C, then their places as Zarr's sharding has them."""
    codec, chunk = _codec(spec), _chunk(len(data))
    parts, places, offset = [], [], 0
    for start in range(0, len(data), chunk):
        values = data[start : start + chunk]
        if len(values) < chunk:  # Zarr's chunks all have one length
            values = np.concatenate([values, np.zeros(chunk - len(values), data.dtype)])
        part = _checked(compress(values, level=codec.level, try_delta=spec.delta))
        parts.append(part)
        places += [offset, len(part)]
        offset += len(part)
    return b"".join([*parts, _checked(struct.pack(f"<{len(places)}Q", *places))])


def _checked(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def _chunk(length: int) -> int:
    """Numbers in each chunk of an array."""
    return min(CHUNK, max(length, 1))


def _codec(spec: StoredSpec) -> PcoCodec:
    return PcoCodec(delta_spec="auto" if spec.delta else "none")


def _array_metadata(spec: StoredSpec, length: int) -> bytes:
    """zarr.json of an array."""
    chunk = _chunk(length)
    found: dict[str, Any] = json.loads(_metadata_template(spec))
    found["shape"] = [length]
    found["chunk_grid"]["configuration"]["chunk_shape"] = [chunk * max(-(-length // chunk), 1)]
    found["codecs"][0]["configuration"]["chunk_shape"] = [chunk]
    return json.dumps(found, indent=2).encode()


@cache
def _metadata_template(spec: StoredSpec) -> bytes:
    """zarr.json of an array of one number, by zarr."""
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=(1,),
        dtype=spec.dtype,
        chunks=(1,),
        shards=(1,),
        serializer=_codec(spec),
        compressors=[Crc32cCodec()],
        fill_value=0,
        attributes={"axis": spec.axis},
    )
    return _stored_metadata(store)


@cache
def _group_metadata() -> bytes:
    """zarr.json of a shard's group, by zarr."""
    store = MemoryStore()
    zarr.create_group(store)
    return _stored_metadata(store)


def _stored_metadata(store: Store) -> bytes:
    found = sync(store.get(_METADATA, default_buffer_prototype()))
    if found is None:
        raise TypeError("zarr wrote no metadata")
    return found.to_bytes()
