"""A store on a real S3 server, through injected faults: whole as the local one, or one clear error."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from store_schema.disk import remote
from store_schema.disk.location import Location, open_location
from store_schema.errors import CorruptionError, MissingError, StorageError
from store_schema.layout import Arrays
from store_schema.store.reader import StoreReader, commit_key
from store_schema.store.writer import StoreWriter
from tests import store_factory
from tests.s3_server import S3, UNCLOSED, Fault, Request, every, hurry, new_bucket, serve_s3

pytestmark = UNCLOSED

SHARDS = {0: (40, 0, 60)}
TWO_SHARDS = {0: (5,), 1: (4,)}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serve_s3() as server:
        yield server


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    with new_bucket(s3, monkeypatch) as bucket:
        hurry(monkeypatch)
        yield open_location(f"{bucket}/runs/store")


def _write(location: Location, shards: dict[int, tuple[int, ...]] = SHARDS) -> None:
    manifest = store_factory.manifest().model_copy(update={"num_shards": 3})
    writer = StoreWriter.open(location, manifest, store_factory.vocabulary(), config="a: 1\n")
    for shard, rows in shards.items():
        arrays = store_factory.arrays("source", rows, seed=shard)
        writer.write(store_factory.shard_record(shard), arrays)


def _read(location: Location) -> dict[int, Arrays]:
    reader = StoreReader.open(location)
    assert reader.vocabulary.fingerprint == store_factory.vocabulary().fingerprint
    for shard in reader.commits:
        reader.verify(shard)
    return {shard: reader.read(shard) for shard in reader.commits}


def _assert_same(left: dict[int, Arrays], right: dict[int, Arrays]) -> None:
    assert left.keys() == right.keys()
    for shard in left:
        for name, array in left[shard].items():
            np.testing.assert_array_equal(array, right[shard][name], err_msg=name)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Arrays]:
    """What a local store of the same content gives."""
    location = open_location(tmp_path_factory.mktemp("local"))
    _write(location)
    return _read(location)


# ------------------------------------------------------------------------------- faults that pass


@pytest.mark.parametrize(
    ("fault", "method", "number"),
    [
        (Fault.ERROR_500, "", 3),
        (Fault.SLOW_DOWN, "", 3),
        (Fault.REFUSED, "", 4),
        (Fault.DROPPED, "GET", 3),
        (Fault.CUT, "GET", 3),
        (Fault.TRICKLE, "GET", 2),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_faults_that_pass_leave_a_whole_store(
    s3: S3, store: Location, local: dict[int, Arrays], fault: Fault, method: str, number: int
) -> None:
    s3.proxy.reset(every(number, fault, method))
    _write(store)
    _assert_same(_read(store), local)
    print(f"{fault.value}: {s3.proxy.faults[fault]} of {len(s3.proxy.requests)} requests")
    assert s3.proxy.faults[fault] >= 10
    s3.proxy.reset()
    _assert_same(_read(store), local)


def test_puts_that_succeed_but_answer_too_late(
    s3: S3, store: Location, local: dict[int, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, read_timeout_s=0.3)
    s3.proxy.reset(every(5, Fault.LATE, "PUT"))
    _write(store)
    late = s3.proxy.faults[Fault.LATE]
    s3.proxy.reset()
    _assert_same(_read(store), local)
    print(f"{late} puts done twice")
    assert late >= 3
    assert len(store.names("data")) == len(SHARDS)


def test_a_commit_answered_too_late_stands_once(
    s3: S3, store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, read_timeout_s=0.3)
    tries: list[Request] = []

    def first_commit(request: Request) -> Fault | None:
        if request.method == "PUT" and "commits/" in request.key:
            tries.append(request)
            return Fault.LATE if len(tries) == 1 else None
        return None

    s3.proxy.reset(first_commit)
    _write(store, {0: (5,)})
    assert len(tries) == 2
    StoreReader.open(store).verify(0)


def test_a_large_object_comes_into_being_at_its_completion(s3: S3, store: Location) -> None:
    data = bytes(101 << 20)
    s3.proxy.reset(every(2, Fault.ERROR_500, "PUT"))
    store.write_atomic("large", data)
    last = [r for r in s3.proxy.requests if r.method in ("PUT", "POST")][-1]
    assert last.method == "POST"
    assert "uploadId" in last.query
    assert s3.proxy.faults[Fault.ERROR_500] >= 2
    assert store.read_bytes("large") == data


# ------------------------------------------------------------------------------- faults that stay


@pytest.mark.parametrize("fault", [Fault.ERROR_500, Fault.SLOW_DOWN, Fault.REFUSED, Fault.LATE])
def test_a_server_that_stays_broken_ends_in_one_line(
    s3: S3, store: Location, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    hurry(monkeypatch, read_timeout_s=0.05)
    monkeypatch.setattr(remote, "CALL_DEADLINE_S", 0.8)
    s3.proxy.reset(lambda _: fault)
    actions = {
        "open": lambda: StoreReader.open(store),
        "write": lambda: store.write_atomic("a", b"1"),
        "names": lambda: store.names("commits"),
        "many": lambda: store.read_many(["a", "b"]),
        "delete": lambda: store.delete("a"),
    }
    for name, action in actions.items():
        start = time.monotonic()
        with pytest.raises(StorageError) as caught:
            action()
        assert time.monotonic() - start < 5.0, name  # 0.8 s on a machine of one's own
        assert store.url in caught.value.line()
        assert "\n" not in caught.value.line()
        assert caught.value.exit_code == 2
    assert s3.proxy.faults[fault] >= len(actions)


def test_tries_are_counted(s3: S3, store: Location) -> None:
    """A broken server is asked six times, not the 125 of s3fs's own settings."""
    s3.proxy.reset(lambda _: Fault.ERROR_500)
    with pytest.raises(StorageError):
        store.write_atomic("a", b"1")
    assert s3.proxy.count("PUT") == remote.REQUEST_ATTEMPTS
    s3.proxy.reset(lambda _: Fault.SLOW_DOWN)
    with pytest.raises(StorageError):
        store.read_bytes("a")
    bound = remote.REQUEST_ATTEMPTS * remote.BODY_ATTEMPTS**2
    assert remote.REQUEST_ATTEMPTS <= s3.proxy.count("GET") <= bound


