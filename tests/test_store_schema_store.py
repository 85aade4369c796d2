"""Writer and reader against disk: what was written comes back, and nothing else ever does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store_schema import SCHEMA_VERSION
from store_schema.errors import (
    CorruptionError,
    MismatchError,
    MissingError,
    SchemaVersionError,
    StorageError,
    StoreError,
)
from store_schema.fingerprint import fingerprint
from store_schema.layout import Arrays, Kind, array_names
from store_schema.location import open_location
from store_schema.reader import StoreReader, commit_key
from store_schema.writer import StoreWriter
from tests import store_factory

REPOSITORY = Path(__file__).resolve().parent.parent


def _writer(url: str | Path, kind: Kind = "source", top_k: int = 4) -> StoreWriter:
    manifest = store_factory.manifest(kind, top_k=top_k)
    return StoreWriter.open(open_location(url), manifest, store_factory.vocabulary())


def _same(left: Arrays, right: Arrays) -> bool:
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype
        and np.array_equal(left[name], right[name], equal_nan=left[name].dtype.kind == "f")
        for name in left
    )


def _read_everything(url: str | Path, plan_url: str | Path | None = None) -> None:
    """All that a stage may read of a store."""
    reader = StoreReader.open(open_location(url))
    assert reader.vocabulary.tokens
    for shard in reader.commits:
        reader.verify(shard)


# ------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("kind", ["source", "aligned"])
@settings(max_examples=15)
@given(rows=st.lists(st.integers(0, 7), max_size=5), seed=st.integers(0, 2**31))
def test_arrays_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, kind: Kind, rows: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    arrays = store_factory.arrays(kind, rows, seed=seed)
    _writer(folder, kind).write(store_factory.shard_record(), arrays, {"nats": 1.5})
    reader = StoreReader.open(open_location(folder))
    assert _same(reader.read(0), arrays)
    assert reader.commits[0].stats == {"nats": 1.5}
    reader.verify(0)


def test_no_entries_at_all(tmp_path: Path) -> None:
    arrays = store_factory.arrays("source", (1, 1))
    assert len(arrays["entry_ids"]) == 0
    _writer(tmp_path).write(store_factory.shard_record(), arrays)
    assert _same(StoreReader.open(open_location(tmp_path)).read(0), arrays)


def test_ids_past_17_bits(tmp_path: Path) -> None:
    arrays = store_factory.arrays("source", (9,), top_k=9)
    arrays["token_ids"][:] = store_factory.BIG_VOCAB - 1
    arrays["entry_ids"][0] = store_factory.BIG_VOCAB - 1
    _writer(tmp_path).write(store_factory.shard_record(), arrays)
    back = StoreReader.open(open_location(tmp_path)).read(0, ["token_ids", "entry_ids"])
    assert set(back) == {"token_ids", "entry_ids"}
    assert back["token_ids"].min() == back["entry_ids"][0] == store_factory.BIG_VOCAB - 1


def test_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store_schema.shard_io.POSITION_CHUNK", 4)
    monkeypatch.setattr("store_schema.shard_io.ENTRY_CHUNK", 5)
    arrays = store_factory.arrays("aligned", (9, 0, 8, 3), top_k=6)
    _writer(tmp_path, "aligned").write(store_factory.shard_record(), arrays)
    assert _same(StoreReader.open(open_location(tmp_path)).read(0), arrays)


def test_writer_refuses_what_breaks_the_layout(tmp_path: Path) -> None:
    arrays = store_factory.arrays()
    arrays["tail_mass"][0] = np.nan
    writer = _writer(tmp_path)
    with pytest.raises(CorruptionError, match="tail_mass"):
        writer.write(store_factory.shard_record(), arrays)
    assert writer.committed() == set()


# ------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def sound_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    writer = _writer(folder, "aligned")
    writer.write(store_factory.shard_record(), store_factory.arrays("aligned", (40, 0, 60)))
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def copied(sound_store: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage (hard links would damage the original too)."""
    for file in _files(sound_store):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((sound_store / file).read_bytes())
    return tmp_path


