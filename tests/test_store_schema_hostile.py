"""Stores made to harm: each refused with one line, in bounded memory and time, nothing executed.

Every case is read in a process of its own that may not take much memory, forked from a server that
has imported everything.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from store_schema import errors
from store_schema.disk.location import open_location
from store_schema.errors import CorruptionError
from store_schema.manifest import FileRecord
from store_schema.store.guards import MAX_COMMIT_BYTES, check_commit
from store_schema.store.reader import StoreReader, commit_key
from tests import store_damage, store_factory
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


def test_the_sound_store_is_read(store: Path, readers: Readers) -> None:
    with pytest.raises(AssertionError, match="read"):
        readers.refusal(store)


# ------------------------------------------------------------------------------- paths


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
def test_hostile_data_path_of_a_commit_is_refused(store: Path, path: str) -> None:
    store_damage.reseal(store / commit_key(0), path=path)
    with pytest.raises(CorruptionError, match="path"):
        StoreReader.open(open_location(store)).read(0)


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "token_ranks/c/0\0", "token_ranks\\c\\0", ".zgroup", "", "x" * 9999],
)
def test_hostile_file_name_of_a_commit_is_refused(store: Path, readers: Readers, name: str) -> None:
    files = _commit(store)["files"] | {name: {"size": 1, "crc32c": 0}}
    store_damage.reseal(store / commit_key(0), files=files)
    assert "commit names an unknown file" in readers.refusal(store)


def test_a_file_that_the_commit_leaves_out_is_never_fill_values(store: Path) -> None:
    for name in sorted(_commit(store)["files"]):
        kept = {k: v for k, v in _commit(store)["files"].items() if k != name}
        whole = (store / commit_key(0)).read_bytes()
        store_damage.reseal(store / commit_key(0), files=kept)
        with pytest.raises(CorruptionError, match="commit leaves out a file"):
            StoreReader.open(open_location(store)).read(0)
        (store / commit_key(0)).write_bytes(whole)


@pytest.mark.parametrize("key", ["manifest.json", commit_key(0), "vocabulary.parquet", "data"])
def test_a_pipe_or_device_is_not_waited_for(store: Path, readers: Readers, key: str) -> None:
    path = store / key
    if key == "data":
        path = store / _commit(store)["path"] / "token_ranks/c/0"
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in readers.refusal(store)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "not a regular file" in readers.refusal(store)


# ------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "counts",
    [
        {"positions": 10**15},
        {"positions": 10**30},
        {"entries": 10**12, "positions": 10**12},
        {"positions": 2**31, "entries": 0},
        {"segments": 2**40},
    ],
)
def test_lengths_of_a_commit_are_checked_before_reading(
    store: Path, readers: Readers, counts: dict[str, int]
) -> None:
    commit = _commit(store)
    store_damage.reseal(store / commit_key(0), counts=commit["counts"] | counts)
    assert "too large for" in readers.refusal(store)
    # The same with metadata that agrees.
    for file in commit["files"]:
        document = json.loads((store / commit["path"] / "token_ranks/zarr.json").read_text())
        if file == "token_ranks/zarr.json":
            shape = [counts.get("positions", document["shape"][0])]
            store_damage.change_metadata(store, file, shape=shape)
    assert "too large for" in readers.refusal(store)


def test_more_entries_than_top_k_allows_are_refused(store: Path, readers: Readers) -> None:
    counts = _commit(store)["counts"]
    store_damage.reseal(store / commit_key(0), counts=counts | {"entries": 401})
    assert "more entries than positions allow" in readers.refusal(store)


def test_a_full_disk_of_zeros_does_not_make_a_large_shard_honest(sound_store: Path) -> None:
    reader = StoreReader.open(open_location(sound_store))
    commit = reader.commits[0]
    files = {name: FileRecord(size=1 << 40, crc32c=0) for name in commit.files}
    counts = commit.counts.model_copy(update={"positions": 10**12})
    hostile = commit.model_copy(update={"files": files, "counts": counts})
    with pytest.raises(CorruptionError, match="too large for"):
        check_commit(hostile, reader.manifest, reader._specs(None), "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**12},
        {"num_shards": 10**12},
        {"top_k": 10**30},
        {"num_shards": -1},
        {"schema_version": "2"},
        {"schema_version": True},
        {"schema_version": 2.0},
        {"schema_version": 0},
        {"schema_version": None},
        {"schema_version": 1},
        {"schema_version": 3},
        {"encoding": None},
        {"ranking_fingerprint": None},
        {"top_k": None},
        {"top_p": 0.5},
        {"logprob_codec": {"name": "float32"}},
        {"encoding": {"steps": {"step": 1e-300, "max_step": 0.5, "label_step": 0.5}}},
        {"kind": "other"},
        {"kind": "aligned", "extras": ["entropy"]},
        {"kind": "generated"},  # with top_k
        {"extras": ["entropy"] * 100_000},
        {"extras": ["entropy\x1b[31m" * 1000]},
        {"extras": {"entropy": 1}},
        {"extras": ["entropy"]},
        {"settings": {f"k{i}": i for i in range(100_000)}, "kind": 1},
        {f"unknown{i}\x1b[31m": i for i in range(10_000)},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_manifest_that_cannot_be_is_refused(
    store: Path, readers: Readers, changes: dict[str, Any]
) -> None:
    if "vocab_size" in changes:
        model = json.loads((store / "manifest.json").read_text())["model"]
        changes = {"model": model | changes}
    store_damage.reseal(store / "manifest.json", **changes)
    assert str(store) in readers.refusal(store)


# ------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("key", ["manifest.json", commit_key(0)])
@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema_version":4,"settings":' + b'{"a":' * 500 + b"1" + b"}" * 501,
        b'{"schema_version":4,"top_k":1' + b"0" * 1_000_000 + b"}",
        b'{"schema_version":1' + b"0" * 1_000_000 + b"}",
        b'{"schema_version":4,"top_k":NaN,"digest":null}',
        b'{"schema_version":4,"top_k":1e999,"digest":null}',
        b'{"schema_version":4,"source":"\\ud800","digest":null}',
        b"\xff\xfe{\0}\0",
        b"",
        b"null",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_json_bombs(store: Path, readers: Readers, key: str, text: bytes) -> None:
    (store / key).write_bytes(text)
    assert Path(key).name in readers.refusal(store)


def test_a_sealed_record_may_not_nest_without_end(store: Path, readers: Readers) -> None:
    nested: dict[str, Any] = {}
    for _ in range(500):
        nested = {"a": nested}
    store_damage.reseal(store / "manifest.json", settings=nested)
    assert "nested too deep" in readers.refusal(store)


@pytest.mark.parametrize("key", ["manifest.json", commit_key(0), "vocabulary.parquet"])
def test_a_record_of_a_terabyte_is_not_read(store: Path, readers: Readers, key: str) -> None:
    os.truncate(store / key, 1 << 40)
    assert "too long" in readers.refusal(store)


def test_a_long_commit_is_refused(store: Path, readers: Readers) -> None:
    data = (store / commit_key(0)).read_bytes()
    (store / commit_key(0)).write_bytes(data + b" " * MAX_COMMIT_BYTES)
    assert "commit is too long" in readers.refusal(store)


# ------------------------------------------------------------------------------- Parquet


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False, **options)
    return sink.getvalue()


def _tokens(column: pa.Array) -> pa.Table:
    return pa.table({"bytes": column, "special": pa.repeat(False, len(column))})


@pytest.mark.parametrize("what", ["rows", "long", "repeated", "columns", "types", "nothing"])
def test_parquet_bombs(store: Path, readers: Readers, what: str) -> None:
    tables = {
        "rows": lambda: _tokens(pa.repeat(pa.scalar(b"", pa.binary()), (1 << 24) + 1)),
        "long": lambda: _tokens(pa.array([b"\0" * (300 << 20)], pa.binary())),
        "repeated": lambda: _tokens(pa.repeat(pa.scalar(b"\0" * (1 << 18), pa.binary()), 1 << 15)),
        "columns": lambda: pa.table({f"c{i}": [1] for i in range(500)}),
        "types": lambda: pa.table({"bytes": [1], "special": [[True]]}),
        "nothing": lambda: pa.table({"bytes": pa.array([], pa.binary())}),
    }
    if what == "repeated":  # 8 GiB when written out, kept as one string in a dictionary
        one = pa.array([b"\0" * (1 << 18)], pa.binary())
        column = pa.DictionaryArray.from_arrays(pa.repeat(0, 1 << 15).cast(pa.int32()), one)
        data = _parquet(_tokens(column), store_schema=False)
    else:
        data = _parquet(tables[what](), use_dictionary=False)
    assert len(data) < 1 << 20
    (store / "vocabulary.parquet").write_bytes(data)
    line = readers.refusal(store)
    assert "vocabulary.parquet" in line
    # Else it is only the limit on memory here that stops them.
    assert ("more bytes than there can be" in line) == (what in ("long", "repeated"))


@pytest.mark.parametrize("what", ["repeated", "rows", "groups"])
def test_hostile_segments_are_refused(tmp_path: Path, readers: Readers, what: str) -> None:
    store_factory.plan(open_location(tmp_path), [["one"] * 3000, ["three"]])
    table = pq.read_table(tmp_path / "segments.parquet")
    if what == "repeated":
        text = pa.DictionaryArray.from_arrays(
            pa.repeat(0, len(table)).cast(pa.int32()), pa.array(["x" * (1 << 19)])
        )
        table = table.set_column(table.schema.get_field_index("text"), "text", text)
        data = _parquet(table, store_schema=False, row_group_size=3000)
    elif what == "rows":
        data = _parquet(pa.concat_tables([table] * 3))
    else:
        data = _parquet(table.slice(0, 0))
    (tmp_path / "segments.parquet").write_bytes(data)
    line = readers.refusal(tmp_path, "plan")
    assert "segments.parquet" in line
    assert ("more bytes than there can be" in line) == (what == "repeated")


@pytest.mark.parametrize(
    "change",
    [
        {"start": 1},
        {"stop": 10**12},
        {"index": 1},
        {"index": -1},
        {"num_tokens": {"target": "x"}},
        {"fingerprint": None},
    ],
    ids=str,
)
def test_hostile_plan_is_refused(tmp_path: Path, readers: Readers, change: dict[str, Any]) -> None:
    plan = store_factory.plan(open_location(tmp_path), [["one", "two"], ["three"]])
    shards = [shard.model_dump() for shard in plan.shards]
    store_damage.reseal(tmp_path / "plan.json", shards=[shards[0] | change, shards[1]])
    assert "plan.json" in readers.refusal(tmp_path, "plan")


# ------------------------------------------------------------------------------- other stores


def test_commit_of_another_shard_or_store_is_refused(store: Path) -> None:
    whole = (store / commit_key(0)).read_bytes()
    (store / commit_key(1)).write_bytes(whole)
    with pytest.raises(CorruptionError, match="another shard"):
        _ = StoreReader.open(open_location(store)).commits
    (store / commit_key(1)).unlink()
    store_damage.reseal(store / commit_key(0), store_fingerprint="0" * 32)
    with pytest.raises(errors.MismatchError, match=r"0{32}"):
        _ = StoreReader.open(open_location(store)).commits


def test_a_shard_of_other_segments_is_refused(tmp_path: Path) -> None:
    store_damage.make_store(tmp_path)
    reader = StoreReader.open(open_location(tmp_path))
    shard = store_factory.shard_record()
    reader.require_shards([shard])
    with pytest.raises(errors.MismatchError, match="shard 0") as caught:
        reader.require_shards([shard.model_copy(update={"fingerprint": "e" * 32})])
    assert "e" * 32 in caught.value.line()
    assert "f" * 32 in caught.value.line()


def test_a_rank_table_that_names_an_id_twice_is_refused(store: Path, readers: Readers) -> None:
    from store_schema.encoding.frequency import ranking_bytes, ranking_fingerprint

    ranking = StoreReader.open(open_location(store)).ranking.copy()
    for wrong in (int(ranking[1]), 2**32 - 1):
        ranking[0] = wrong
        (store / "ids_by_rank.npy").write_bytes(ranking_bytes(ranking))
        store_damage.reseal(
            store / "manifest.json", ranking_fingerprint=ranking_fingerprint(ranking)
        )
        manifest = StoreReader.open(open_location(store)).manifest
        store_damage.reseal(store / commit_key(0), store_fingerprint=manifest.fingerprint())
        assert "does not have each id once" in readers.refusal(store)
