"""Writing a store: create or resume it, then shard by shard, each committed in one atomic step."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.disk.location import Location
from store_schema.disk.sealed import seal
from store_schema.disk.storage_errors import storage_errors
from store_schema.encoding.encoding import decode, encode, stored_specs
from store_schema.encoding.frequency import ids_by_rank, ranking_bytes, ranking_fingerprint
from store_schema.encoding.group import Coder, StoredSpec
from store_schema.encoding.selection import select_entries
from store_schema.encoding.shard_io import write_arrays
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
)
from store_schema.text.vocabulary import Vocabulary

TAIL_MEAN = "tail_mass_mean"
"""Figure of every commit of distributions: mean tail mass of a position as it was stored."""


class StoreWriter:
    """One store, open for writing by any number of workers at once.

    A shard is written into a folder of this attempt alone and exists once its commit does. Killed
    at any instruction, an attempt leaves at most a folder that nobody reads.
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
        """Create the store, or go on with it if it is the same one.

        Args:
            location: Folder of the store.
            manifest: What the store is to hold.
            vocabulary: Byte table of the store's own tokens.
            config: The resolved run file, kept beside a new store for people.
            count_tokens: Gives [V] how often each id occurs, asked only for a new store; the same
                in every worker. None takes ids as they are numbered.

        Raises:
            MismatchError: The store there was made from something else; names what differs.
        """
        if location.exists(MANIFEST_FILE):
            reader = StoreReader.open(location)
            if reader.manifest.request() == manifest.request():
                return cls(location, _brought_up_to(reader.manifest, manifest, location))
            if any(reader.scan()):
                raise _mismatch(reader.manifest, manifest, location.url)
            # Begun from something else but nothing is finished: nothing is lost by starting again.
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
        """Shards that are finished now.

        Args:
            shards: Of the plan: only these, proved to be of its segments. None: all there are.

        Raises:
            MismatchError: A shard was written from other segments.
        """
        reader = StoreReader.open(self.location)
        return set(reader.commits) if shards is None else reader.committed(shards)

    def write(
        self, shard: ShardRecord, arrays: Arrays, stats: Mapping[str, float] | None = None
    ) -> Commit:
        """Choose entries, encode, check, write and commit one shard.

        Args:
            shard: Of the plan.
            arrays: All arrays of the layout.
            stats: Figures for people, kept in the commit.

        Returns:
            The commit that now stands; it takes the place of another worker's, of like content.

        Raises:
            CorruptionError: The arrays break the layout.
            StorageError: The disk or object store refused; nothing is committed.
        """
        manifest = self.manifest
        where = f"{self.location.url}, shard {shard.index}"
        manifest.check_shard(arrays, where=where)
        coder = Coder(self.encoding, self._ranking, where)
        stored = encode(manifest.kind, select_entries(arrays, self.encoding), coder)
        # What a reader will see is what counts.
        arrays = decode(manifest.kind, stored, coder)
        manifest.check_shard(arrays, where=where)
        specs = stored_specs(manifest.kind, self.encoding)
        path = f"data/{shard.index:05d}-{uuid.uuid4().hex[:16]}"
        files = self._write_data(path, stored, specs)
        lengths = axis_lengths(arrays)
        commit = Commit(
            shard=shard.index,
            path=path,
            store_fingerprint=self._fingerprint,
            shard_fingerprint=shard.fingerprint,
            first_segment=shard.start,
            content_sha256=arrays_digest(stored, [spec.name for spec in specs]),
            files=files,
            counts=Counts(
                segments=lengths["D"],
                positions=lengths["N"],
                entries=lengths.get("E", 0),
                spans=lengths.get("S", 0),
            ),
            stats={
                **{name: float(np.float64(value)) for name, value in (stats or {}).items()},
                **_tail_mean(arrays),
            },
        )
        check_commit(commit, manifest, specs, where)  # what no reader would take
        # From here on the data stays whatever happens: a put that fails may have been carried out.
        self.location.write_atomic(commit_key(shard.index), seal(commit))
        return commit

    def _write_data(
        self, path: str, stored: Arrays, specs: Iterable[StoredSpec]
    ) -> dict[str, FileRecord]:
        """Write a folder of this attempt's own; nothing of it stays when that fails."""
        try:
            with storage_errors(f"{self.location.url}/{path}", writing=True):
                store = self.location.zarr_store(path, read_only=False)
                files = write_arrays(store, stored, specs)
            self.location.make_durable(path)
        except BaseException:
            with contextlib.suppress(LogitfuseError):  # the first error is the one to tell
                self.location.delete(path)
            raise
        return files


def _tail_mean(arrays: Arrays) -> dict[str, float]:
    tail = arrays.get("tail_mass")
    if tail is None:
        return {}
    return {TAIL_MEAN: float(tail.mean(dtype=np.float64)) if len(tail) else 0.0}


def require_same_store(reader: StoreReader, manifest: Manifest) -> None:
    """Refuse a store with commits that was made from something else. Writes nothing.

    Raises:
        MismatchError: Names what differs.
    """
    if reader.manifest.request() != manifest.request():
        raise _mismatch(reader.manifest, manifest, reader.location.url)


def _brought_up_to(found: Manifest, wanted: Manifest, location: Location) -> Manifest:
    """The manifest of a store whose plan may have grown, or whose models may be named otherwise now;
    written where that is so."""
    names = ("corpus_fingerprint", "plan_fingerprint", "num_shards", "model", "target")
    now = found.model_copy(update={name: getattr(wanted, name) for name in names})
    if now != found:
        location.write_atomic(MANIFEST_FILE, seal(now))
    return now


_ANOTHER_STORE = (
    "undo the change, or give the run another name (or delete the store) to start again"
)
_ANOTHER_ALIGNMENT = (
    "undo the change, or put this alignment beside it: give the run another name, and `data_dir` the "
    "folder that the sources' stores lie in"
)


def _mismatch(found: Manifest, wanted: Manifest, where: str) -> MismatchError:
    have, want = _leaves(found.request()), _leaves(wanted.request())
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
    found: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "..."
