"""How a shard's arrays become a Zarr v3 group and come back, every byte under a checksum.

Sizes, with their reasons: a chunk is the unit of decoding and of the checksum, 65,536 positions or
262,144 entries (256 KiB to 1 MiB raw: large enough for the codec, small enough to name a damaged
place and to read a slice). All chunks of an array form one Zarr shard, so an array is one object:
object stores charge and wait per object. A shard of the plan is written by one writer into a folder
of its own, which no other writer ever touches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from store_schema.errors import CorruptionError, LogitfuseError
from store_schema.layout import Arrays, ArraySpec
from store_schema.manifest import FileRecord

POSITION_CHUNK = 65_536
ENTRY_CHUNK = 262_144


class RecordingStore(WrapperStore[Store]):
    """Passes writes through and keeps the size and CRC-32C of every file."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.files: dict[str, FileRecord] = {}

    async def set(self, key: str, value: Buffer) -> None:
        data = value.to_bytes()
        self.files[key] = FileRecord(size=len(data), crc32c=int(google_crc32c.value(data)))
        await self._store.set(key, value)


class CheckedStore(WrapperStore[Store]):
    """Reads only files that the commit names; a missing file is an error, never fill values."""

    def __init__(self, store: Store, files: Mapping[str, FileRecord], where: str) -> None:
        super().__init__(store)
        self._files = files
        self._where = where

    def _with_store(self, store: Store) -> CheckedStore:
        return CheckedStore(store, self._files, self._where)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        record = self._files.get(key)
        if record is None:
            return None
        value = await self._store.get(key, prototype, byte_range)
        if value is None:
            raise self._damaged("file is missing", key, f"{record.size} bytes", "nothing")
        if byte_range is None:
            data = value.to_bytes()
            if len(data) != record.size:
                raise self._damaged("file is cut", key, f"{record.size} bytes", len(data))
            # Data files are left to the checksums of their chunks, which name the damaged one.
            crc = int(google_crc32c.value(data)) if key.endswith("zarr.json") else record.crc32c
            if crc != record.crc32c:
                raise self._damaged("file changed", key, f"{record.crc32c:08x}", f"{crc:08x}")
        return value

    def _damaged(self, what: str, key: str, expected: object, got: object) -> CorruptionError:
        return CorruptionError(
            what,
            where=f"{self._where}, file {key}",
            expected=expected,
            got=got,
            hint="delete the shard's commit and rerun the stage",
        )


def write_arrays(store: Store, arrays: Arrays, specs: Iterable[ArraySpec]) -> dict[str, FileRecord]:
    """Write all arrays of a shard.

    Args:
        store: An empty place of the shard's own.
        arrays: By name, with the dtypes of `specs`.
        specs: Which arrays, in order.

    Returns:
        Size and checksum of every file written.
    """
    recording = RecordingStore(store)
    group = zarr.create_group(recording)
    for spec in specs:
        data = np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)
        limit = ENTRY_CHUNK if spec.axis == "E" else POSITION_CHUNK
        chunk = min(limit, max(len(data), 1))
        array = group.create_array(
            spec.name,
            shape=data.shape,
            dtype=data.dtype,
            chunks=(chunk,),
            shards=(chunk * max(-(-len(data) // chunk), 1),),
            serializer="auto" if data.itemsize == 1 else BytesCodec(endian="little"),
            compressors=[
                BloscCodec(typesize=data.itemsize, cname="zstd", clevel=3, shuffle="shuffle"),
                Crc32cCodec(),
            ],
            fill_value=0,
            attributes={"axis": spec.axis, "unit": spec.unit},
            # Else a chunk equal to the fill value is left out, and a lost one looks the same.
            config={"write_empty_chunks": True},
        )
        if len(data):
            array[:] = data
    return recording.files


def open_arrays(store: Store, files: Mapping[str, FileRecord], where: str) -> zarr.Group:
    """The group of a committed shard, read through its checksums."""
    checked = CheckedStore(store, files, where)
    group: zarr.Group = damage_named(lambda: zarr.open_group(checked, mode="r"), f"{where}, group")
    return group


def read_array(
    group: zarr.Group, spec: ArraySpec, length: int, part: slice, where: str
) -> npt.NDArray[Any]:
    """One array, or a slice of it.

    Args:
        group: From `open_arrays`.
        spec: Which array.
        length: What the commit says; another shape is refused before anything is allocated.
        part: Which elements.
        where: Store and shard, for messages.

    Raises:
        CorruptionError: Wrong shape or dtype, or a chunk whose checksum fails.
    """
    here = f"{where}, array {spec.name}"
    array = damage_named(lambda: group[spec.name], here)
    if not isinstance(array, zarr.Array) or array.shape != (length,):
        raise CorruptionError("wrong shape", where=here, expected=(length,), got=array)
    if np.dtype(array.dtype) != np.dtype(spec.dtype):
        raise CorruptionError("wrong dtype", where=here, expected=spec.dtype, got=array.dtype)
    start, stop, _ = part.indices(length)
    if start >= stop:
        return np.empty(0, spec.dtype)
    try:
        return np.asarray(array[start:stop], dtype=spec.dtype)
    except LogitfuseError:
        raise
    except Exception as error:  # codecs raise whatever their library raises on damaged bytes
        chunk = _damaged_chunk(array, start, stop)
        raise CorruptionError(
            "bytes do not decode",
            where=f"{here}, chunk {chunk}",
            got=f"{type(error).__name__}: {error}",
            hint="delete the shard's commit and rerun the stage",
        ) from error


def damage_named(read: Any, where: str) -> Any:
    """Run `read`; whatever it raises on damaged metadata becomes a CorruptionError."""
    try:
        return read()
    except LogitfuseError:
        raise
    except Exception as error:  # the metadata parser raises many kinds on damaged JSON
        raise CorruptionError(
            "cannot be opened", where=where, got=f"{type(error).__name__}: {error}"
        ) from error


def _damaged_chunk(array: zarr.Array[Any], start: int, stop: int) -> int | str:
    size = array.chunks[0]
    for chunk in range(start // size, -(-stop // size)):
        try:
            array[chunk * size : min((chunk + 1) * size, array.shape[0])]
        except Exception:  # any failure marks the chunk: it is named, not hidden
            return chunk
    return "unknown"
