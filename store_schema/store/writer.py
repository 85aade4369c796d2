"""Write a store: create or resume it, then write and commit it shard by shard."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.disk.location import Location
from store_schema.disk.sealed import seal
from store_schema.encoding.encoding import decode, encode, stored_specs
from store_schema.encoding.frequency import ids_by_rank, ranking_bytes, ranking_fingerprint
from store_schema.encoding.group import Coder, StoredSpec
from store_schema.encoding.selection import select_entries
from store_schema.encoding.shard_io import file_records, shard_files
from store_schema.errors import LogitfuseError, MismatchError
from store_schema.fingerprint import arrays_digest
from store_schema.layout import Arrays, axis_lengths
from store_schema.manifest import Commit, Counts, FileRecord, Manifest
from store_schema.plan.plan import ShardRecord
from store_schema.store.guards import check_commit
from store_schema.store.reader import (
    MANIFEST_FILE,
    RANKING_FILE,
    VOCABULARY_FILE,
    StoreReader,
    commit_key,
    listed_commits,
)
from store_schema.text.vocabulary import Vocabulary

TAIL_MEAN = "tail_mass_mean"
"""Key in the `stats` of a commit with distributions: mean stored tail mass of a position."""


class StoreWriter:
    """A store open for writing, by any number of workers at the same time.

    A shard's data are written into a new folder, and count once the shard's commit is written. A worker
    that is killed leaves at most a folder that nobody reads.
    """

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest
        self._fingerprint = manifest.fingerprint()
        self.encoding = manifest.encoding
        self._ranking = StoreReader(location, manifest).ranking

    @classmethod
    def open(
        cls,
        location: Location,
        manifest: Manifest,
        vocabulary: Vocabulary,
        *,
        config: str = "",
        count_tokens: Callable[[], npt.NDArray[np.int64]] | None = None,
    ) -> StoreWriter:
        """Create the store, or open it to continue if it has the same manifest.

        Args:
            location: Folder or URL of the store.
            manifest: What the store will have.
            vocabulary: Bytes of the store's tokens.
            config: The resolved run file, which is saved in a new store for users.
            count_tokens: Returns [V] how often each id occurs, the same in every worker; called only
                for a new store. None ranks ids by number.

        Raises:
            MismatchError: There is a store that was made with other inputs; names what differs.
        """
        if location.exists(MANIFEST_FILE):
            reader = StoreReader.open(location)
            if reader.manifest.request() == manifest.request():
                return cls(location, _updated(reader.manifest, manifest, location))
            if any(reader.scan()):
                raise _mismatch(reader.manifest, manifest, location.url)
            # Another store, but without any commit: it is replaced.
        counts = np.zeros(manifest.vocab_size, np.int64) if count_tokens is None else count_tokens()
        ranking = ids_by_rank(counts)
        manifest = manifest.model_copy(update={"ranking_fingerprint": ranking_fingerprint(ranking)})
        location.write_atomic(RANKING_FILE, ranking_bytes(ranking))
        location.write_atomic(VOCABULARY_FILE, vocabulary.to_parquet())
        if config:
            location.write_atomic("config.yaml", config.encode())
        location.write_atomic(MANIFEST_FILE, seal(manifest))
        return cls(location, manifest)

    def committed(self, shards: Iterable[ShardRecord] | None = None) -> set[int]:
        """Indices of shards that are finished now.

        Args:
            shards: Shards of the plan: only these, and their segments are compared. None: all.

        Raises:
            MismatchError: A shard was written from other segments.
        """
        reader = StoreReader.open(self.location)
        return set(reader.commits) if shards is None else reader.committed(shards)

    def committed_now(self) -> set[int]:
        """Indices of shards that a listing shows as finished; their commits are not read."""
        return listed_commits(self.location)

    def is_committed(self, shard: int) -> bool:
        """Whether one shard is finished now; its commit is not read."""
        return self.location.exists(commit_key(shard))

    def write(
        self, shard: ShardRecord, arrays: Arrays, stats: Mapping[str, float] | None = None
    ) -> Commit:
        """Select entries, encode, check, write and commit one shard.

        Args:
            shard: The plan's shard.
            arrays: All arrays of the layout.
            stats: Figures for reports, saved in the commit.

        Returns:
            The commit. It replaces that of another worker, which has the same content.

        Raises:
            CorruptionError: The arrays break the layout.
            StorageError: The disk or object store refused; nothing is committed.
        """
        manifest = self.manifest
        where = f"{self.location.url}, shard {shard.index}"
        manifest.check_shard(arrays, where=where)
        coder = Coder(self.encoding, self._ranking, where)
        stored = encode(manifest.form, select_entries(arrays, self.encoding), coder)
        # Checked again as a reader will decode it.
        arrays = decode(manifest.form, stored, coder)
        manifest.check_shard(arrays, where=where)
        specs = stored_specs(manifest.form, self.encoding)
        path = f"data/{shard.index:05d}-{uuid.uuid4().hex[:16]}"
        files = self._write_data(path, stored, specs)
        commit = Commit(
            shard=shard.index,
            path=path,
            store_fingerprint=self._fingerprint,
            shard_fingerprint=shard.fingerprint,
            first_segment=shard.start,
            content_sha256=arrays_digest(stored, [spec.name for spec in specs]),
            files=files,
            counts=Counts.of(axis_lengths(arrays)),
            stats={
                **{name: float(np.float64(value)) for name, value in (stats or {}).items()},
                **_tail_mean(arrays),
            },
        )
        check_commit(commit, manifest, specs, where)  # as readers do
        # The data is not deleted if this fails: the put may have succeeded all the same.
        self.location.write_atomic(commit_key(shard.index), seal(commit))
        return commit

    def _write_data(
        self, path: str, stored: Arrays, specs: Iterable[StoredSpec]
    ) -> dict[str, FileRecord]:
        """Write the data of a shard into a new folder, which is deleted if that fails."""
        files = shard_files(stored, specs)
        try:
            self.location.write_files(path, files)
        except BaseException:
            with contextlib.suppress(LogitfuseError):  # the first error is raised
                self.location.delete(path)
            raise
        return file_records(files)


def _tail_mean(arrays: Arrays) -> dict[str, float]:
    tail = arrays.get("tail_mass")
    if tail is None:
        return {}
    return {TAIL_MEAN: float(tail.mean(dtype=np.float64)) if len(tail) else 0.0}


def require_same_store(reader: StoreReader, manifest: Manifest) -> None:
    """Refuse a store with commits that was made with other inputs. Writes nothing.

    Raises:
        MismatchError: It was; names what differs.
    """
    if reader.manifest.request() != manifest.request():
        raise _mismatch(reader.manifest, manifest, reader.location.url)


def _updated(stored: Manifest, wanted: Manifest, location: Location) -> Manifest:
    """The stored manifest, brought up to date and written if the plan has grown or the run file names a
    model differently."""
    names = ("corpus_fingerprint", "plan_fingerprint", "num_shards", "model", "target")
    now = stored.model_copy(update={name: getattr(wanted, name) for name in names})
    if now != stored:
        location.write_atomic(MANIFEST_FILE, seal(now))
    return now


_ANOTHER_STORE = (
    "undo the change, or give the run another name (or delete the store) to start again"
)
_ANOTHER_ALIGNMENT = (
    "undo the change, or make this alignment in another run: give the run another name, and set "
    "`data_dir` to the folder of the run with the sources' stores"
)


def _mismatch(stored: Manifest, wanted: Manifest, where: str) -> MismatchError:
    have, want = _leaves(stored.request()), _leaves(wanted.request())
    different = [key for key in {**want, **have} if have.get(key) != want.get(key)]
    return MismatchError(
        f"the store was made with another {', '.join(different)}",
        where=where,
        expected=", ".join(f"{key} {_shown(want.get(key))}" for key in different[:3]),
        got=", ".join(f"{key} {_shown(have.get(key))}" for key in different[:3]),
        hint=_ANOTHER_ALIGNMENT if wanted.kind == "aligned" else _ANOTHER_STORE,
    )


def _leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Values of nested objects by their dotted path."""
    leaves: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "..."
