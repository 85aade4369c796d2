"""What disks and machines do to a store: nothing committed is lost, nothing damaged is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from store_schema.disk.location import open_location
from store_schema.errors import CorruptionError, MissingError, StorageError, StoreError
from store_schema.layout import Arrays, Kind
from store_schema.plan.plan import Plan, Segment
from store_schema.presets import Preset
from store_schema.store.reader import StoreReader, commit_key
from store_schema.store.writer import StoreWriter
from tests import store_damage, store_factory

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_KILLS = 50
NUM_SHARDS = 3

# A server that has imported everything forks a writer for each line it is given: a fresh process
# for every kill without a second of start-up. No thread runs in it when it forks. It waits for the
# writer only when told to, so that the number of a process is not given to another one meanwhile.
WRITERS = """
import os, sys
from store_schema.encoding.encoding import decode, encode
from store_schema.encoding.group import Coder
from store_schema.encoding.frequency import ids_by_rank
from store_schema.presets import PRESETS
from store_schema.encoding.selection import select_entries
from tests import store_damage, store_factory
import numpy as np
import pathlib
coder = Coder(PRESETS["fine"], ids_by_rank(np.zeros(store_damage.VOCAB_SIZE, np.int64)), "warm-up")
kept = select_entries(store_damage.arrays(), PRESETS["fine"])
decode("source", encode("source", kept, coder), coder)  # compiles once for all
for line in sys.stdin:
    folder, *shards = line.split()
    child = os.fork()
    if child == 0:
        writer = store_damage.writer(pathlib.Path(folder), preset="fine")
        for shard in map(int, shards):
            if shard not in writer.committed():
                writer.write(store_factory.shard_record(shard), store_damage.arrays(seed=shard))
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Writers:
    """Processes that write shards and may be killed."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", WRITERS],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder: Path, shards: range) -> int:
        """Begin to write; gives the process."""
        return self._ask(" ".join([str(folder), *map(str, shards)]))

    def wait(self) -> int:
        """Status of the writer when it has ended."""
        return self._ask("")

    def _ask(self, line: str) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    server = Writers()
    yield server
    server.close()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    _write_rest(folder)
    return folder


def _write_rest(folder: Path) -> None:
    writer = store_damage.writer(folder, preset="fine")
    for shard in sorted(set(range(NUM_SHARDS)) - writer.committed()):
        writer.write(store_factory.shard_record(shard), store_damage.arrays(seed=shard))


def _digests(folder: Path) -> dict[int, str]:
    store_damage.read_everything(folder)
    commits = StoreReader.open(open_location(folder)).commits
    return {shard: commit.content_sha256 for shard, commit in commits.items()}


def _told(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        print(f"\n{line}")


def test_kill_9_at_random_instants_of_a_write(
    tmp_path: Path, writers: Writers, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    wanted = _digests(uninterrupted)
    whole_s = 0.3
    killed, with_leavings, finished = 0, 0, Counter[int]()
    for kill in range(2 * NUM_KILLS):  # some end before they are killed
        if killed == NUM_KILLS:
            break
        folder = tmp_path / str(kill)
        process = writers.start(folder, range(NUM_SHARDS))
        time.sleep(float(rng.random()) * whole_s)
        os.kill(process, signal.SIGKILL)
        if writers.wait() != signal.SIGKILL:
            whole_s *= 0.8  # however fast this machine is, most are killed in the middle
            continue
        killed += 1
        whole_s *= 1.1
        commits = _digests(folder) if (folder / "manifest.json").exists() else {}
        assert commits == {shard: wanted[shard] for shard in commits}
        data = folder / "data"
        with_leavings += data.exists() and len(list(data.iterdir())) > len(commits)
        finished[len(commits)] += 1
        _write_rest(folder)
        rerun = StoreReader.open(open_location(folder)).commits
        assert {shard: commit.content_sha256 for shard, commit in rerun.items()} == wanted
    assert killed == NUM_KILLS
    assert with_leavings > 0
    counts = ", ".join(f"{n} after {shards} commits" for shards, n in sorted(finished.items()))
    _told(
        capsys,
        f"{killed} writers killed ({counts}; {with_leavings} left an unfinished "
        f"shard): every commit whole, every rerun equal",
    )


def test_two_processes_on_one_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers = [Writers(), Writers()]
    rounds, attempts = 10, 0
    wanted: dict[int, str] = {}
    for turn in range(rounds):
        folder = tmp_path / str(turn)
        for server in servers:
            server.start(folder, range(1))
        assert [server.wait() for server in servers] == [0, 0]
        wanted = wanted or _digests(folder)
        assert _digests(folder) == wanted
        assert set(wanted) == {0}
        attempts += len(list((folder / "data").iterdir()))
    for server in servers:
        server.close()
    assert attempts > rounds  # else they never met
    _told(capsys, f"{rounds} rounds, {attempts} attempts, {rounds} sound commits")


# ------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
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


def _refusal(writer: StoreWriter, arrays: Arrays) -> StorageError | None:
    try:
        writer.write(store_factory.shard_record(1), arrays)
    except StorageError as error:
        return error
    return None


def test_full_disk_is_told_and_nothing_lost(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = small_disk / "store"
    writer = store_damage.writer(store)
    writer.write(store_factory.shard_record(0), store_damage.arrays())
    wanted = _digests(store)
    big = store_damage.arrays(rows=(3000,), seed=1)
    lines = []
    for leave in range(0, 64 << 10, 4096):
        _fill(small_disk, leave)
        error = _refusal(writer, big)
        (small_disk / "filler").unlink()
        if error is None:
            break
        lines.append(error.line())
        assert _digests(store) == wanted
    writer.write(store_factory.shard_record(1), big)
    refused = len(lines)
    assert all("free space and rerun" in line and "\n" not in line for line in lines)
    assert refused >= 3
    assert set(_digests(store)) == {0, 1}
    _told(capsys, f"{refused} writes refused for want of space, 0 shards lost, rerun completes")


# ------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module", params=[("source", "exact"), ("aligned", "fine")], ids="-".join)
def sound_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, preset = request.param
    return _sound(tmp_path_factory, kind, preset)


def _sound(factory: pytest.TempPathFactory, kind: Kind, preset: Preset) -> Path:
    return store_damage.make_store(factory.mktemp(f"sound-{kind}"), kind, preset=preset)


@pytest.fixture
def copied(sound_store: Path, tmp_path: Path) -> Path:
    return store_damage.copy(sound_store, tmp_path)


def _flips(size: int, rng: np.random.Generator, number: int) -> list[tuple[int, int]]:
    """Places and what to flip there: both ends, and random ones."""
    places = {0, size - 1, *rng.integers(0, size, number).tolist()}
    return [(place, 1 << int(rng.integers(8))) for place in sorted(places)]


def test_flipped_byte_in_every_file_of_a_store_is_found_and_named(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = store_damage.read_everything(copied)
    rng = np.random.default_rng(0)
    flips, named, idle = Counter[str](), Counter[str](), Counter[str]()
    for file in store_damage.files_of(copied):
        kind = "zarr.json" if file.name == "zarr.json" else file.parts[0]
        content = (copied / file).read_bytes()
        number = 6 if file.parts[0] == "data" else 30
        for place, flip in _flips(len(content), rng, number):
            damaged = bytearray(content)
            damaged[place] ^= flip
            (copied / file).write_bytes(damaged)
            flips[kind] += 1
            try:
                read = store_damage.read_everything(copied)
            except StoreError as error:
                named[kind] += _names(error, file)
            else:
                # Parquet has bytes that say nothing; what is read is proved by its digest.
                assert file.suffix == ".parquet", (file, place)
                assert all(store_damage.same(read[shard], whole[shard]) for shard in whole)
                idle[kind] += 1
        (copied / file).write_bytes(content)
    store_damage.read_everything(copied)
    for kind, number in flips.items():
        assert named[kind] + idle[kind] == number, kind
    shown = ", ".join(f"{kind} {number}" for kind, number in sorted(flips.items()))
    _told(
        capsys,
        f"{flips.total()} flips, {named.total()} named, {idle.total()} in bytes of Parquet that "
        f"say nothing, 0 read as data ({shown})",
    )


def _names(error: StoreError, file: Path) -> bool:
    where = f"{error.where} {error.what}"
    if file.parts[0] != "data":
        return file.name in where
    array = file.parts[2] if len(file.parts) > 3 else "group"
    return "shard 0" in where and array in where and error.exit_code == 2


def test_flipped_byte_in_a_plan_is_found_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [["one text", "another"], ["the third, a little longer"]]
    plan = store_factory.plan(open_location(tmp_path), texts)
    whole = _segments(plan)
    rng = np.random.default_rng(0)
    flips, named, idle = Counter[str](), Counter[str](), 0
    for name in ("plan.json", "segments.parquet"):
        content = (tmp_path / name).read_bytes()
        for place, flip in _flips(len(content), rng, 100):
            damaged = bytearray(content)
            damaged[place] ^= flip
            (tmp_path / name).write_bytes(damaged)
            flips[name] += 1
            try:
                read = _segments(Plan.open(open_location(tmp_path)))
            except StoreError as error:
                named[name] += name in str(error.where)
            else:
                assert name == "segments.parquet"
                assert read == whole
                idle += 1
        (tmp_path / name).write_bytes(content)
    assert named.total() + idle == flips.total()
    _told(
        capsys,
        f"{flips.total()} flips, {named.total()} named, {idle} in bytes of Parquet that say "
        f"nothing, 0 read as data ({dict(flips)})",
    )


def _segments(plan: Plan) -> list[list[Segment]]:
    return [plan.segments(shard) for shard in plan.shards]


@pytest.mark.parametrize("how", ["cut to half", "cut by one", "emptied", "removed", "longer"])
def test_cut_and_missing_files_are_found(copied: Path, how: str) -> None:
    for file in store_damage.files_of(copied):
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
            store_damage.read_everything(copied)  # only the newline at the end
        else:
            with pytest.raises(StoreError):
                store_damage.read_everything(copied)
        (copied / file).write_bytes(whole)


def test_every_array_has_files_of_its_own(copied: Path) -> None:
    files = StoreReader.open(open_location(copied)).commits[0].files
    arrays = {key.split("/")[0] for key in files} - {"zarr.json"}
    assert len(arrays) >= 8
    assert set(files) == {"zarr.json"} | {f"{a}/{f}" for a in arrays for f in ("zarr.json", "c/0")}


def test_swapped_arrays_are_found(copied: Path) -> None:
    """Two arrays of one shape and dtype, each with sound checksums, in each other's place."""
    data = next((copied / "data").iterdir())
    one, other = data / "token_ranks" / "c" / "0", data / "token_bytes" / "c" / "0"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(CorruptionError):
        store_damage.read_everything(copied)


def test_one_damaged_commit_leaves_the_others_readable(tmp_path: Path) -> None:
    _write_rest(tmp_path)
    (tmp_path / commit_key(1)).write_text("{")
    reader = StoreReader.open(open_location(tmp_path))
    commits, faults = reader.scan()
    assert set(commits) == {0, 2}
    assert set(faults) == {commit_key(1)}
    assert "logitfuse store repair" in faults[commit_key(1)].line()
    with pytest.raises(CorruptionError, match="00001"):
        _ = reader.commits