def test_every_array_has_files_of_its_own(sound_store: Path) -> None:
    names = {str(file) for file in _files(sound_store)}
    for name in array_names("aligned"):
        assert any(f"/{name}/c/0" in file for file in names), name
        assert any(f"/{name}/zarr.json" in file for file in names), name


def _reads_the_same(folder: Path) -> bool:
    """Whether the vocabulary still reads, and then as what it was."""
    try:
        return StoreReader.open(open_location(folder)).vocabulary.tokens == (b"", b"a", b"bc")
    except CorruptionError:
        return False


def test_flipped_byte_in_every_file_is_found_and_named(copied: Path) -> None:
    _read_everything(copied)
    rng = np.random.default_rng(0)
    for file in _files(copied):
        whole = (copied / file).read_bytes()
        places = {0, len(whole) - 1, *rng.integers(0, len(whole), 4).tolist()}
        for place in sorted(places):
            for flip in (0x01, 0x80):
                damaged = bytearray(whole)
                damaged[place] ^= flip
                (copied / file).write_bytes(damaged)
                if file.suffix == ".parquet" and _reads_the_same(copied):
                    continue  # Parquet has bytes that say nothing; the content is proved
                with pytest.raises(StoreError) as caught:
                    _read_everything(copied)
                assert caught.value.exit_code == 2
                where = str(caught.value.where)
                if file.parts[0] == "data":
                    assert "shard 0" in where, (file, place)
                    if file.parts[2] in array_names("aligned"):
                        assert file.parts[2] in where, (file, place, where)
                else:
                    assert file.name in where, (file, place, where)
        (copied / file).write_bytes(whole)
    _read_everything(copied)


