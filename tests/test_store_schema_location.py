"""One contract for every place that a store may lie in."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store_schema.disk import remote
from store_schema.disk.location import LocalLocation, Location, open_location
from store_schema.disk.remote_location import RemoteLocation
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, MissingError, StorageError
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from tests import store_factory
from tests.s3_server import S3, UNCLOSED, new_bucket, serve_s3

pytestmark = UNCLOSED


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """A real HTTP server on the loopback that speaks S3."""
    with serve_s3() as server:
        yield server


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with new_bucket(s3, monkeypatch) as url:
        yield url


@pytest.fixture(params=["local", "file", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    name = uuid.uuid4().hex
    if request.param == "local":
        return open_location(tmp_path / name)
    if request.param == "file":
        return open_location(f"file://{tmp_path / name}")
    if request.param == "memory":
        return open_location(f"memory://{name}/store")
    return open_location(f"{request.getfixturevalue('bucket')}/a/store")


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


def test_new_files_are_written_together(location: Location) -> None:
    files = {"zarr.json": b"{}", "ids/zarr.json": b"", "ids/c/0": b"x" * 100_000, "mass/c/0": b"y"}
    location.write_files("data/00000-a", files)
    for name, content in files.items():
        assert location.read_bytes(f"data/00000-a/{name}") == content
    assert location.names("data/00000-a") == ["ids", "mass", "zarr.json"]
    location.write_files("data/00000-b", {})
    location.write_files("data/00000-b", {"a": b"1"})
    location.delete("data/00000-a")
    assert location.names("data") == ["00000-b"]


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(StorageError, match="data/00000-a: got Not a directory"):
        open_location(tmp_path).write_files("data/00000-a", {"ids/c/0": b"1"})
    (tmp_path / "whole/00000-a/ids/c/0").mkdir(parents=True)
    with pytest.raises(StorageError, match="00000-a/ids/c/0: got Is a directory"):
        open_location(tmp_path).write_files("whole/00000-a", {"ids/c/0": b"1", "b": b"2"})


def test_a_file_takes_the_place_of_another(location: Location) -> None:
    for replaced in (b"old", None):
        if replaced is not None:
            location.write_atomic("a/final", replaced)
        with location.open_write("a/next") as file:
            file.write(b"new" * 1000)
        location.replace("a/next", "a/final")
        assert location.read_bytes("a/final") == b"new" * 1000
        assert location.names("a") == ["final"]
        location.delete("a/final")


def test_missing_file(location: Location) -> None:
    with pytest.raises(MissingError, match="nothing"):
        location.read_bytes("nothing")
    with (
        pytest.raises(MissingError, match="nothing"),
        location.open_read("nothing") as file,
    ):
        file.read()


def test_the_beginning_of_a_file(location: Location) -> None:
    location.write_atomic("a", b"0123456789")
    location.write_atomic("empty", b"")
    assert location.read_bytes("a", 4) == b"0123"
    assert location.read_bytes("a", 10) == location.read_bytes("a", 99) == b"0123456789"
    assert location.read_bytes("empty", 4) == location.read_bytes("empty") == b""
    with pytest.raises(MissingError):
        location.read_bytes("none", 4)


def test_many_files_at_once(location: Location) -> None:
    keys = [f"commits/{i:05d}.json" for i in range(5)]
    assert location.read_many(keys) == {}
    for i in (1, 3):
        location.write_atomic(keys[i], b"x" * i)
    location.write_atomic("commits/00000.json.tmp", b"")
    assert location.read_many(keys) == {keys[1]: b"x", keys[3]: b"xxx"}
    assert location.read_many([]) == {}
    assert list(location.read_many([keys[3], "none", keys[1]])) == [keys[3], keys[1]]


def test_many_files_in_several_rounds(location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store_schema.disk.remote_location._KEYS_AT_ONCE", 2)
    keys = list("abcde")
    for key in keys:
        location.write_atomic(key, key.encode())
    assert location.read_many(keys) == {key: key.encode() for key in keys}


def test_what_cannot_be_read_is_not_taken_for_missing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="directory"):
        open_location(tmp_path).read_many(["a"])


def test_a_folder_is_no_file(location: Location) -> None:
    location.write_atomic("a/b/c", b"1")
    assert location.exists("a/b/c")
    assert not location.exists("a/b")
    assert not location.exists("a")
    assert location.names("a") == ["b"]
    assert location.names("a/b/c") == []
    assert location.names("") == ["a"]


def test_names_that_begin_others(location: Location) -> None:
    for key in ("data/00001-x/a", "data/00001-xy/a", "data/00001-x.json", "data/00001-", "dat"):
        location.write_atomic(key, b"1")
    assert location.names("data") == ["00001-", "00001-x", "00001-x.json", "00001-xy"]
    assert location.names("data/00001-x") == ["a"]
    assert location.names("data/0000") == []
    assert not location.exists("data/00001-x/")
    assert not location.exists("data/0000")
    location.delete("data/00001-x")
    location.delete("data/0000")
    assert location.names("data") == ["00001-", "00001-x.json", "00001-xy"]
    location.delete("dat")
    assert location.names("data") == ["00001-", "00001-x.json", "00001-xy"]


def test_folder_marks_of_consoles(bucket: str) -> None:
    """An empty object named like the folder, with a '/' at the end, is no file of ours."""
    location = open_location(f"{bucket}/a/store")
    filesystem, root = remote.open_filesystem(location.url)
    for mark in ("", "/data", "/data/00001-x", "/commits"):
        filesystem.call_s3("put_object", Bucket=root.split("/")[0], Key=f"a/store{mark}/", Body=b"")
    location.write_atomic("data/00001-x/a", b"1")
    location.write_atomic("data/00001-xy/a", b"1")
    assert location.names("") == ["commits", "data"]
    assert location.names("commits") == []
    assert location.names("data") == ["00001-x", "00001-xy"]
    assert location.names("data/00001-x") == ["a"]
    assert not location.exists("data/00001-x")
    assert location.read_many(["data", "data/00001-x"]) == {}
    location.delete("data/00001-x")
    assert location.names("data") == ["00001-xy"]


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


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA0:hunter2@bucket/store",
        "s3://hunter2@bucket",
        "s3a://user:hunter2@bucket/a@b",
        "gs://user:hunter2@bucket/store",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="environment") as caught:
        open_location(url)
    assert "hunter2" not in caught.value.line()
    assert "bucket" in caught.value.line()


def test_signs_that_are_no_credentials() -> None:
    for url in ("abfs://container@account.dfs.core.windows.net/x", "s3://bucket/a@b:c"):
        assert open_location(url).url == url


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
    with pytest.raises(StorageError, match=r"full|No space"):
        location.write_atomic("commit.json", b"new")
    assert (tmp_path / "commit.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["commit.json"]


class _Syncs:
    """Which files and folders are made durable, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self.paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def test_every_new_folder_has_a_durable_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may take the folder that holds a commit, with the commit in it."""
    syncs = _Syncs(monkeypatch)
    store = tmp_path / "runs" / "x" / "stores" / "code"
    location = open_location(store)
    location.write_atomic("manifest.json", b"{}")
    made = {tmp_path, tmp_path / "runs", tmp_path / "runs/x", tmp_path / "runs/x/stores", store}
    assert made <= set(syncs.paths)
    syncs.paths.clear()
    location.write_atomic("commits/00000.json", b"{}")
    assert syncs.paths[-3:] == [store / "commits", store, store.parent]
    assert store in syncs.paths[:-2]


def test_data_is_durable_with_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "code"
    (store / "data" / "00000-x" / "ids" / "c").mkdir(parents=True)
    (store / "data" / "00000-x" / "ids" / "c" / "0").write_bytes(b"1")
    syncs = _Syncs(monkeypatch)
    open_location(store).make_durable("data/00000-x")
    data = store / "data"
    below = [data / "00000-x" / part for part in ("ids", "ids/c", "ids/c/0", "")]
    assert set(syncs.paths[:4]) == set(below)
    assert syncs.paths[4:] == [data, store, tmp_path]


def test_a_commit_is_durable_after_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter.open(
        open_location(tmp_path), store_factory.manifest(), store_factory.vocabulary()
    )
    syncs = _Syncs(monkeypatch)
    commit = writer.write(store_factory.shard_record(), store_factory.arrays())
    named = [str(path.relative_to(tmp_path.parent)) for path in syncs.paths]
    data = f"{tmp_path.name}/{commit.path}"
    for name in commit.files:
        assert f"{data}/{name}" in named
    commits = [i for i, name in enumerate(named) if "/commits" in name]
    assert max(i for i, name in enumerate(named) if name.startswith(data)) < min(commits)
    assert f"{tmp_path.name}/data" in named
