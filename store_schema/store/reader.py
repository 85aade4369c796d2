"""Read a store: only committed shards, and every array is checked.

A store may come from anywhere, and be hostile: `guards` has the checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Self

import numpy as np

from store_schema.disk.bounded import read_bounded, read_record
from store_schema.disk.location import Location
from store_schema.disk.parquet import read_parquet
from store_schema.disk.sealed import MAX_RECORD_BYTES, unseal
from store_schema.encoding.encoding import decode, needed_specs
from store_schema.encoding.frequency import Ranking, ranking_from_bytes
from store_schema.encoding.group import Coder, StoredSpec
from store_schema.errors import CorruptionError, MismatchError, MissingError, StoreError
from store_schema.fingerprint import arrays_digest
from store_schema.layout import Arrays, array_names
from store_schema.manifest import Commit, Manifest
from store_schema.plan.plan import Plan, ShardRecord
from store_schema.store.guards import (
    MAX_COMMIT_BYTES,
    MAX_METADATA_BYTES,
    MAX_VOCAB_SIZE,
    MAX_VOCABULARY_BYTES,
    REPAIR,
    RESTORE,
    CommittedShard,
    check_commit,
    require_present_form,
    require_sane,
)
from store_schema.text.vocabulary import VOCABULARY_SCHEMA, Vocabulary

MANIFEST_FILE = "manifest.json"
VOCABULARY_FILE = "vocabulary.parquet"
RANKING_FILE = "ids_by_rank.npy"
READ_THREADS = 16
COMMITS_AT_ONCE = 1024
_COMMIT_NAME = re.compile(r"[0-9]{5,}\.json")


def commit_key(shard: int) -> str:
    """Key of a shard's commit."""
    return f"commits/{shard:05d}.json"


def listed_commits(location: Location) -> set[int]:
    """Shards that a listing shows commits of, unread; an object store may list a new one late."""
    names = location.names("commits")
    return {int(name.removesuffix(".json")) for name in names if _COMMIT_NAME.fullmatch(name)}


