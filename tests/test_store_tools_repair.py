"""`store repair` and `store gc`: what is damaged can be written again, what is needed is never lost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from launch.work import Part
from store_schema.disk.location import LocalLocation, Location, open_location
from store_schema.disk.sealed import seal
from store_schema.errors import ConfigError
from store_schema.fingerprint import fingerprint
from store_schema.plan.plan import Plan
from store_schema.store.reader import StoreReader, commit_key
from store_tools import leftovers, repair
from store_tools.leftovers import collect, find_leftovers, list_files, parse_age
from store_tools.places import StorePlace, TolerantReader, find_places
from store_tools.repair import repair_store
from store_tools.verify import StoreReport, verify_store
from tests.planned_store import (
    data_file,
    flip,
    found_wrong,
    make_plan,
    make_run,
    make_writer,
    ok,
    reader_of,
    refused,
    shard_arrays,
    store_folder,
)
from tests.s3_server import UNCLOSED, new_bucket, serve_s3


def place_of(folder: Path) -> StorePlace:
    (place,) = find_places(str(store_folder(folder)))
    return place


def write_pending(folder: Path) -> list[int]:
    """What a rerun of the stage does; the shards that it wrote."""
    plan = Plan.open(open_location(folder / "run/plan"))
    writer = make_writer(open_location(store_folder(folder)), plan)
    pending = Part().pending(plan.shards, writer.committed())
    for record in pending:
        writer.write(record, shard_arrays(plan, record.index))
    return [record.index for record in pending]


def test_a_flipped_byte_is_found_uncommitted_and_written_again(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    before = {shard: c.content_sha256 for shard, c in reader_of(tmp_path).commits.items()}
    flip(data_file(tmp_path, 1, "entry_ids_coded"), 5)
    assert "shard 1, array entry_ids_coded, chunk 0" in found_wrong("verify", run_file)
    lines = ok("repair", run_file).splitlines()
    assert lines[0].startswith("shard 1 uncommitted: checksum is wrong")
    assert lines[1] == "stores/s: 1 shard(s) uncommitted"
    assert lines[2] == f"to write them again: logitfuse extract run {run_file} --source s"
    assert sorted(reader_of(tmp_path).commits) == [0, 2]
    assert write_pending(tmp_path) == [1]
    assert ok("verify", run_file).splitlines()[-1].endswith("3 shards sound, 0 damaged, 0 missing")
    after = {shard: c.content_sha256 for shard, c in reader_of(tmp_path).commits.items()}
    assert after == before


@pytest.mark.parametrize("content", ["", "{not json", "[]", '{"schema_version": 4}', "\x00" * 40])
def test_a_commit_that_cannot_be_read_is_taken_back(tmp_path: Path, content: str) -> None:
    run_file = make_run(tmp_path)
    commit = store_folder(tmp_path) / commit_key(0)
    commit.write_text(content)
    assert "stores/s: 1 shard(s) uncommitted" in ok("repair", run_file)
    assert not commit.exists()
    assert write_pending(tmp_path) == [0]
    ok("verify", run_file)


def test_a_sound_store_is_left_as_it_is(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    assert ok("repair", run_file) == "stores/s: 0 shard(s) uncommitted\n"
    assert len(reader_of(tmp_path).commits) == 3


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    flip(data_file(tmp_path, 1, "tail_mass"))
    assert "shard 1 would be uncommitted" in ok("repair", run_file, "--dry-run")
    assert len(reader_of(tmp_path).commits) == 3


@pytest.mark.parametrize("delete", [False, True])
def test_the_data_stays_until_it_is_asked_away(tmp_path: Path, delete: bool) -> None:
    run_file = make_run(tmp_path)
    path = store_folder(tmp_path) / reader_of(tmp_path).commits[1].path
    flip(data_file(tmp_path, 1, "tail_mass"))
    ok("repair", run_file, *(["--delete"] if delete else []))
    assert path.exists() is not delete
    assert sum(1 for _ in (store_folder(tmp_path) / "data").iterdir()) == (2 if delete else 3)


def test_named_shards_are_taken_back_unseen(tmp_path: Path) -> None:
    run_file = make_run(tmp_path, leave_out=[2])
    assert "shard 0 uncommitted: named by --shard" in ok("repair", run_file, "--shard", 0)
    assert sorted(reader_of(tmp_path).commits) == [1]
    assert "shard(s) 0, 2 have no commit" in refused(
        "repair", run_file, "--shard", 0, "--shard", 2, "--shard", 1
    )
    assert sorted(reader_of(tmp_path).commits) == [1]


def test_named_shards_need_one_store(tmp_path: Path) -> None:
    run_file = make_run(tmp_path, kinds=["source", "aligned"])
    assert "several stores" in refused("repair", run_file, "--shard", 0)
    ok("repair", run_file, "--shard", 0, "--kind", "aligned")
    assert sorted(reader_of(tmp_path, "aligned").commits) == [1, 2]
    assert sorted(reader_of(tmp_path).commits) == [0, 1, 2]


def test_a_shard_written_again_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    flip(data_file(tmp_path, 1, "tail_mass"))

    def slow_verify(place: StorePlace, **options: object) -> StoreReport:
        report = verify_store(place)
        plan = Plan.open(open_location(tmp_path / "run/plan"))
        make_writer(place.location, plan).write(plan.shards[1], shard_arrays(plan, 1))
        return report

    monkeypatch.setattr(repair, "verify_store", slow_verify)
    report = repair_store(place_of(tmp_path))
    assert (report.rewritten, report.uncommitted) == ([1], {})
    assert verify_store(place_of(tmp_path)).sound == [0, 1, 2]


def test_what_repair_cannot_mend_is_told(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    manifest = store_folder(tmp_path) / "manifest.json"
    sealed = manifest.read_text()
    flip(manifest, 30)
    output = found_wrong("repair", run_file)
    assert "not repaired: " in output
    assert "restore it from a copy of the store" in output
    content = json.loads(sealed) | {"source": "another"}
    del content["digest"]
    manifest.write_text(json.dumps(content | {"digest": fingerprint(content)}))
    assert "none of the commits belongs to the manifest" in found_wrong("repair", run_file)
    manifest.write_text(sealed)
    assert sorted(reader_of(tmp_path).commits) == [0, 1, 2]


def test_a_commit_of_a_newer_version_is_not_taken_back(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    path = store_folder(tmp_path) / commit_key(1)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert "written by a newer logitfuse" in found_wrong("repair", run_file)
    assert path.exists()


# ------------------------------------------------------------------------------- gc


def leave_attempt(folder: Path, shard: int = 1, *, age_s: float, size: int = 1000) -> Path:
    """Data of an attempt that was killed so long ago."""
    attempt = store_folder(folder) / f"data/{shard:05d}-0123456789abcde{shard}"
    (attempt / "tail_mass/c").mkdir(parents=True)
    (attempt / "zarr.json").write_text("{}")
    (attempt / "tail_mass/c/0").write_bytes(bytes(size))
    _age(attempt, age_s)
    return attempt


def _age(top: Path, age_s: float) -> None:
    then = time.time() - age_s
    for path in [top, *top.rglob("*")]:
        os.utime(path, (then, then))


def test_gc_removes_what_is_old_and_nothing_else(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    store = store_folder(tmp_path)
    _age(store / "data", 90_000)  # committed data is old, too
    old = leave_attempt(tmp_path, 1, age_s=90_000, size=3_000_000)
    young = leave_attempt(tmp_path, 2, age_s=80_000)
    newest = leave_attempt(tmp_path, 0, age_s=90_000)
    os.utime(newest / "tail_mass/c/0")
    empty = store / "data/00007-0123456789abcdef"
    empty.mkdir()
    _age(empty, 90_000)
    temporary = store / f".manifest.json.{'a' * 32}.tmp"
    temporary.write_text("cut")
    other = store / "data/notes.txt"
    other.write_text("the user's own")
    for path in (temporary, other):
        _age(path, 90_000)
    lines = ok("gc", run_file, "--dry-run").splitlines()
    assert old.exists()
    assert lines[-2] == (
        "stores/s: 2 folder(s) of unfinished attempts and 1 temporary file(s), 3.0 MB"
        " would be removed"
    )
    assert lines[-1] == (
        "stores/s: 2 folder(s) of unfinished attempts, 0.0 MB left alone, written to within 24h"
    )
    assert "3.0 MB removed" in ok("gc", run_file)
    assert not old.exists()
    assert not empty.exists()
    assert not temporary.exists()
    assert young.exists()
    assert newest.exists()
    assert other.exists()
    assert ok("verify", run_file).splitlines()[-1].endswith("3 shards sound, 0 damaged, 0 missing")
    ok("gc", run_file, "--older-than", "0")
    assert sorted(p.name for p in (store / "data").iterdir() if p.is_dir()) == sorted(
        commit.path.removeprefix("data/") for commit in reader_of(tmp_path).commits.values()
    )


def test_gc_removes_the_damaged_data_that_repair_left(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    path = store_folder(tmp_path) / reader_of(tmp_path).commits[1].path
    ok("repair", run_file, "--shard", 1)
    ok("gc", run_file)
    assert path.exists()
    _age(path, 90_000)
    ok("gc", run_file)
    assert not path.exists()


def test_gc_leaves_everything_where_a_commit_cannot_be_read(tmp_path: Path) -> None:
    """Its data is not named by any commit that can be read, and still it is not garbage."""
    run_file = make_run(tmp_path)
    path = store_folder(tmp_path) / reader_of(tmp_path).commits[1].path
    flip(store_folder(tmp_path) / commit_key(1), 40)
    _age(store_folder(tmp_path) / "data", 90_000)
    assert "nothing removed" in refused("gc", run_file)
    assert path.exists()


def test_a_commit_that_comes_between_listing_and_removing_saves_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    store = store_folder(tmp_path)
    commit = store / commit_key(1)
    sealed = commit.read_bytes()
    commit.unlink()
    _age(store / "data", 90_000)

    def listed_late(reader: TolerantReader, *, strict: bool) -> list[leftovers.Leftover]:
        found = find_leftovers(reader, strict=strict)
        commit.write_bytes(sealed)  # the worker gets there now
        return found

    monkeypatch.setattr(leftovers, "find_leftovers", listed_late)
    found = collect(place_of(tmp_path), older_than_s=3600, dry_run=False)
    assert found.removed == ()
    assert verify_store(place_of(tmp_path)).sound == [0, 1, 2]


@pytest.fixture(params=["memory", pytest.param("s3", marks=UNCLOSED)])
def remote_store(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Location]:
    """An object store: in this process's memory, and a real server."""
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        yield open_location("memory://gc-test/stores/s")
        return
    with serve_s3() as server, new_bucket(server, monkeypatch) as bucket:
        yield open_location(f"{bucket}/stores/s")


