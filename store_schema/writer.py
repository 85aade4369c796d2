"""Writing a store: create or resume it, then shard by shard, each committed in one atomic step."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping

import numpy as np

from store_schema.errors import LogitfuseError, MismatchError
from store_schema.fingerprint import arrays_digest
from store_schema.layout import Arrays, array_names, array_specs, axis_lengths, check_shard
from store_schema.location import Location, storage_errors
from store_schema.manifest import Commit, Counts, Manifest
from store_schema.plan import ShardRecord
from store_schema.reader import MANIFEST_FILE, VOCABULARY_FILE, StoreReader, commit_key
from store_schema.sealed import seal, unseal
from store_schema.shard_io import write_arrays
from store_schema.vocabulary import Vocabulary


class StoreWriter:
    """One store, open for writing by any number of workers at once.

    A shard is written into a folder of this attempt alone and exists once its commit does. Killed
    at any instruction, an attempt leaves at most a folder that nobody reads.
    """

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest
        self._fingerprint = manifest.fingerprint()

    @classmethod
    def open(
        cls, location: Location, manifest: Manifest, vocabulary: Vocabulary, *, config: str = ""
    ) -> StoreWriter:
        """Create the store, or go on with it if it is the same one.

        Args:
            location: Folder of the store.
            manifest: What the store is to hold.
            vocabulary: Byte table of the store's own tokens.
            config: The resolved run file, kept beside a new store for people.

        Raises:
            MismatchError: The store there was made from something else; names what differs.
        """
        if location.exists(MANIFEST_FILE):
            where = f"{location.url}/{MANIFEST_FILE}"
            found = unseal(Manifest, location.read_bytes(MANIFEST_FILE), where=where)
            if found.identity() == manifest.identity():
                return cls(location, found)
            if location.names("commits"):
                raise _mismatch(found, manifest, location.url)
            # Begun from something else but nothing is finished: nothing is lost by starting anew.
        location.write_atomic(VOCABULARY_FILE, vocabulary.to_parquet())
        if config:
            location.write_atomic("config.yaml", config.encode())
        location.write_atomic(MANIFEST_FILE, seal(manifest))
        return cls(location, manifest)

    def committed(self) -> set[int]:
        """Shards that are finished now."""
        return set(StoreReader.open(self.location).commits)

    def write(
        self, shard: ShardRecord, arrays: Arrays, stats: Mapping[str, float] | None = None
    ) -> Commit:
        """Check, write and commit one shard.

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
        kind = self.manifest.kind
        where = f"{self.location.url}, shard {shard.index}"
        check_shard(kind, arrays, vocab_size=self.manifest.vocab_size, where=where)
        path = f"data/{shard.index:05d}-{uuid.uuid4().hex[:16]}"
        try:
            with storage_errors(f"{self.location.url}/{path}"):
                store = self.location.zarr_store(path, read_only=False)
                files = write_arrays(store, arrays, array_specs(kind))
            self.location.make_durable(path)
        except BaseException:
            with contextlib.suppress(LogitfuseError):  # the first error is the one to tell
                self.location.delete(path)
            raise
        lengths = axis_lengths(arrays)
        commit = Commit(
            shard=shard.index,
            path=path,
            store_fingerprint=self._fingerprint,
            shard_fingerprint=shard.fingerprint,
            content_sha256=arrays_digest(arrays, array_names(kind)),
            files=files,
            counts=Counts(
                segments=lengths["D"],
                positions=lengths["N"],
                entries=lengths["E"],
                spans=lengths.get("S", 0),
            ),
            stats={name: float(np.float64(value)) for name, value in (stats or {}).items()},
        )
        # From here on the data stays whatever happens: a put that fails may have been carried out.
        self.location.write_atomic(commit_key(shard.index), seal(commit))
        return commit


def _mismatch(found: Manifest, wanted: Manifest, where: str) -> MismatchError:
    have, want = found.identity(), wanted.identity()
    different = [key for key in want if have.get(key) != want[key]]
    key = different[0]
    return MismatchError(
        f"the store was made with another {', '.join(different)}",
        where=where,
        expected=f"{key} {_shown(want[key])}",
        got=f"{key} {_shown(have.get(key))}",
        hint="undo the change, or give the run another name (or delete the store) to start anew",
    )


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "..."