def test_a_server_that_is_gone(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="Could not connect"):
        StoreReader.open(store)


def test_a_fault_while_reading_is_no_damage(s3: S3, store: Location) -> None:
    """Else `store repair` would take back shards because of a network."""
    _write(store, {0: (5,)})
    reader = StoreReader.open(store)
    assert reader.commits
    s3.proxy.reset(lambda r: Fault.ERROR_500 if "tail_mass/c" in r.key else None)
    with pytest.raises(StorageError, match="tail_mass"):
        reader.read(0)
    assert s3.proxy.faults[Fault.ERROR_500]


def test_a_body_cut_by_a_lying_server_is_damage(s3: S3, store: Location) -> None:
    _write(store, {0: (50,)})
    s3.proxy.reset(lambda r: Fault.SHORT if "tail_mass/c" in r.key else None)
    with pytest.raises((CorruptionError, StorageError), match="tail_mass"):
        StoreReader.open(store).read(0)
    assert s3.proxy.faults[Fault.SHORT]


# ------------------------------------------------------------------------------- commits


def test_a_commit_is_one_put(s3: S3, store: Location) -> None:
    _write(store, TWO_SHARDS)
    for shard in TWO_SHARDS:
        assert s3.proxy.count("PUT", commit_key(shard)) == 1
    puts = [r.key for r in s3.proxy.requests if r.method == "PUT" and "/commits/" in r.key]
    assert len(puts) == len(TWO_SHARDS)
    last = [r.key for r in s3.proxy.requests if r.method == "PUT"][-1]
    assert last.endswith(commit_key(max(TWO_SHARDS)))


def test_two_writers_on_one_shard(store: Location) -> None:
    manifest = store_factory.manifest()
    StoreWriter.open(store, manifest, store_factory.vocabulary())
    barrier = threading.Barrier(2)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            writer = StoreWriter.open(store, manifest, store_factory.vocabulary())
            arrays = store_factory.arrays("source", (9, 4))
            barrier.wait()
            writer.write(store_factory.shard_record(), arrays)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    reader = StoreReader.open(store)
    assert set(reader.commits) == {0}
    reader.verify(0)
    assert len(store.names("data")) == 2


def test_commits_are_found_without_listing(s3: S3, store: Location) -> None:
    _write(store, TWO_SHARDS)
    s3.proxy.reset(lambda r: Fault.EMPTY_LIST if r.lists else None)
    assert store.names("commits") == []
    assert s3.proxy.faults[Fault.EMPTY_LIST]
    keys = [commit_key(shard) for shard in (0, 1, 2)]
    assert set(store.read_many(keys)) == set(keys[:2])
    assert set(StoreReader.open(store).commits) == set(TWO_SHARDS)


def test_a_listing_seen_before_a_write_is_not_believed_after_it(store: Location) -> None:
    assert not store.exists("commits/00000.json")
    assert store.names("commits") == []
    other = open_location(store.url)
    other.write_atomic("commits/00001.json", b"{}")
    assert store.names("commits") == ["00001.json"]
    other.write_atomic("commits/00000.json", b"{}")
    assert store.exists("commits/00000.json")
    assert store.names("commits") == ["00000.json", "00001.json"]
    assert store.read_many(["commits/00000.json"]) == {"commits/00000.json": b"{}"}


def test_a_missing_bucket_is_named(store: Location) -> None:
    nowhere = open_location("s3://no-such-bucket-here/store")
    with pytest.raises(StorageError, match="make the bucket first") as caught:
        nowhere.write_atomic("a", b"1")
    assert "no-such-bucket-here" in caught.value.line()
    with pytest.raises(MissingError):
        StoreReader.open(nowhere)
    with pytest.raises(StorageError, match="make the bucket first"):
        _write(nowhere, {0: (3,)})


def test_a_plan_is_read_through_cut_bodies(s3: S3, store: Location) -> None:
    plan = store_factory.plan(store.child("plan"), [["a" * 300], ["b", "c"]])
    s3.proxy.reset(every(2, Fault.CUT, "GET"))
    for _ in range(2):
        assert [s.text for s in plan.segments(plan.shards[1])] == ["b", "c"]
    assert s3.proxy.faults[Fault.CUT]
