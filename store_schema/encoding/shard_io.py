"""Write a shard's arrays as a Zarr v3 group with a checksum on every chunk; `guards` reads it.

A chunk, the unit of compression and of the checksum, has 65,536 numbers: enough for the codec to learn
their distribution, few enough to locate damage. All chunks of an array form one Zarr shard, so an array
is one object, since object stores charge and take time for each object. A shard of the plan is
written by one writer into a folder of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import google_crc32c
import numpy as np
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from store_schema.disk.pco import PcoCodec
from store_schema.encoding.group import StoredSpec
from store_schema.layout import Arrays
from store_schema.manifest import FileRecord

CHUNK = 65_536


class RecordingStore(WrapperStore[Store]):
    """Passes writes through and records the size and CRC-32C of every file.

    The folder is used by this writer alone, so a file that it has not written does not exist: the
    object store is never asked, which saves two of three requests.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.files: dict[str, FileRecord] = {}
        self._metadata: dict[str, Buffer] = {}

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return self._metadata.get(key)

    async def exists(self, key: str) -> bool:
        return key in self.files

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if key not in self.files:
            await self.set(key, value)

    async def set(self, key: str, value: Buffer) -> None:
        if key.endswith("zarr.json"):
            self._metadata[key] = value
        data = value.to_bytes()
        self.files[key] = FileRecord(size=len(data), crc32c=int(google_crc32c.value(data)))
        await self._store.set(key, value)


def write_arrays(
    store: Store, arrays: Arrays, specs: Iterable[StoredSpec]
) -> dict[str, FileRecord]:
    """Write all arrays of a shard.

    Args:
        store: Empty Zarr store of this shard alone.
        arrays: By name, with the dtypes of `specs`.
        specs: The arrays to write, in order.

    Returns:
        Size and checksum of every file written, by key.
    """
    recording = RecordingStore(store)
    group = zarr.create_group(recording)
    for spec in specs:
        data = np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)
        chunk = min(CHUNK, max(len(data), 1))
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
            # By default a chunk of fill values is not written, and a lost chunk would look the same.
            config={"write_empty_chunks": True},
        )
        if len(data):
            array[:] = data
    return recording.files