class StoreReader:
    """A store open for reading."""

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest

    @classmethod
    def open(cls, location: Location) -> Self:
        """Open the store at `location`.

        Raises:
            MissingError: There is none (yet).
            SchemaVersionError: Written by a newer or an earlier logitfuse.
            CorruptionError: The manifest is damaged.
            MismatchError: Its tokens do not join to its text (a store of an earlier version).
        """
        data = read_record(location, MANIFEST_FILE, MAX_RECORD_BYTES, RESTORE)
        if data is None:
            raise MissingError(
                "no store",
                where=location.url,
                hint="give a store's folder or URL, such as runs/NAME/stores/SOURCE, or write it "
                "first (`logitfuse extract run`, `logitfuse align run`)",
            )
        where = f"{location.url}/{MANIFEST_FILE}"
        manifest = unseal(Manifest, data, where=where, hint=RESTORE)
        require_sane(manifest, where)
        require_present_form(manifest, where)
        return cls(location, manifest)

    @cached_property
    def commits(self) -> dict[int, Commit]:
        """Commits by shard, read at the first access and then cached.

        Raises:
            CorruptionError: A commit is damaged, or names another shard than its file.
            MismatchError: A commit was written for another manifest.
        """
        commits, faults = self.scan()
        for error in faults.values():
            raise error
        return commits

    def scan(self) -> tuple[dict[int, Commit], dict[str, StoreError]]:
        """Read all commits, without raising for those that cannot be used.

        Returns:
            Commits by shard, and the errors of commits that cannot be used, by key.
        """
        commits: dict[int, Commit] = {}
        faults: dict[str, StoreError] = {}
        for key, data in self._commit_files():
            try:
                commit = self._checked_commit(key, data)
            except StoreError as error:
                faults[key] = error
            else:
                commits[commit.shard] = commit
        return commits, faults

    def _commit_files(self) -> Iterator[tuple[str, bytes]]:
        """Keys and bytes of all commits, in order of shards."""
        if self.manifest.num_shards is None:
            keys = [commit_key(shard) for shard in sorted(listed_commits(self.location))]
        else:
            # By key, not by listing: an object store may list a new commit late.
            keys = [commit_key(shard) for shard in range(self.manifest.num_shards)]
        for start in range(0, len(keys), COMMITS_AT_ONCE):
            part = keys[start : start + COMMITS_AT_ONCE]
            if self.location.path is not None:
                files = {key: read_bounded(self.location, key, MAX_COMMIT_BYTES) for key in part}
            else:
                files = dict(self.location.read_many(part))
            for key in part:
                data = files.get(key)
                if data is not None:
                    yield key, data

    def _checked_commit(self, key: str, data: bytes) -> Commit:
        where = f"{self.location.url}/{key}"
        if len(data) > MAX_COMMIT_BYTES:
            raise CorruptionError(
                "commit is too long",
                where=where,
                expected=f"at most {MAX_COMMIT_BYTES} bytes",
                hint=REPAIR,
            )
        commit = unseal(Commit, data, where=where, hint=REPAIR)
        if commit_key(commit.shard) != key:
            raise CorruptionError(
                "commit of another shard", where=where, got=commit.shard, hint=REPAIR
            )
        if not commit.path.startswith(f"data/{commit.shard:05d}-"):
            raise CorruptionError(
                "commit names data of another shard", where=where, got=commit.path, hint=REPAIR
            )
        if commit.store_fingerprint != self.manifest.fingerprint():
            raise MismatchError(
                "commit was written for another store",
                where=where,
                expected=self.manifest.fingerprint(),
                got=repr(commit.store_fingerprint[:64]),
                hint=REPAIR,
            )
        return commit

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of the store's tokens.

        Raises:
            CorruptionError: The file is missing, damaged, or not the manifest's.
        """
        where = f"{self.location.url}/{VOCABULARY_FILE}"
        data = self._table(VOCABULARY_FILE, MAX_VOCABULARY_BYTES)
        # Read once with limits only, so that a hostile file is refused before it is decoded.
        read_parquet(
            data,
            VOCABULARY_SCHEMA,
            max_rows=MAX_VOCAB_SIZE,
            max_bytes=MAX_VOCABULARY_BYTES,
            where=where,
            hint=RESTORE,
        )
        vocabulary = Vocabulary.from_parquet(data, where=where)
        if vocabulary.fingerprint != self.manifest.vocabulary_fingerprint:
            raise CorruptionError(
                "vocabulary is not the manifest's",
                where=where,
                expected=repr(self.manifest.vocabulary_fingerprint[:64]),
                got=vocabulary.fingerprint,
                hint=RESTORE,
            )
        return vocabulary

    @cached_property
    def ranking(self) -> Ranking:
        """[V] ids of the store's vocabulary by frequency rank.

        Raises:
            CorruptionError: The file is missing, damaged, or not the manifest's.
        """
        vocab_size = self.manifest.vocab_size
        where = f"{self.location.url}/{RANKING_FILE}"
        ranking = ranking_from_bytes(
            self._table(RANKING_FILE, 4 * vocab_size + MAX_METADATA_BYTES),
            vocab_size=vocab_size,
            expected=str(self.manifest.ranking_fingerprint),
            where=where,
        )
        # Checked here because `read` of single arrays does not check ids.
        if ranking.max() >= vocab_size or np.bincount(ranking).min() != 1:
            raise CorruptionError(
                "rank table does not have each id once", where=where, hint=RESTORE
            )
        return ranking

    def require_plan(self, plan: Plan) -> None:
        """Refuse a store that was made from another plan.

        A plan that has the same segments in one shard is accepted; `require_shards` checks each shard.

        Raises:
            MismatchError: It was made from another plan; shows both fingerprints.
        """
        if self.manifest.plan_fingerprint == plan.fingerprint:
            return
        commits, _ = self.scan()
        shards = {shard.index: shard for shard in plan.shards}
        if not commits or any(c.matches(shards[i]) for i, c in commits.items() if i in shards):
            return
        raise MismatchError(
            "store and plan do not belong together",
            where=self.location.url,
            expected=f"plan {plan.fingerprint}",
            got=f"plan {self.manifest.plan_fingerprint}",
            hint="the plan was changed after the store was begun; rerun under another name",
        )

    def committed(self, shards: Iterable[ShardRecord]) -> set[int]:
        """Indices of those of the plan's shards that are finished.

        Raises:
            MismatchError: A shard was written from other segments; shows both fingerprints.
        """
        there = [shard for shard in shards if shard.index in self.commits]
        self.require_shards(there)
        return {shard.index for shard in there}

    def require_shards(self, shards: Iterable[ShardRecord]) -> None:
        """Refuse to continue unless all these shards are finished, with the plan's segments.

        Raises:
            MissingError: Shards are missing; names them.
            MismatchError: A shard was written from other segments; shows both fingerprints.
        """
        shards = list(shards)
        missing = [shard.index for shard in shards if shard.index not in self.commits]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
            raise MissingError(
                f"{len(missing)} shard(s) not there yet ({shown})",
                where=self.location.url,
                hint="rerun the stage that writes this store",
            )
        for shard in shards:
            commit = self.commits[shard.index]
            if not commit.matches(shard):
                written = repr(commit.shard_fingerprint[:64])
                raise MismatchError(
                    f"shard {shard.index} was written from other segments than the plan's",
                    where=self.location.url,
                    expected=f"{shard.fingerprint} from row {shard.start}",
                    got=f"{written} from row {commit.first_segment}",
                    hint=REPAIR,
                )

    def read(self, shard: int, names: Iterable[str] | None = None) -> Arrays:
        """Decoded arrays of one shard.

        Args:
            shard: Index in the plan.
            names: Which arrays; None reads all and checks every invariant of the layout.

        Raises:
            MissingError: The shard is not committed.
            CorruptionError: It is damaged; names shard, array and chunk.
            ValueError: Stores of this kind have no such array.
        """
        wanted = None if names is None else tuple(names)
        if unknown := set(wanted or ()).difference(array_names(self.manifest.form)):
            raise ValueError(f"no such arrays: {sorted(unknown)}")
        return self._decoded(shard, self._stored(shard, wanted), wanted)

    def verify(self, shard: int) -> None:
        """Read all of a shard and compare its content with the commit's digest.

        Raises:
            CorruptionError: It is damaged or differs.
        """
        self._files(shard).check_group()
        stored = self._stored(shard, None)
        self._decoded(shard, stored, None)
        digest = arrays_digest(stored, [spec.name for spec in self._specs(None)])
        expected = self._commit(shard).content_sha256
        if digest != expected:
            raise CorruptionError(
                "content is not what was committed",
                where=f"{self.location.url}, shard {shard}",
                expected=repr(expected[:64]),
                got=digest,
                hint=REPAIR,
            )

    def _specs(self, names: Iterable[str] | None) -> tuple[StoredSpec, ...]:
        """The arrays on disk that some arrays of the layout are decoded from; None means all."""
        return needed_specs(self.manifest.form, self.manifest.encoding, names)

    def _files(self, shard: int) -> CommittedShard:
        """The files of a shard; its commit is checked."""
        commit = self._commit(shard)
        where = f"{self.location.url}, shard {shard}"
        check_commit(commit, self.manifest, self._specs(None), where)
        return CommittedShard(self.location, commit, where)

    def _stored(self, shard: int, names: Iterable[str] | None) -> Arrays:
        """Arrays on disk, decompressed."""
        files, specs = self._files(shard), self._specs(names)
        # Concurrently: an object store takes tens of milliseconds for a request of any size.
        with ThreadPoolExecutor(READ_THREADS) as pool:
            return dict(zip([s.name for s in specs], pool.map(files.read, specs), strict=True))

    def _decoded(self, shard: int, stored: Arrays, names: Iterable[str] | None) -> Arrays:
        """Arrays of the layout from those on disk; all invariants are checked if `names` is None."""
        where = f"{self.location.url}, shard {shard}"
        coder = Coder(self.manifest.encoding, self.ranking, where)
        arrays = decode(self.manifest.form, stored, coder, names)
        if names is None:
            self.manifest.check_shard(arrays, where=where)
        return arrays

    def _commit(self, shard: int) -> Commit:
        if shard not in self.commits:
            raise MissingError(
                f"shard {shard} is not committed",
                where=self.location.url,
                hint="rerun the stage that writes this store",
            )
        return self.commits[shard]

    def _table(self, key: str, limit: int) -> bytes:
        """The bytes of a file that every store must have."""
        data = read_record(self.location, key, limit, RESTORE)
        if data is None:
            where = f"{self.location.url}/{key}"
            raise CorruptionError("file is missing", where=where, hint=RESTORE)
        return data
