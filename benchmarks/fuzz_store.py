"""Random damage to what a store is made of: only ever one clear error, never a crash or a hang.

Records (manifest, commit, plan.json) are changed as JSON, in values, types and keys, and sealed again,
so that the digest does not keep the changes from the fields; some are changed as bytes. Data files are
changed as bytes and their checksums made right again, so that the decoders are reached; what decodes
then goes through the whole reader. An alarm bounds the time of each input, a limit on address space
the memory. An input that fails is named by seed and number, which make it again.

    python -m benchmarks.fuzz_store --inputs 1000000
"""

from __future__ import annotations

import copy
import json
import resource
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from store_schema.disk.location import open_location
from store_schema.disk.sealed import unseal
from store_schema.errors import LogitfuseError
from store_schema.fingerprint import fingerprint
from store_schema.layout import Kind
from store_schema.manifest import Commit
from store_schema.plan.plan import PlanRecord
from store_schema.presets import Preset
from store_schema.store.reader import StoreReader, commit_key
from tests import store_damage, store_factory

SECONDS_OF_AN_INPUT = 5
MEMORY_BYTES = 6 << 30
"""Of address space: what the libraries and threads reserve, and room for a large shard."""
DATA_SHARE = 100
"""One input in so many damages a data file: it costs a hundred times a record."""

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30), 0.5, -0.0, 1e308,
    1e-320, "", "0", "1", "\0", "../..", "/etc", "data/00000-" + "0" * 16, "ü" * 40, "x" * 5000,
    "\ud800", [], {}, [[]], {"": {}}, [None] * 100, "aligned", "source", "generated", ["entropy"],
    "topk", "exact", "NaN",
)  # fmt: skip

Target = Callable[[bytes], None]


class HangError(BaseException):
    """An input took too long. Not an Exception, so that no reader turns it into an error of its own."""


