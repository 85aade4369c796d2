"""Arrays made to harm: metadata, codecs and chunks of another form than the writer's.

Every case is read in a process of its own that may not take much memory, forked from a server that
has imported everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from store_schema.disk.location import open_location
from store_schema.disk.pco import compress
from store_schema.errors import CorruptionError
from store_schema.store.guards import decoding
from store_schema.store.reader import StoreReader, commit_key
from tests import store_damage
from tests.hostile_readers import Readers


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    server = Readers()
    yield server
    server.close()


@pytest.fixture(scope="module")
def sound_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_damage.make_store(tmp_path_factory.mktemp("sound"), preset="fine")


@pytest.fixture
def store(sound_store: Path, tmp_path: Path) -> Path:
    return store_damage.copy(sound_store, tmp_path / "store")


def _commit(store: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((store / commit_key(0)).read_text())
    return content


# ------------------------------------------------------------------------------- array metadata

ARRAY = "token_ranks"
PCO = {"name": "numcodecs.pcodec", "configuration": {"level": 8}}
CRC = {"name": "crc32c"}


def _sharding(*codecs: Any, **changes: Any) -> list[Any]:
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, CRC]
    inner = {
        "chunk_shape": [100],
        "codecs": list(codecs),
        "index_codecs": index,
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": inner | changes}]


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [10**15]},
        {"shape": [100, 1]},
        {"shape": "100"},
        {"data_type": "object"},
        {"data_type": "string"},
        {"data_type": "variable_length_bytes"},
        {"data_type": "float64"},
        {"data_type": {"name": "numpy.datetime64", "configuration": {}}},
        {"data_type": {"name": "struct", "configuration": {}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}},
        {"chunk_grid": {"name": "rectangular", "configuration": {}}},
        {"chunk_key_encoding": {"name": "v2"}},
        {"zarr_format": 2},
        {"node_type": "group"},
        {"storage_transformers": [{"name": "evil"}]},
        {"codecs": None},
        {"codecs": "pickle"},
        {"codecs": [PCO]},
        {"codecs": [{"name": "numcodecs.pickle"}]},
        {"codecs": [{"name": "numcodecs.json2"}]},
        {"codecs": [{"name": "numcodecs.msgpack2"}]},
        {"codecs": _sharding({"name": "numcodecs.pickle"}, CRC)},
        {"codecs": _sharding({"name": "vlen-bytes"}, CRC)},
        {"codecs": _sharding({"name": "vlen-utf8"}, CRC)},
        {"codecs": _sharding({"name": "numcodecs.json2"}, CRC)},
        {"codecs": _sharding({"name": "bytes"}, {"name": "zstd"}, CRC)},
        {"codecs": _sharding({"name": "bytes"}, {"name": "gzip"}, CRC)},
        {"codecs": _sharding({"name": "bytes"}, {"name": "blosc"}, CRC)},
        {"codecs": _sharding({"name": "transpose", "configuration": {"order": [0]}}, PCO, CRC)},
        {"codecs": _sharding(_sharding(PCO, CRC)[0], CRC)},
        {"codecs": _sharding(PCO)},
        {"codecs": _sharding(PCO | {"configuration": {"evil": 1}}, CRC)},
        {"codecs": _sharding(PCO, CRC, chunk_shape=[10**12])},
        {"codecs": _sharding(PCO, CRC, chunk_shape=[0])},
        {"codecs": _sharding(PCO, CRC, chunk_shape=[-1])},
        {"codecs": _sharding(PCO, CRC, chunk_shape=[1.5])},
        {"codecs": _sharding(PCO, CRC, chunk_shape=[50, 2])},
        {"codecs": _sharding(PCO, CRC, index_location="start")},
        {"codecs": _sharding(PCO, CRC, index_codecs=[{"name": "numcodecs.pickle"}])},
        {"codecs": _sharding(PCO, CRC, evil=1)},
        {"codecs": _sharding(None, CRC)},
        {"codecs": _sharding({"name": ["pickle"]}, CRC)},
    ],
    ids=lambda changes: json.dumps(changes)[:90],
)
def test_array_metadata_of_another_form_is_refused(
    store: Path, readers: Readers, changes: dict[str, Any]
) -> None:
    store_damage.change_metadata(store, f"{ARRAY}/zarr.json", **changes)
    assert f"array {ARRAY}" in readers.refusal(store)


def test_the_metadata_of_the_cases_above_is_else_our_own(store: Path) -> None:
    store_damage.change_metadata(store, f"{ARRAY}/zarr.json", codecs=_sharding(PCO, CRC))
    StoreReader.open(open_location(store)).verify(0)


def test_consolidated_metadata_is_refused(store: Path, readers: Readers) -> None:
    store_damage.change_metadata(
        store, "zarr.json", consolidated_metadata={"kind": "inline", "metadata": {}}
    )
    assert "not a plain group" in readers.refusal(store)


def test_metadata_bombs(store: Path, readers: Readers) -> None:
    store_damage.replace_data(store, f"{ARRAY}/zarr.json", b"[" * 60_000)
    assert "metadata is not JSON" in readers.refusal(store)
    store_damage.replace_data(store, f"{ARRAY}/zarr.json", b" " * 100_000)
    assert "metadata is too long" in readers.refusal(store)


# ------------------------------------------------------------------------------- chunks

HUNDRED = np.arange(100, dtype="<u4")


def _packed(values: np.ndarray[Any, Any]) -> bytes:
    return compress(values, level=8, try_delta=False)


@pytest.mark.parametrize(
    "data",
    [
        store_damage.shard_file([_packed(np.zeros(10_000_000, "<u4"))]),
        store_damage.shard_file([_packed(HUNDRED[:99])]),
        store_damage.shard_file([_packed(HUNDRED.astype("<i8"))]),
        store_damage.shard_file([_packed(HUNDRED)[:-3]]),
        store_damage.shard_file([b""]),
        store_damage.shard_file([b"\x80\x04cposix\nsystem\n"]),
        store_damage.shard_file([b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8]),
        store_damage.shard_file([_packed(HUNDRED)], index=[(2**64 - 1, 2**64 - 1)]),
        store_damage.shard_file([_packed(HUNDRED)], index=[(0, 2**63)]),
        store_damage.shard_file([_packed(HUNDRED)], index=[(2**64 - 8, 16)]),
        store_damage.shard_file([_packed(HUNDRED)], index=[(0, 0)]),
        store_damage.shard_file([_packed(HUNDRED)] * 2),
        b"",
    ],
    ids=range(13),
)
def test_hostile_chunks_with_right_checksums_are_refused(
    store: Path, readers: Readers, data: bytes
) -> None:
    store_damage.replace_data(store, f"{ARRAY}/c/0", data)
    assert f"array {ARRAY}" in readers.refusal(store)


def test_one_chunk_is_not_read_as_many(store: Path, readers: Readers) -> None:
    """A bomb of its own kind: an index in which all chunks are the same bytes."""
    chunk = _packed(HUNDRED[:50])
    size = len(chunk) + 4
    store_damage.change_metadata(
        store, f"{ARRAY}/zarr.json", codecs=_sharding(PCO, CRC, chunk_shape=[50])
    )
    data = store_damage.shard_file([chunk], index=[(0, size), (0, size)])
    store_damage.replace_data(store, f"{ARRAY}/c/0", data)
    assert "chunks do not fill the file" in readers.refusal(store)


def test_a_panic_of_a_rust_library_is_a_corruption_and_ctrl_c_is_not() -> None:
    # pyo3 derives its panics from BaseException, so that `except Exception` misses them.
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(CorruptionError, match="PanicException"):
        with decoding("here"):
            raise panic("index out of bounds")
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop):
            with decoding("here"):
                raise stop


def test_checksums_of_the_cases_above_are_right(store: Path) -> None:
    """Else every one would be refused for its checksum and nothing above would be tested."""
    data = store_damage.shard_file([_packed(np.full(100, 7, "<u4"))])
    store_damage.replace_data(store, f"{ARRAY}/c/0", data)
    found = StoreReader.open(open_location(store)).read(0, ["token_ids"])
    assert set(found["token_ids"]) == {7}
    commit = _commit(store)["files"][f"{ARRAY}/c/0"]
    assert commit["crc32c"] == int(google_crc32c.value(data))
