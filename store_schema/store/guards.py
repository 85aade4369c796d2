"""Read a store that may be hostile: everything in it is checked before it is used.

Arrays are read by the code below, not by a Zarr library, and only in the form that our writer writes.
So no codec is looked up by a name from the store, no missing chunk is read as fill values, and every
size is known before memory is allocated. Refused are:

- a file longer than the commit says, or not a regular file (a pipe would never end)
- a shard whose arrays would be larger than `MAX_RATIO` times its files plus `SLACK_BYTES`
- a commit with files that the layout does not have, or without one that it has
- array metadata, codecs or chunks of another form than the writer's
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from store_schema.disk.bounded import read_bounded
from store_schema.disk.location import Location
from store_schema.disk.pco import CODEC_NAME, decompress_into
from store_schema.encoding.group import StoredSpec
from store_schema.errors import CorruptionError, LogitfuseError, MismatchError, SchemaVersionError
from store_schema.manifest import Commit, FileRecord, Manifest

MAX_RATIO = 64
"""Decoded bytes per stored byte, at most. Distributions have less than 10, a zip bomb a thousand."""
SLACK_BYTES = 256 << 20
"""Decoded bytes allowed besides: shards with almost constant arrays compress far better."""
MAX_SHARD_BYTES = 16 << 30
"""Decoded bytes of a shard, at most: a reader has all of them in memory."""
MAX_COMMIT_BYTES = 1 << 20
MAX_METADATA_BYTES = 64 << 10
MAX_VOCAB_SIZE = 1 << 24
MAX_VOCABULARY_BYTES = 1 << 28
MAX_SHARDS = 1_000_000

REPAIR = "`logitfuse store repair` uncommits the shard so that a rerun writes it again"
RESTORE = "restore it from a copy of the store, or delete the store and run the stage again"

# ------------------------------------------------------------------------------- manifests


def require_sane(manifest: Manifest, where: str) -> None:
    """Refuse impossible sizes, which readers would allocate and loop by, and stores of an earlier
    version whose tokens do not join to the text.

    Raises:
        CorruptionError: A field has an impossible value; names it.
        MismatchError: The store's tokens do not join to its text.
    """
    if any(model and model.by_offsets for model in (manifest.model, manifest.target)):
        raise MismatchError(
            "the store was made with `by_offsets: true`, an option that was removed",
            where=where,
            expected="tokens that join to the text",
            hint="use a model whose tokenizer does not change text, under another run name",
        )
    limits = {"vocab_size": MAX_VOCAB_SIZE, "num_shards": MAX_SHARDS, "top_k": MAX_VOCAB_SIZE}
    for field, limit in limits.items():
        value = getattr(manifest, field)
        if value is not None and value > limit:
            raise CorruptionError(
                f"{field} is too large", where=where, expected=f"at most {limit}", hint=RESTORE
            )
    if manifest.ranking_fingerprint is None:
        raise CorruptionError("rank table without fingerprint", where=where, hint=RESTORE)


def require_present_form(manifest: Manifest, where: str) -> None:
    """Refuse a store of an earlier version that has arrays which are no longer supported.

    Raises:
        SchemaVersionError: It has; the message says what to run again.
    """
    if manifest.kind == "generated" and manifest.top_k is not None:
        what, expected, got = "distributions of answers", "top_k null", f"top_k {manifest.top_k}"
    elif manifest.extras:
        shown = ", ".join(repr(name[:20]) for name in manifest.extras[:3])
        what, expected, got = "extra arrays", "no extras", f"extras {shown}"
    else:
        return
    stage = "generate" if manifest.kind == "generated" else "run"
    raise SchemaVersionError(
        f"the store has {what}, which are no longer supported",
        where=where,
        expected=expected,
        got=got,
        hint=f"delete the store and run `logitfuse extract {stage}` again",
    )


# ------------------------------------------------------------------------------- commits


def check_commit(
    commit: Commit, manifest: Manifest, specs: Iterable[StoredSpec], where: str
) -> None:
    """Refuse a commit with impossible sizes or files, before memory is allocated by its numbers.

    Args:
        commit: The shard's commit.
        manifest: The store's manifest.
        specs: All arrays on disk of a shard.
        where: Store and shard, for messages.

    Raises:
        CorruptionError: Its arrays are too large for its files, or its files are not those of the
            layout.
    """
    counts = commit.counts
    most = counts.positions * manifest.max_entries
    if counts.entries > most:
        raise _fault("more entries than positions allow", where, f"at most {most}", counts.entries)
    if counts.branches > counts.entries:
        raise _fault("more branches than entries", where, f"at most {counts.entries}")
    if counts.branch_entries > counts.branches * manifest.max_entries:
        most = counts.branches * manifest.max_entries
        raise _fault("more entries than branches allow", where, f"at most {most}")
    decoded, keys = 0, {"zarr.json"}
    for spec in specs:
        length = counts.length(spec.axis)
        decoded += length * np.dtype(spec.dtype).itemsize
        keys.add(f"{spec.name}/zarr.json")
        if length:
            keys.add(f"{spec.name}/c/0")
    stored = sum(record.size for record in commit.files.values())
    allowed = min(MAX_RATIO * stored + SLACK_BYTES, MAX_SHARD_BYTES)
    if decoded > allowed:
        raise _fault(
            "arrays are too large for the shard's files", where, f"at most {allowed} bytes", decoded
        )
    if keys != commit.files.keys():
        other = sorted(keys ^ commit.files.keys())[0]
        what = "commit leaves out a file" if other in keys else "commit names an unknown file"
        raise _fault(what, where, None, repr(other[:80]))


# ------------------------------------------------------------------------------- arrays


_CODECS = (CODEC_NAME, "crc32c")
"""The only codecs of a chunk, the last is the checksum. Names in a store are compared with these and
never looked up."""
_OPTIONS = {CODEC_NAME: {"level", "mode_spec", "delta_spec"}, "crc32c": set[str]()}
_MAX_CHUNK = 65_536


class CommittedShard:
    """The files of one committed shard, read through its commit."""

    def __init__(self, location: Location, commit: Commit, where: str) -> None:
        self._location = location
        self._commit = commit
        self._where = where

    def check_group(self) -> None:
        """Check the metadata of the Zarr group, which no array needs.

        Raises:
            CorruptionError: The file is changed, or has more than an empty group.
        """
        document = self._metadata("zarr.json", f"{self._where}, group")
        if document != {"attributes": {}, "zarr_format": 3, "node_type": "group"}:
            raise _fault("not a plain group", f"{self._where}, group")

    def read(self, spec: StoredSpec) -> npt.NDArray[Any]:
        """Read and decompress one array on disk.

        Raises:
            CorruptionError: It is damaged; names the array and, if known, the chunk.
        """
        where = f"{self._where}, array {spec.name}"
        length = self._commit.counts.length(spec.axis)
        dtype = np.dtype(spec.dtype)
        document = self._metadata(f"{spec.name}/zarr.json", where)
        chunk = _chunk_size(document, length, dtype, where)
        if not length:
            return np.empty(0, dtype)
        data = self._file(f"{spec.name}/c/0", where)
        # Checked again with the file's actual size.
        most = MAX_RATIO * len(data) + SLACK_BYTES
        if length * dtype.itemsize > most:
            raise _fault("array is too large for its file", where, f"at most {most} bytes")
        num_chunks = -(-length // chunk)
        ends = _chunk_ends(data, num_chunks, where)
        out = np.empty(num_chunks * chunk, dtype)  # the last chunk is padded
        start = 0
        for i, end in enumerate(ends):
            here = f"{where}, chunk {i}"
            with decoding(here):
                body = _summed(data[start:end], here)
                decompress_into(body, out[i * chunk : (i + 1) * chunk])
            start = end
        return out[:length]

    def _metadata(self, key: str, where: str) -> Any:
        if self._record(key).size > MAX_METADATA_BYTES:
            raise _fault("metadata is too long", where, f"{MAX_METADATA_BYTES} bytes")
        data = self._file(key, where)
        crc = int(google_crc32c.value(data))
        expected = self._record(key).crc32c
        if crc != expected:
            raise _fault(f"file {key} changed", where, f"{expected:08x}", f"{crc:08x}")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _fault("metadata is not JSON", where, None, error) from error

    def _record(self, key: str) -> FileRecord:
        record = self._commit.files.get(key)
        if record is None:
            raise _fault(f"commit leaves out file {key}", self._where)
        return record

    def _file(self, key: str, where: str) -> bytes:
        size = self._record(key).size
        data = read_bounded(self._location, f"{self._commit.path}/{key}", size)
        if data is None:
            raise _fault(f"file {key} is missing", where, f"{size} bytes", "nothing")
        if len(data) != size:
            got = len(data) if len(data) < size else "more"
            raise _fault(f"file {key} has another length", where, f"{size} bytes", got)
        return data


def _chunk_size(document: Any, length: int, dtype: np.dtype[Any], where: str) -> int:
    """Numbers in a chunk, from array metadata; any other form than the writer's is refused."""
    if not isinstance(document, dict):
        raise _fault("metadata is not an object", where)
    if document.get("shape") != [length]:
        raise _fault("wrong shape", where, [length], _short(document.get("shape")))
    if document.get("data_type") != dtype.name:
        raise _fault("wrong dtype", where, dtype.name, _short(document.get("data_type")))
    try:
        (codec,) = document["codecs"]
        sharding = codec["configuration"]
        (chunk,) = sharding["chunk_shape"]
        chain = [(c["name"], c.get("configuration", {})) for c in sharding["codecs"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _fault("codecs not understood", where, None, _short(error)) from error
    names = tuple(name for name, _ in chain)
    if codec.get("name") != "sharding_indexed" or names != _CODECS:
        raise _fault("codec refused", where, _CODECS, _short([codec.get("name"), *names]))
    for name, options in chain:
        if not isinstance(options, dict) or not _OPTIONS[name].issuperset(options):
            raise _fault(f"options of codec {name} refused", where, None, _short(options))
    if type(chunk) is not int or not 1 <= chunk <= _MAX_CHUNK:
        raise _fault("wrong chunk size", where, f"1 to {_MAX_CHUNK}", _short(chunk))
    num_chunks = max(-(-length // chunk), 1)
    for key, expected in _fixed(chunk * num_chunks, sharding).items():
        if document.get(key, [] if key == "storage_transformers" else None) != expected:
            raise _fault(f"{key} refused", where, expected, _short(document.get(key)))
    return chunk


def _fixed(shard: int, sharding: dict[str, Any]) -> dict[str, Any]:
    """All other metadata as they must be: one Zarr shard with its index at the end."""
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    inner = {
        "chunk_shape": sharding["chunk_shape"],
        "codecs": sharding["codecs"],
        "index_codecs": index,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }


def _chunk_ends(data: bytes, num_chunks: int, where: str) -> list[int]:
    """End of each chunk in a Zarr shard file; its chunks must fill the file without gaps."""
    size = len(data) - 16 * num_chunks - 4
    if size < 0:
        raise _fault("file is shorter than its index", f"{where}, chunk index")
    here = f"{where}, chunk index"
    index = np.frombuffer(_summed(data[size:], here), "<u8").reshape(num_chunks, 2)
    starts, lengths = index[:, 0], index[:, 1]
    # Each is checked to be below the file's size first, so that sums cannot overflow.
    sound = bool((index <= size).all()) and bool((lengths > 0).all())
    ends = np.cumsum(lengths) if sound else lengths
    if not sound or ends[-1] != size or not np.array_equal(starts, ends - lengths):
        raise _fault("chunks do not fill the file", here, f"{size} bytes")
    chunk_ends: list[int] = ends.tolist()
    return chunk_ends


def _summed(data: bytes, where: str) -> bytes:
    """The bytes before the CRC-32C at the end of `data`, which is checked."""
    body, kept = data[:-4], int.from_bytes(data[-4:], "little")
    crc = int(google_crc32c.value(body))
    if len(data) < 4 or crc != kept:
        raise _fault("checksum is wrong", where, f"{kept:08x}", f"{crc:08x}")
    return body


@contextmanager
def decoding(where: str) -> Iterator[None]:
    """Turn whatever a decoder raises for damaged bytes into a CorruptionError."""
    try:
        yield
    except (LogitfuseError, MemoryError):  # sizes are checked, so memory ran out on this machine
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        got = f"{type(error).__name__}: {_short(error)}"
        raise _fault("bytes do not decode", where, None, got) from error


def _is_panic(error: BaseException) -> bool:
    """Whether a Rust library panicked (pyo3's panics are BaseExceptions)."""
    return type(error).__name__ == "PanicException"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _fault(what: str, where: str, expected: object = None, got: object = None) -> CorruptionError:
    return CorruptionError(what, where=where, expected=expected, got=got, hint=REPAIR)
