"""`store copy`: the same bytes elsewhere, whatever cuts it, and never over another store."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.command import StageGroup
from store_schema.disk.location import LocalLocation, Location, open_location
from store_schema.disk.sealed import seal
from store_schema.errors import (
    ConfigError,
    CorruptionError,
    MismatchError,
    MissingError,
    StorageError,
)
from store_schema.store.reader import StoreReader, commit_key
from store_schema.store.writer import StoreWriter
from store_tools.copy import copy_command, copy_store
from tests import store_factory
from tests.s3_server import S3, UNCLOSED, Fault, every, hurry, new_bucket, serve_s3

pytestmark = UNCLOSED


def _store(location: Location, shards: int = 3, top_k: int = 4) -> StoreReader:
    manifest = store_factory.manifest(top_k=top_k)
    writer = StoreWriter.open(location, manifest, store_factory.vocabulary(), config="name: x\n")
    for shard in range(shards):
        arrays = store_factory.arrays("source", (9, 4), seed=shard, top_k=top_k)
        writer.write(store_factory.shard_record(shard), arrays)
    return StoreReader.open(location)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Location:
    location = open_location(tmp_path_factory.mktemp("source"))
    _store(location)
    return location


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serve_s3() as server:
        yield server


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with new_bucket(s3, monkeypatch) as url:
        hurry(monkeypatch)
        yield url


def _files(location: Location) -> dict[str, bytes]:
    folder = Path(location.url)
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _verified(location: Location) -> set[int]:
    reader = StoreReader.open(location)
    for shard in reader.commits:
        reader.verify(shard)
    assert reader.vocabulary.tokens
    return set(reader.commits)


class Cut(LocalLocation):
    """A disk that is gone after some writes."""

    writes_left = 0

    def open_write(self, key: str):  # type: ignore[no-untyped-def]
        self._count(key)
        return super().open_write(key)

    def write_atomic(self, key: str, data: bytes) -> None:
        self._count(key)
        super().write_atomic(key, data)

    def _count(self, key: str) -> None:
        if Cut.writes_left == 0:
            raise StorageError("disk gone", where=key)
        Cut.writes_left -= 1


def test_local_copy_is_the_same_files(source: Location, tmp_path: Path) -> None:
    target = open_location(tmp_path / "a" / "copy")
    result = copy_store(source, target)
    assert (result.copied, result.skipped, result.faults) == (3, 0, ())
    assert _files(target) == _files(source)
    assert result.size_bytes == sum(
        len(data) for name, data in _files(source).items() if name.startswith("data/")
    )
    again = copy_store(source, target)
    assert (again.copied, again.skipped, again.size_bytes) == (0, 3, 0)


def test_there_and_back_through_a_faulty_object_store(
    source: Location, s3: S3, bucket: str, tmp_path: Path
) -> None:
    away = open_location(f"{bucket}/copies/one")
    s3.proxy.reset(every(4, Fault.ERROR_500))
    assert copy_store(source, away).copied == 3
    errors = s3.proxy.faults[Fault.ERROR_500]
    s3.proxy.reset(every(4, Fault.DROPPED, "GET"))
    back = open_location(tmp_path / "back")
    assert copy_store(away, back).copied == 3
    drops = s3.proxy.faults[Fault.DROPPED]
    print(f"{errors} errors, {drops} dropped bodies")
    assert errors > 10
    assert drops > 10
    assert _files(back) == _files(source)
    s3.proxy.reset()
    copy_store(source, away)
    assert s3.proxy.count("PUT") == 0
    assert _verified(away) == {0, 1, 2}


def test_cut_anywhere_it_is_a_sound_store_and_goes_on(source: Location, tmp_path: Path) -> None:
    total = len(_files(source))
    cuts = 0
    for writes in (*range(6), *range(6, total, 5), total - 1):
        target = Cut(str(tmp_path / str(writes)))
        Cut.writes_left = writes
        with pytest.raises(StorageError, match="disk gone"):
            copy_store(source, target, jobs=1)
        cuts += 1
        if target.exists("manifest.json"):
            assert len(_verified(target)) <= 2
        else:
            assert writes < 4
    Cut.writes_left = -1
    for writes in (0, 2, 26, total - 1):
        target = Cut(str(tmp_path / str(writes)))
        there = _verified(target) if target.exists("manifest.json") else set()
        result = copy_store(source, target)
        assert result.skipped == len(there)
        assert result.copied == 3 - len(there)
        assert _files(target) == _files(source)
    print(f"{cuts} cuts, each a sound store")


def test_a_shard_that_differs_or_is_damaged_there_is_copied_again(
    source: Location, tmp_path: Path
) -> None:
    target = open_location(tmp_path)
    copy_store(source, target)
    target.write_atomic(commit_key(1), b"{")
    commit = StoreReader.open(source).commits[2]
    other = commit.model_copy(update={"content_sha256": "0" * 64})
    target.write_atomic(commit_key(2), seal(other))
    target.write_atomic("vocabulary.parquet", b"PAR1")
    result = copy_store(source, target)
    assert (result.copied, result.skipped) == (2, 1)
    assert _files(target) == _files(source)


def test_damage_at_the_source_is_named_and_the_rest_copied(
    source: Location, tmp_path: Path
) -> None:
    broken = open_location(tmp_path / "broken")
    copy_store(source, broken)
    path = f"{StoreReader.open(broken).commits[1].path}/tail_mass/c/0"
    data = bytearray(broken.read_bytes(path))
    data[len(data) // 2] ^= 1
    broken.write_atomic(path, bytes(data))
    broken.write_atomic(commit_key(2), b"{}")
    target = open_location(tmp_path / "copy")
    result = copy_store(broken, target)
    assert result.copied == 1
    lines = sorted(error.line() for error in result.faults)
    assert len(lines) == 2
    assert "shard 1, file tail_mass/c/0" in " ".join(lines)
    assert "commits/00002.json" in " ".join(lines)
    assert _verified(target) == {0}
    broken.delete(path)
    assert "file is missing" in " ".join(e.line() for e in copy_store(broken, target).faults)


class Rotten(LocalLocation):
    """A disk that does not keep what it is given."""

    def open_write(self, key: str):  # type: ignore[no-untyped-def]
        file = super().open_write(key)
        if key.endswith("c/0"):
            write = file.write
            file = _Flipping(file, write)
        return file


class _Flipping:
    def __init__(self, file, write) -> None:  # type: ignore[no-untyped-def]
        self._file, self._write = file, write

    def write(self, data: bytes) -> int:
        return int(self._write(bytes([data[0] ^ 1]) + data[1:]))

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.mark.parametrize("verify", [True, False])
def test_what_arrives_changed_is_not_committed(
    source: Location, tmp_path: Path, verify: bool
) -> None:
    target = Rotten(str(tmp_path))
    result = copy_store(source, target, verify=verify)
    if verify:
        assert result.copied == 0
        assert len(result.faults) == 3
        assert str(tmp_path) in result.faults[0].line()
        assert StoreReader.open(target).commits == {}
    else:
        assert result.copied == 3
        with pytest.raises(CorruptionError):
            _verified(target)


def test_another_store_is_never_written_over(source: Location, tmp_path: Path) -> None:
    target = open_location(tmp_path / "other")
    _store(target, shards=1, top_k=5)
    before = _files(target)
    with pytest.raises(MismatchError) as caught:
        copy_store(source, target)
    line = caught.value.line()
    assert StoreReader.open(source).manifest.fingerprint() in line
    assert StoreReader.open(target).manifest.fingerprint() in line
    assert _files(target) == before


def test_a_folder_of_something_else_is_refused(source: Location, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        copy_store(source, open_location(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        copy_store(open_location(tmp_path / "none"), open_location(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_commit_that_names_strange_files_copies_none_of_them(
    source: Location, tmp_path: Path
) -> None:
    hostile = open_location(tmp_path / "hostile")
    copy_store(source, hostile)
    commit = StoreReader.open(hostile).commits[0]
    record = commit.files["zarr.json"]
    names = ("../../../secret", "/etc/hostname", "a/../../b", "tail_mass/c/0\n", "a\\b", "x\0y")
    for name in names:
        files = {name: record, **commit.files}
        hostile.write_atomic(commit_key(0), seal(commit.model_copy(update={"files": files})))
        target = open_location(tmp_path / "deep" / "copy")
        result = copy_store(hostile, target)
        assert len(result.faults) == 1, name
        assert 0 not in StoreReader.open(target).commits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "hostile"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["copy"]


class Signalled(LocalLocation):
    """A disk at whose 30th file the scheduler asks to stop."""

    files = 0

    def open_write(self, key: str):  # type: ignore[no-untyped-def]
        Signalled.files += 1
        if Signalled.files == 30:
            assert threading.main_thread().ident is not None
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            time.sleep(0.2)  # until the main thread has seen it
        return super().open_write(key)


def test_a_signal_stops_between_files(
    source: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store_tools.copy.open_location", lambda url: Signalled(str(url)))
    assert _run(source.url, tmp_path, "--jobs", 1) == 143
    assert 30 <= Signalled.files <= 31
    assert _verified(open_location(tmp_path)) == {0}
    assert _run(source.url, tmp_path) == 0
    assert _files(open_location(tmp_path)) == _files(source)


def _run(*arguments: object) -> int | str | None:
    group = StageGroup("store", commands={"copy": copy_command})
    with pytest.raises(SystemExit) as caught:
        group.main(["copy", *map(str, arguments)], prog_name="store")
    return caught.value.code


def test_command(source: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(source.url, tmp_path / "copy", "--jobs", 2) == 0
    assert "3 shards copied" in capsys.readouterr().out
    assert _run(source.url, tmp_path / "copy", "--no-verify") == 0
    assert "0 shards copied (0.0 MB), 3 there already" in capsys.readouterr().out
    open_location(tmp_path / "copy").write_atomic(commit_key(1), b"{")
    assert _run(tmp_path / "copy", tmp_path / "second") == 2
    out, err = capsys.readouterr()
    assert "2 shards copied" in out
    assert "commits/00001.json" in err
    assert err.splitlines()[-1].startswith("error: 1 shards not copied")
    assert "Traceback" not in err
    assert _run("s3://key:hunter2@bucket/store", tmp_path / "x") == 2
    err = capsys.readouterr().err
    assert "hunter2" not in err
    assert "environment" in err
