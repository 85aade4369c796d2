"""Writer and reader against disk: what was written comes back, and nothing else ever does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store_schema import SCHEMA_VERSION
from store_schema.disk.location import open_location
from store_schema.errors import (
    ConfigError,
    CorruptionError,
    MismatchError,
    MissingError,
    SchemaVersionError,
    StorageError,
)
from store_schema.fingerprint import fingerprint
from store_schema.layout import FORMS, Form
from store_schema.presets import PRESETS
from store_schema.store.reader import StoreReader, commit_key
from store_schema.store.writer import StoreWriter
from tests import store_factory
from tests.store_damage import files_of, read_everything, reseal, same


def _writer(url: str | Path, kind: Form = "source", top_k: int = 4) -> StoreWriter:
    manifest = store_factory.manifest(kind, top_k=top_k)
    return StoreWriter.open(open_location(url), manifest, store_factory.vocabulary())


# ------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("kind", FORMS)
@settings(max_examples=15)
@given(rows=st.lists(st.integers(0, 7), max_size=5), seed=st.integers(0, 2**31))
def test_arrays_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, kind: Form, rows: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    arrays = store_factory.arrays(kind, rows, seed=seed)
    _writer(folder, kind).write(store_factory.shard_record(), arrays, {"nats": 1.5})
    reader = StoreReader.open(open_location(folder))
    assert same(reader.read(0), arrays)
    assert reader.commits[0].stats["nats"] == 1.5
    reader.verify(0)


def test_no_entries_at_all(tmp_path: Path) -> None:
    arrays = store_factory.arrays("source", (1, 1))
    assert len(arrays["entry_ids"]) == 0
    _writer(tmp_path).write(store_factory.shard_record(), arrays)
    assert same(StoreReader.open(open_location(tmp_path)).read(0), arrays)


def test_ids_past_17_bits(tmp_path: Path) -> None:
    arrays = store_factory.arrays("source", (9,), top_k=9)
    arrays["token_ids"][:] = store_factory.BIG_VOCAB - 1
    arrays["entry_ids"][0] = store_factory.BIG_VOCAB - 1
    _writer(tmp_path).write(store_factory.shard_record(), arrays)
    back = StoreReader.open(open_location(tmp_path)).read(0, ["token_ids", "entry_ids"])
    assert set(back) == {"token_ids", "entry_ids"}
    assert back["token_ids"].min() == back["entry_ids"][0] == store_factory.BIG_VOCAB - 1


def test_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store_schema.encoding.shard_io.CHUNK", 4)
    arrays = store_factory.arrays("aligned", (9, 0, 8, 3), top_k=6)
    _writer(tmp_path, "aligned").write(store_factory.shard_record(), arrays)
    assert same(StoreReader.open(open_location(tmp_path)).read(0), arrays)


def test_writer_refuses_what_breaks_the_layout(tmp_path: Path) -> None:
    arrays = store_factory.arrays()
    arrays["tail_mass"][0] = np.nan
    writer = _writer(tmp_path)
    with pytest.raises(CorruptionError, match="tail_mass"):
        writer.write(store_factory.shard_record(), arrays)
    assert writer.committed() == set()


@pytest.mark.parametrize("file", ["manifest.json", commit_key(0)])
def test_newer_schema_is_refused_by_reader_and_writer(tmp_path: Path, file: str) -> None:
    _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    # A newer version may have fields we do not know, and a digest over them.
    reseal(tmp_path / file, schema_version=SCHEMA_VERSION + 1, new_field=1)
    with pytest.raises(SchemaVersionError, match="upgrade"):
        read_everything(tmp_path)
    with pytest.raises(SchemaVersionError):
        _writer(tmp_path).committed()


# ------------------------------------------------------------------------------- other manifests


def test_another_manifest_is_refused_and_shows_both(tmp_path: Path) -> None:
    _writer(tmp_path, top_k=4).write(store_factory.shard_record(), store_factory.arrays())
    before = {file: (tmp_path / file).read_bytes() for file in files_of(tmp_path)}
    with pytest.raises(MismatchError) as caught:
        _writer(tmp_path, top_k=5)
    line = caught.value.line()
    assert "top_k 5" in line
    assert "top_k 4" in line
    assert {file: (tmp_path / file).read_bytes() for file in files_of(tmp_path)} == before


def test_names_and_versions_do_not_make_another_store(tmp_path: Path) -> None:
    # A finished shard first: a store without any would be begun again, whatever differs.
    _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    manifest = store_factory.manifest()
    moved = manifest.model_copy(
        update={
            "model": manifest.model.model_copy(update={"name": "/elsewhere/m"}),
            "created_by": "logitfuse 9",
        }
    )
    writer = StoreWriter.open(open_location(tmp_path), moved, store_factory.vocabulary())
    assert writer.manifest.request() == manifest.request()
    assert StoreReader.open(open_location(tmp_path)).manifest.model.name == "/elsewhere/m"
    assert writer.committed() == {0}
    read_everything(tmp_path)


def test_plan_and_missing_shards_are_told(tmp_path: Path) -> None:
    plan = store_factory.plan(open_location(tmp_path / "plan"), [["a"], ["b"]])
    writer = _writer(tmp_path / "store")
    reader = StoreReader.open(writer.location)
    reader.require_plan(plan)  # nothing is written yet: it goes with any
    with pytest.raises(MissingError, match=r"2 shard\(s\) not there yet \(0, 1\)"):
        reader.require_shards(plan.shards)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no store"):
        StoreReader.open(open_location(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------- order of a write


def test_failed_write_removes_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = _writer(tmp_path)

    fsync, files = os.fsync, 0

    def refuse(descriptor: int) -> None:
        nonlocal files
        files += Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_file()
        if files > 5:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="free space"):
        writer.write(store_factory.shard_record(), store_factory.arrays())
    assert files > 5
    assert writer.committed() == set()
    assert not list((tmp_path / "data").iterdir())


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
    monkeypatch.setattr("store_schema.encoding.shard_io.CHUNK", 7)
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


def test_a_store_without_a_finished_shard_may_begin_again(tmp_path: Path) -> None:
    """E.g. begun with a broken weight file, which was then mended: nothing is lost."""
    _writer(tmp_path, top_k=4)
    writer = _writer(tmp_path, top_k=5)
    writer.write(store_factory.shard_record(), store_factory.arrays())
    assert StoreReader.open(open_location(tmp_path)).manifest.top_k == 5
    with pytest.raises(MismatchError):
        _writer(tmp_path, top_k=4)


def test_a_plan_that_no_reader_would_take_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store_schema.plan.plan.MAX_RECORD_BYTES", 100)
    with pytest.raises(ConfigError, match="shard_tokens"):
        store_factory.plan(open_location(tmp_path), [["a"], ["b"]])
    assert not (tmp_path / "plan.json").exists()


# ------------------------------------------------------------------------------- found by review


def _changed_commit(folder: Path, shard: int = 0, **changes: object) -> None:
    file = folder / commit_key(shard)
    content = json.loads(file.read_text())
    del content["digest"]
    content |= changes
    file.write_text(json.dumps(content | {"digest": fingerprint(content)}))


def test_content_that_is_sound_but_another_is_found_by_verify(tmp_path: Path) -> None:
    """Every checksum holds; only the digest of the numbers says that they are others."""
    _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    _changed_commit(tmp_path, content_sha256="0" * 64)
    reader = StoreReader.open(open_location(tmp_path))
    reader.read(0)
    with pytest.raises(CorruptionError, match="content is not what was committed"):
        reader.verify(0)


def test_commit_that_names_data_of_another_shard_is_refused(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    commit = writer.write(store_factory.shard_record(), store_factory.arrays())
    other = commit.path.replace("data/00000-", "data/00007-")
    (tmp_path / commit.path).rename(tmp_path / other)
    _changed_commit(tmp_path, path=other)
    with pytest.raises(CorruptionError, match="data of another shard"):
        StoreReader.open(open_location(tmp_path)).read(0)


def test_store_with_only_damaged_commits_is_not_begun_again(tmp_path: Path) -> None:
    _writer(tmp_path, top_k=4).write(store_factory.shard_record(), store_factory.arrays())
    (tmp_path / commit_key(0)).write_text("{")
    with pytest.raises(MismatchError, match="top_k"):
        _writer(tmp_path, top_k=5)


def test_shard_that_no_reader_would_take_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store_schema.store.guards.MAX_SHARD_BYTES", 100)
    with pytest.raises(CorruptionError, match="too large for"):
        _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    assert not (tmp_path / commit_key(0)).exists()


@pytest.mark.parametrize("size", [10**30, 10**15])
def test_claimed_sizes_never_make_room(tmp_path: Path, size: int) -> None:
    commit = _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    files = {key: record.model_dump() for key, record in commit.files.items()}
    files["token_ranks/c/0"]["size"] = size
    _changed_commit(tmp_path, files=files)
    with pytest.raises(CorruptionError):
        StoreReader.open(open_location(tmp_path)).read(0)


def test_names_may_be_any_iterable_but_must_be_known(tmp_path: Path) -> None:
    _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    reader = StoreReader.open(open_location(tmp_path))
    assert set(reader.read(0, (n for n in ("token_ids",)))) == {"token_ids"}
    with pytest.raises(ValueError, match="token_idz"):
        reader.read(0, ["token_idz"])


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("span_logprobs", 0.5, "span_logprobs"),
        ("span_index", 999, "span_index"),
        ("source_nats", np.nan, "source_nats"),
        ("source_nats", -1.0, "source_nats"),
        ("source_bytes", -5, "source_bytes"),
    ],
)
def test_spans_and_costs_that_cannot_be_are_not_written(
    tmp_path: Path, name: str, value: float, what: str
) -> None:
    arrays = store_factory.arrays("aligned", (9, 0, 8))
    arrays[name][0] = value
    with pytest.raises(CorruptionError, match=what):
        _writer(tmp_path, "aligned").write(store_factory.shard_record(), arrays)


def test_changed_header_of_the_rank_table_is_found(tmp_path: Path) -> None:
    _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    file = tmp_path / "ids_by_rank.npy"
    file.write_bytes(file.read_bytes().replace(b"<u4", b"<i4", 1))
    with pytest.raises(CorruptionError, match="rank table"):
        StoreReader.open(open_location(tmp_path)).read(0)


def test_mismatch_names_the_very_fields(tmp_path: Path) -> None:
    _writer(tmp_path).write(store_factory.shard_record(), store_factory.arrays())
    with pytest.raises(MismatchError) as caught:
        StoreWriter.open(
            open_location(tmp_path),
            store_factory.manifest(encoding=PRESETS["tiny"]),
            store_factory.vocabulary(),
        )
    assert "encoding.selection.floor 0.004" in caught.value.line()
    assert "encoding.selection.floor 0.0" in caught.value.line()
    assert "vocabulary" not in caught.value.line()