def test_repair_and_gc_in_an_object_store(tmp_path: Path, remote_store: Location) -> None:
    plan = make_plan(tmp_path / "plan")
    writer = make_writer(remote_store, plan)
    for record in plan.shards:
        writer.write(record, shard_arrays(plan, record.index))
    commit = StoreReader.open(remote_store).commits[1]
    kept = {entry.key for entry in list_files(remote_store)}
    key = f"{commit.path}/tail_mass/c/0"
    remote_store.write_atomic(key, remote_store.read_bytes(key)[::-1])
    place = StorePlace("s", remote_store, plan.location, True)
    assert list(verify_store(place).damaged) == [1]
    assert list(repair_store(place).uncommitted) == [1]
    assert verify_store(place).missing == [1]
    writer.write(plan.shards[1], shard_arrays(plan, 1))
    assert collect(place, older_than_s=60, dry_run=False).removed == ()
    (removed,) = collect(place, older_than_s=0, dry_run=False).removed
    assert removed.key == commit.path
    assert removed.size == sum(record.size for record in commit.files.values())
    left = {entry.key for entry in list_files(remote_store)}
    again = StoreReader.open(remote_store).commits[1]
    assert {k.replace(again.path, commit.path) for k in left} == kept
    assert again.content_sha256 == commit.content_sha256
    assert verify_store(place).sound == [0, 1, 2]


def test_a_store_without_a_date_loses_nothing(tmp_path: Path) -> None:
    item = leftovers.Leftover("data/00001-0123456789abcdef", 1, 10, None)
    assert not item.older_than(0, time.time())


def test_a_commit_listed_late_still_counts(tmp_path: Path) -> None:
    """Where the manifest does not say how many shards there are, commits are found by listing; the
    commit's own key is asked before data goes."""
    make_run(tmp_path)
    location = LocalLocation(str(store_folder(tmp_path)))
    reader = StoreReader.open(location)
    commit = reader.commits[1]
    item = leftovers.Leftover(commit.path, 1, 10, 0.0)
    assert not leftovers._remove(reader, item)
    assert seal(commit) == location.read_bytes(commit_key(1))
    assert verify_store(place_of(tmp_path)).sound == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "seconds"), [("24h", 86_400), ("30m", 1800), ("2d", 172_800), ("90s", 90), ("0", 0)]
)
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1 h", "1w", "nan", "1e3h"])
def test_ages_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="age refused"):
        parse_age(text)
