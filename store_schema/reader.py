"""Reading a store: commits only, each array checked on the way in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

from store_schema.errors import CorruptionError, MismatchError, MissingError
from store_schema.fingerprint import arrays_digest
from store_schema.layout import Arrays, array_names, array_specs, check_shard
from store_schema.location import Location
from store_schema.manifest import Commit, Manifest
from store_schema.plan import Plan, ShardRecord
from store_schema.sealed import unseal
from store_schema.shard_io import open_arrays, read_array
from store_schema.vocabulary import Vocabulary

MANIFEST_FILE = "manifest.json"
VOCABULARY_FILE = "vocabulary.parquet"
_COMMIT_NAME = re.compile(r"^(\d{5,})\.json$")


def commit_key(shard: int) -> str:
    """Key of a shard's commit."""
    return f"commits/{shard:05d}.json"


class StoreReader:
    """A store open for reading."""

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest

    @classmethod
    def open(cls, location: Location) -> StoreReader:
        """Open the store at `location`.

        Raises:
            MissingError: There is none (yet).
            SchemaVersionError: Written by a newer logitfuse.
            CorruptionError: The manifest is damaged.
        """
        if not location.exists(MANIFEST_FILE):
            raise MissingError("no store", where=location.url, hint="run the stage before first")
        where = f"{location.url}/{MANIFEST_FILE}"
        return cls(location, unseal(Manifest, location.read_bytes(MANIFEST_FILE), where=where))

    @cached_property
    def commits(self) -> dict[int, Commit]:
        """Finished shards as they stood when first asked.

        Raises:
            CorruptionError: A commit is damaged, or names another shard than its file.
            MismatchError: A commit was written for another manifest.
        """
        found = {}
        for name in self.location.names("commits"):
            match = _COMMIT_NAME.match(name)
            if match is None:
                continue
            where = f"{self.location.url}/commits/{name}"
            commit = unseal(Commit, self.location.read_bytes(f"commits/{name}"), where=where)
            if commit.shard != int(match[1]):
                raise CorruptionError("commit of another shard", where=where, got=commit.shard)
            if commit.store_fingerprint != self.manifest.fingerprint():
                raise MismatchError(
                    "commit was written for another store",
                    where=where,
                    expected=self.manifest.fingerprint(),
                    got=commit.store_fingerprint,
                )
            found[commit.shard] = commit
        return found

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Byte table of the store's own tokens.

        Raises:
            CorruptionError: The file is not the one the manifest speaks of.
        """
        where = f"{self.location.url}/{VOCABULARY_FILE}"
        vocabulary = Vocabulary.from_parquet(self.location.read_bytes(VOCABULARY_FILE), where=where)
        if vocabulary.fingerprint != self.manifest.vocabulary_fingerprint:
            raise CorruptionError(
                "vocabulary is not the manifest's",
                where=where,
                expected=self.manifest.vocabulary_fingerprint,
                got=vocabulary.fingerprint,
            )
        return vocabulary

    def require_plan(self, plan: Plan) -> None:
        """Refuse to read a store together with a plan it was not made from.

        Raises:
            MismatchError: Shows both fingerprints.
        """
        if self.manifest.plan_fingerprint != plan.fingerprint:
            raise MismatchError(
                "store and plan do not belong together",
                where=self.location.url,
                expected=f"plan {plan.fingerprint}",
                got=f"plan {self.manifest.plan_fingerprint}",
                hint="the plan was changed after the store was begun; rerun under another name",
            )

    def require_shards(self, shards: Iterable[ShardRecord]) -> None:
        """Refuse to go on without some of the shards.

        Raises:
            MissingError: Names those that are missing.
        """
        missing = [shard.index for shard in shards if shard.index not in self.commits]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
            raise MissingError(
                f"{len(missing)} shard(s) not there yet ({shown})",
                where=self.location.url,
                hint="rerun the stage that writes this store",
            )

    def read(self, shard: int, names: Iterable[str] | None = None) -> Arrays:
        """Decoded arrays of one shard.

        Args:
            shard: Index in the plan.
            names: Which arrays; None reads all and checks every invariant of the layout.

        Raises:
            MissingError: The shard is not committed.
            CorruptionError: Names shard, array and chunk.
        """
        commit = self._commit(shard)
        where = f"{self.location.url}, shard {shard}"
        wanted = set(array_names(self.manifest.kind)) if names is None else set(names)
        store = self.location.zarr_store(commit.path, read_only=True)
        group = open_arrays(store, commit.files, where)
        arrays = {}
        for spec in array_specs(self.manifest.kind):
            if spec.name in wanted:
                length = commit.counts.length(spec.axis)
                arrays[spec.name] = read_array(group, spec, length, slice(None), where)
        if names is None:
            check_shard(
                self.manifest.kind, arrays, vocab_size=self.manifest.vocab_size, where=where
            )
        return arrays

    def verify(self, shard: int) -> None:
        """Read a shard whole and compare its content with the commit's digest.

        Raises:
            CorruptionError: Anything differs.
        """
        digest = arrays_digest(self.read(shard), array_names(self.manifest.kind))
        expected = self._commit(shard).content_sha256
        if digest != expected:
            raise CorruptionError(
                "content is not what was committed",
                where=f"{self.location.url}, shard {shard}",
                expected=expected,
                got=digest,
            )

    def _commit(self, shard: int) -> Commit:
        if shard not in self.commits:
            raise MissingError(
                f"shard {shard} is not committed",
                where=self.location.url,
                hint="rerun the stage that writes this store",
            )
        return self.commits[shard]
