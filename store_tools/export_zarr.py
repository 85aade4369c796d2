"""Exports a shard as a Zarr v3 group that every reader of Zarr reads.

The arrays of docs/store.md as they are, in chunks of 65,536 numbers, with codecs that all readers have
(`bytes`, little-endian, and `zstd`): no pcodec, no sharding, no codes. An empty array has no chunk.
"""

from __future__ import annotations

import json

import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from store_schema.disk.location import Location
from store_schema.layout import Arrays

CHUNK = 65_536
_ROOT = "zarr.json"


def group_files(arrays: Arrays, metadata: dict[str, str]) -> dict[str, bytes]:
    """Files of the group, by key.

    Args:
        arrays: From `StoreReader.read`.
        metadata: The group's attributes.
    """
    store = MemoryStore()
    group = zarr.create_group(store, attributes=dict(metadata))
    for name, array in arrays.items():
        made = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(min(CHUNK, max(len(array), 1)),),
            compressors=[ZstdCodec(level=3)],
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        if len(array):
            made[:] = array
    return sync(_contents(store))


async def _contents(store: MemoryStore) -> dict[str, bytes]:
    files = {}
    async for key in store.list():
        buffer = await store.get(key, default_buffer_prototype())
        if buffer is not None:
            files[key] = buffer.to_bytes()
    return files


def write_group(location: Location, key: str, files: dict[str, bytes]) -> None:
    """Write a group; its own metadata come last, without which it is not there."""
    location.delete(f"{key}/{_ROOT}")
    location.write_files(key, {name: data for name, data in files.items() if name != _ROOT})
    location.write_atomic(f"{key}/{_ROOT}", files[_ROOT])


def group_metadata(location: Location, key: str) -> dict[str, str]:
    """Attributes of a group that was written."""
    found: dict[str, str] = json.loads(location.read_bytes(f"{key}/{_ROOT}"))["attributes"]
    return found
