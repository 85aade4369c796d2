"""One contract for every place that a store may lie in."""

from __future__ import annotations

import errno
import gc
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store_schema.errors import ConfigError, MissingError, StorageError
from store_schema.location import (
    LocalLocation,
    Location,
    RemoteLocation,
    open_location,
    storage_errors,
)
from store_schema.reader import StoreReader
from store_schema.writer import StoreWriter
from tests import store_factory

# s3fs leaves its HTTP sessions to the garbage collector; they hold nothing of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """A real HTTP server on the loopback that speaks S3."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "file", "memory", "s3"])
def location(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Location]:
    name = uuid.uuid4().hex
    if request.param == "local":
        yield open_location(tmp_path / name)
    elif request.param == "file":
        yield open_location(f"file://{tmp_path / name}")
    elif request.param == "memory":
        yield open_location(f"memory://{name}/store")
    else:
        endpoint = request.getfixturevalue("s3_server")
        import s3fs

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(f"/{name}")
        yield open_location(f"s3://{name}/a/store")
        s3fs.S3FileSystem.clear_instance_cache()
        gc.collect()


def test_files(location: Location) -> None:
    assert not location.exists("a/b.json")
    assert location.names("a") == []
    location.write_atomic("a/b.json", b"one")
    location.write_atomic("a/b.json", b"two")
    location.write_atomic("a/a.json", b"")
    assert location.exists("a/b.json")
    assert location.names("a") == ["a.json", "b.json"]
    assert location.read_bytes("a/b.json") == b"two"
    with location.open_read("a/b.json") as file:
        file.seek(1)
        assert file.read() == b"wo"
    with location.open_write("a/c") as file:
        file.write(b"x" * 10)
    assert location.read_bytes("a/c") == b"x" * 10
    assert location.child("a").read_bytes("b.json") == b"two"
    location.delete("a/b.json")
    assert location.names("a") == ["a.json", "c"]
    location.delete("a")
    location.delete("a")
    assert location.names("a") == []


def test_missing_file(location: Location) -> None:
    with pytest.raises(MissingError, match="nothing"):
        location.read_bytes("nothing")
    with pytest.raises(MissingError), location.open_read("nothing") as file:
        file.read()


def test_a_store_works_everywhere(location: Location) -> None:
    manifest = store_factory.manifest("aligned")
    writer = StoreWriter.open(location, manifest, store_factory.vocabulary())
    arrays = store_factory.arrays("aligned", (6, 0, 8))
    writer.write(store_factory.shard_record(3), arrays)
    assert writer.committed() == {3}
    reader = StoreReader.open(open_location(location.url))
    reader.verify(3)
    assert reader.vocabulary.fingerprint == store_factory.vocabulary().fingerprint
    plan = store_factory.plan(location.child("plan"), [["a"], ["b", "c"]])
    assert [s.text for s in plan.segments(plan.shards[1])] == ["b", "c"]


def test_damage_is_found_everywhere(location: Location) -> None:
    writer = StoreWriter.open(location, store_factory.manifest(), store_factory.vocabulary())
    commit = writer.write(store_factory.shard_record(), store_factory.arrays(rows=(30,)))
    key = f"{commit.path}/tail_mass/c/0"
    damaged = bytearray(location.read_bytes(key))
    damaged[len(damaged) // 3] ^= 0x10
    location.write_atomic(key, bytes(damaged))
    from store_schema.errors import CorruptionError

    with pytest.raises(CorruptionError, match="tail_mass"):
        StoreReader.open(location).verify(0)
    location.delete(key)
    with pytest.raises(CorruptionError, match="tail_mass"):
        StoreReader.open(location).verify(0)


def test_kinds() -> None:
    assert open_location("/a/b") == LocalLocation("/a/b")
    assert open_location("file:///a/b") == LocalLocation("/a/b")
    assert open_location("s3://bucket/x/") == RemoteLocation("s3://bucket/x")


def test_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no driver"):
        open_location("warp://x").exists("manifest.json")


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "permissions"),
    ],
)
def test_refusals_say_what_to_do(number: int, hint: str) -> None:
    with pytest.raises(StorageError, match=hint) as caught, storage_errors("disk X"):
        raise OSError(number, os.strerror(number))
    assert "disk X" in caught.value.line()


def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = open_location(tmp_path)
    location.write_atomic("commit.json", b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        location.write_atomic("commit.json", b"new")
    assert (tmp_path / "commit.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["commit.json"]