class Mutator:
    """Random changes, the same for one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._pool: list[int] = []

    def below(self, stop: int) -> int:
        """A number from 0 to `stop` - 1; drawn many at a time, which is what makes it quick."""
        if not self._pool:
            self._pool = self._rng.integers(0, 1 << 62, 4096).tolist()
        return self._pool.pop() % stop

    def record(self, content: bytes, data: bytes) -> bytes:
        """A record with one to four things changed, most often sealed again."""
        if self.below(8) == 0:
            return self.bytes(data)
        changed = json.loads(content)
        for _ in range(1 + self.below(4)):
            self._change(changed)
        try:
            changed["digest"] = fingerprint(changed)
        except (ValueError, RecursionError):
            changed["digest"] = "0" * 32
        return json.dumps(changed).encode()

    def _change(self, node: dict[str, Any]) -> None:
        """Walk down to some place and change what stands there."""
        while True:
            keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                return
            key = keys[self.below(len(keys))]
            child = node[key]
            if not isinstance(child, (dict, list)) or not child or self.below(4) == 0:
                break
            node = child
        how = self.below(6)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, dict):
            node[f"{key}{self.below(3)}"] = node.pop(key)
        elif how == 2:
            node[key] = [copy.deepcopy(node[key])] * (1 + self.below(3))
        elif how == 3 and isinstance(node[key], (int, float)) and abs(node[key]) < 1e300:
            node[key] += (-1, 1, 256, 0.5)[self.below(4)]
        elif how == 4 and isinstance(node[key], str) and node[key]:
            place = self.below(len(node[key]))
            node[key] = node[key][:place] + chr(self.below(0x3000)) + node[key][place + 1 :]
        else:
            node[key] = copy.deepcopy(ODD_VALUES[self.below(len(ODD_VALUES))])

    def bytes(self, data: bytes) -> bytes:
        """Bytes changed, cut out, doubled or put in."""
        changed = bytearray(data)
        for _ in range(1 + self.below(4)):
            place = self.below(len(changed) + 1)
            how = self.below(4)
            if how == 0 and place < len(changed):
                changed[place] ^= 1 << self.below(8)
            elif how == 1 and place < len(changed):
                changed[place] = self.below(256)
            elif how == 2:
                del changed[place : place + 1 + self.below(8)]
            else:
                changed[place:place] = self.below(1 << 32).to_bytes(1 + self.below(4) + 3, "little")
        return bytes(changed)

    def chunk(self, data: bytes) -> bytes:
        """A shard file of one damaged chunk (or a damaged file), its checksums right."""
        body = self.bytes(data[: -4 - 16 - 4])
        index = None
        if self.below(8) == 0:
            index = [(self.below(200), self.below(200)) for _ in range(1 + self.below(3))]
        made = store_damage.shard_file([body], index)
        return self.bytes(made) if self.below(16) == 0 else made


class StoreFuzz:
    """Damages the data files of one small store and reads them back."""

    def __init__(self, folder: Path, kind: Kind, preset: Preset, mutator: Mutator) -> None:
        self._mutator = mutator
        store_damage.make_store(folder, kind, preset=preset)
        self._reader = StoreReader.open(open_location(folder))
        self._folder = folder
        self._commit = self._reader.commits[0]
        keys = [key for key in self._commit.files if key.endswith("/c/0")]
        self._files = {key: (folder / self._commit.path / key).read_bytes() for key in keys}
        metadata = [key for key in self._commit.files if key.endswith("/zarr.json")]
        self._metadata = {key: (folder / self._commit.path / key).read_bytes() for key in metadata}

    def once(self) -> None:
        """Damage one file, read the shard, put the file back."""
        of_data = self._mutator.below(4) > 0
        files = self._files if of_data else self._metadata
        key = list(files)[self._mutator.below(len(files))]
        whole = files[key]
        damaged = self._mutator.chunk(whole) if of_data else self._mutator.record(whole, whole)
        path = self._folder / self._commit.path / key
        path.write_bytes(damaged)
        record = self._commit.files[key].model_copy(
            update={"size": len(damaged), "crc32c": store_damage.checksum(damaged)}
        )
        commit = self._commit.model_copy(update={"files": self._commit.files | {key: record}})
        self._reader.__dict__["commits"] = {0: commit}
        try:
            self._reader.read(0)
        finally:
            path.write_bytes(whole)


def record_targets(folder: Path) -> dict[str, tuple[bytes, bytes, Target]]:
    """Each kind of record: its content, its bytes, and what reads it and then uses it."""
    store = store_damage.make_store(folder / "store", "aligned", preset="fine")
    store_factory.plan(open_location(folder / "plan"), [["one", "two"], ["three"], ["four"]])

    def manifest(data: bytes) -> None:
        (store / "manifest.json").write_bytes(data)
        StoreReader.open(open_location(store)).manifest.fingerprint()

    def commit(data: bytes) -> None:
        unseal(Commit, data, where="commit")

    def plan(data: bytes) -> None:
        unseal(PlanRecord, data, where="plan").fingerprint()

    files = {
        "manifest": (store / "manifest.json", manifest),
        "commit": (store / commit_key(0), commit),
        "plan": (folder / "plan" / "plan.json", plan),
    }
    found = {}
    for name, (path, target) in files.items():
        content = json.loads(path.read_text())
        del content["digest"]
        found[name] = (json.dumps(content).encode(), path.read_bytes(), target)
    return found


def fuzz(folder: Path, inputs: int, seed: int, data_share: int = DATA_SHARE) -> dict[str, Any]:
    """Run `inputs` inputs; any exception but a LogitfuseError comes out.

    Args:
        folder: An empty place to work in.
        inputs: How many.
        seed: Of everything.
        data_share: One input in so many is a data file.

    Returns:
        Inputs, refusals and sound readings in all and by kind, and seconds.
    """
    mutator = Mutator(seed)
    records = list(record_targets(folder).items())
    stores = [
        StoreFuzz(folder / kind / preset, kind, preset, mutator)
        for kind, preset in (("aligned", "exact"), ("aligned", "fine"), ("generated", "exact"))
    ]
    refused, read = Counter[str](), Counter[str]()
    previous = signal.signal(signal.SIGALRM, _too_long)
    started = time.monotonic()
    try:
        for number in range(inputs):
            if number % data_share == 0:
                name, work = "data", stores[mutator.below(len(stores))].once
            else:
                name, (content, data, target) = records[number % len(records)]
                changed = mutator.record(content, data)
                work = _bound(target, changed)
            signal.alarm(SECONDS_OF_AN_INPUT)
            try:
                work()
            except LogitfuseError as error:
                refused[name] += 1
                if len(error.line()) > 2000:
                    raise AssertionError(
                        f"input {number} of seed {seed}: a line too long"
                    ) from error
            except BaseException as error:
                error.add_note(f"input {number} of seed {seed}, a {name}")
                raise
            else:
                read[name] += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return {
        "inputs": inputs,
        "refused": refused.total(),
        "read": read.total(),
        "seconds": round(time.monotonic() - started, 2),
        "refused_by_kind": dict(refused),
        "read_by_kind": dict(read),
    }


def _bound(target: Target, data: bytes) -> Callable[[], None]:
    return lambda: target(data)


def _too_long(*_: object) -> None:
    raise HangError(f"an input took more than {SECONDS_OF_AN_INPUT} s")


@click.command()
@click.option("--inputs", default=1_000_000, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of everything.")
@click.option("--data-share", default=DATA_SHARE, show_default=True, help="One in so many is data.")
def main(inputs: int, seed: int, data_share: int) -> None:
    """Fuzz the readers of records and of data files."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with tempfile.TemporaryDirectory() as folder:
        figures = fuzz(Path(folder), inputs, seed, data_share)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    rate = figures["inputs"] / max(figures["seconds"], 1e-9)
    for kind in sorted({*figures["refused_by_kind"], *figures["read_by_kind"]}):
        refused = figures["refused_by_kind"].get(kind, 0)
        sound = figures["read_by_kind"].get(kind, 0)
        print(f"{kind:10} {refused:9} refused {sound:9} read as a sound record")
    print(f"{rate:.0f} inputs/s, {peak_mib} MiB at most, nothing but LogitfuseError")
    print(json.dumps(figures | {"inputs_per_s": round(rate), "peak_mib": peak_mib}))


if __name__ == "__main__":
    main()