@pytest.mark.parametrize("how", ["cut to half", "cut by one", "emptied", "removed", "longer"])
def test_cut_and_missing_files_are_found(copied: Path, how: str) -> None:
    for file in _files(copied):
        whole = (copied / file).read_bytes()
        if how == "removed":
            (copied / file).unlink()
        else:
            kept = {
                "cut to half": whole[: len(whole) // 2],
                "cut by one": whole[:-1],
                "emptied": b"",
                "longer": whole + b"\0",
            }
            (copied / file).write_bytes(kept[how])
        if how == "removed" and file.parts[0] == "commits":
            # Without its commit a shard does not exist: that is the contract, not damage.
            with pytest.raises(MissingError, match="shard 0"):
                StoreReader.open(open_location(copied)).read(0)
        elif how == "cut by one" and file.suffix == ".json" and file.parts[0] != "data":
            _read_everything(copied)  # only the newline at the end
        else:
            with pytest.raises(StoreError):
                _read_everything(copied)
        (copied / file).write_bytes(whole)


def test_swapped_arrays_are_found(copied: Path) -> None:
    """Two arrays of one shape and dtype, each with sound checksums, in each other's place."""
    data = next((copied / "data").iterdir())
    one, other = data / "token_ids" / "c" / "0", data / "byte_ends" / "c" / "0"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(CorruptionError):
        _read_everything(copied)


def _reseal(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    del content["digest"]
    content |= changes
    file.write_text(json.dumps(content | {"digest": fingerprint(content)}))


@pytest.mark.parametrize(
    "path",
    [
        "../elsewhere",
        "data/../../elsewhere",
        "/etc",
        "data/00000-0123456789abcdef/../x",
        "data/00000-0123456789abcdeg",
        "data/00000-0123456789abcdef\n",
        "s3://bucket/data/00000-0123456789abcdef",
        "",
    ],
)
def test_hostile_data_path_of_a_commit_is_refused(copied: Path, path: str) -> None:
    _reseal(copied / commit_key(0), path=path)
    with pytest.raises(CorruptionError, match="path"):
        StoreReader.open(open_location(copied)).read(0)


def test_commit_of_another_shard_or_store_is_refused(copied: Path) -> None:
    whole = (copied / commit_key(0)).read_bytes()
    (copied / commit_key(1)).write_bytes(whole)
    with pytest.raises(CorruptionError, match="another shard"):
        _ = StoreReader.open(open_location(copied)).commits
    (copied / commit_key(1)).unlink()
    _reseal(copied / commit_key(0), store_fingerprint="0" * 32)
    with pytest.raises(MismatchError, match=r"0{32}"):
        _ = StoreReader.open(open_location(copied)).commits


def test_lengths_of_a_commit_are_checked_before_reading(copied: Path) -> None:
    counts = json.loads((copied / commit_key(0)).read_text())["counts"]
    _reseal(copied / commit_key(0), counts=counts | {"positions": 10**15})
    with pytest.raises(CorruptionError, match="wrong shape"):
        StoreReader.open(open_location(copied)).read(0)


@pytest.mark.parametrize("file", ["manifest.json", commit_key(0)])
def test_newer_schema_is_refused_by_reader_and_writer(copied: Path, file: str) -> None:
    # A newer version may have fields we do not know, and a digest over them.
    _reseal(copied / file, schema_version=SCHEMA_VERSION + 1, new_field=1)
    with pytest.raises(SchemaVersionError, match="upgrade"):
        _read_everything(copied)
    with pytest.raises(SchemaVersionError):
        _writer(copied, "aligned").committed()


# ------------------------------------------------------------------------------- other manifests


def test_another_manifest_is_refused_and_shows_both(tmp_path: Path) -> None:
    _writer(tmp_path, top_k=4).write(store_factory.shard_record(), store_factory.arrays())
    before = {file: (tmp_path / file).read_bytes() for file in _files(tmp_path)}
    with pytest.raises(MismatchError) as caught:
        _writer(tmp_path, top_k=5)
    line = caught.value.line()
    assert "top_k 5" in line
    assert "top_k 4" in line
    assert {file: (tmp_path / file).read_bytes() for file in _files(tmp_path)} == before


def test_names_and_versions_do_not_make_another_store(tmp_path: Path) -> None:
    # A finished shard first: a store without any would be begun anew, whatever differs.
    _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    manifest = store_factory.manifest()
    moved = manifest.model_copy(
        update={
            "model": manifest.model.model_copy(update={"name": "/elsewhere/m"}),
            "created_by": "logitfuse 9",
        }
    )
    writer = StoreWriter.open(open_location(tmp_path), moved, store_factory.vocabulary())
    assert writer.manifest == manifest
    assert writer.committed() == {0}
    _read_everything(tmp_path)


def test_plan_and_missing_shards_are_told(tmp_path: Path) -> None:
    plan = store_factory.plan(open_location(tmp_path / "plan"), [["a"], ["b"]])
    reader = StoreReader.open(_writer(tmp_path / "store").location)
    with pytest.raises(MismatchError) as caught:
        reader.require_plan(plan)
    assert plan.fingerprint in caught.value.line()
    assert "p" * 32 in caught.value.line()
    with pytest.raises(MissingError, match=r"2 shard\(s\) not there yet \(0, 1\)"):
        reader.require_shards(plan.shards)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no store"):
        StoreReader.open(open_location(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------- concurrency, death


def test_two_writers_on_one_shard_do_no_harm(tmp_path: Path) -> None:
    arrays = store_factory.arrays("source", (30, 40))
    _writer(tmp_path)
    barrier = threading.Barrier(4)
    failures: list[BaseException] = []

    def work() -> None:
        writer = _writer(tmp_path)
        barrier.wait()
        try:
            writer.write(store_factory.shard_record(), arrays)
        except BaseException as error:  # told by the test below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    _read_everything(tmp_path)
    assert _same(StoreReader.open(open_location(tmp_path)).read(0), arrays)


WRITES_FOR_EVER = """
import sys
from store_schema.location import open_location
from store_schema.writer import StoreWriter
from tests import store_factory
location = open_location(sys.argv[1])
writer = StoreWriter.open(location, store_factory.manifest(), store_factory.vocabulary())
print("ready", flush=True)
shard = 0
while True:
    writer.write(store_factory.shard_record(shard), store_factory.arrays(rows=(50, 50), seed=shard))
    shard += 1
"""


def test_kill_9_leaves_whole_shards_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITES_FOR_EVER, str(tmp_path)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.15 + float(rng.random()) * 0.15)
        process.kill()
        process.wait()
        process.stdout.close()
        _read_everything(tmp_path)
    reader = StoreReader.open(open_location(tmp_path))
    assert reader.commits
    for shard in reader.commits:
        expected = store_factory.arrays(rows=(50, 50), seed=shard)
        assert _same(reader.read(shard), expected)


def test_failed_write_removes_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = _writer(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("store_schema.shard_io.google_crc32c.value", refuse)
    with pytest.raises(StorageError, match="free space"):
        writer.write(store_factory.shard_record(), store_factory.arrays())
    assert writer.committed() == set()
    assert not list((tmp_path / "data").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path, leave: int) -> None:
    """Fill the disk but for `leave` bytes."""
    with (folder / "filler").open("wb") as file:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        file.write(b"x" * max(free - leave, 0))


@pytest.mark.parametrize("leave", [0, 4096, 40_960])
def test_full_disk_is_told_and_nothing_lost(small_disk: Path, leave: int) -> None:
    store = small_disk / "store"
    writer = _writer(store)
    writer.write(store_factory.shard_record(0), store_factory.arrays())
    _fill(small_disk, leave)
    big = store_factory.arrays(rows=(3000,), top_k=30, seed=1)
    with pytest.raises(StorageError, match="free space and rerun"):
        writer.write(store_factory.shard_record(1), big)
    assert writer.committed() == {0}
    assert len(list((store / "data").iterdir())) == 1
    (small_disk / "filler").unlink()
    writer.write(store_factory.shard_record(1), store_factory.arrays(seed=1))
    _read_everything(store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_denied_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permissions"):
        _writer(tmp_path / "store")


def test_content_digest_does_not_depend_on_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = store_factory.arrays(rows=(20, 30))
    one = _writer(tmp_path / "a").write(store_factory.shard_record(), arrays)
    monkeypatch.setattr("store_schema.shard_io.POSITION_CHUNK", 7)
    other = _writer(tmp_path / "b").write(store_factory.shard_record(), arrays)
    assert one.content_sha256 == other.content_sha256
    assert one.path != other.path


def test_data_is_durable_before_its_commit_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a commit must not point at files that never reached the disk."""
    synced: set[Path] = set()
    real = os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name.startswith(f".{Path(commit_key(0)).name}"):
            data = next((tmp_path / "data").iterdir())
            assert {data, *data.rglob("*")} <= synced
        synced.add(path)
        real(descriptor)

    writer = _writer(tmp_path)
    monkeypatch.setattr(os, "fsync", note)
    writer.write(store_factory.shard_record(), store_factory.arrays("source"))
    assert any(path.name.startswith(".00000.json") for path in synced)


def test_data_stays_when_the_commit_may_have_been_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename was done, the answer was an error: the commit stands, so must its data."""
    writer = _writer(tmp_path)
    real = os.fsync

    def failing(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/commits"):
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError):
        writer.write(store_factory.shard_record(), store_factory.arrays("source"))
    monkeypatch.undo()
    reader = StoreReader.open(open_location(tmp_path))
    assert set(reader.commits) == {0}
    reader.verify(0)


def test_a_store_without_a_finished_shard_may_begin_anew(tmp_path: Path) -> None:
    """E.g. begun with a broken weight file, which was then mended: nothing is lost."""
    _writer(tmp_path, top_k=4)
    writer = _writer(tmp_path, top_k=5)
    writer.write(store_factory.shard_record(), store_factory.arrays())
    assert StoreReader.open(open_location(tmp_path)).manifest.top_k == 5
    with pytest.raises(MismatchError):
        _writer(tmp_path, top_k=4)
