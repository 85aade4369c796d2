"""A store that a stage is going to write: what it will have, and which of its shards are finished."""

from __future__ import annotations

from dataclasses import dataclass

from store_schema.config import RunConfig
from store_schema.disk.location import Location
from store_schema.encoding.frequency import token_counts
from store_schema.manifest import Manifest
from store_schema.plan.plan import Plan
from store_schema.store.reader import MANIFEST_FILE, StoreReader
from store_schema.store.writer import StoreWriter, require_same_store
from store_schema.text.tokenizer import SegmentTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStore:
    """A store that a stage is going to write, or has begun.

    Args:
        run: The run file.
        plan: Its shards are the store's.
        tokenizer: Tokenizer of the store's tokens.
        manifest: The store's manifest.
        location: The store's folder or URL.
    """

    run: RunConfig
    plan: Plan
    tokenizer: SegmentTokenizer
    manifest: Manifest
    location: Location

    def open_store(self) -> StoreWriter:
        """Create the store, or open it to continue.

        Raises:
            MismatchError: There is a store that was made with other inputs or settings.
        """
        return StoreWriter.open(
            self.location,
            self.manifest,
            self.tokenizer.vocabulary,
            config=self.run.resolved(),
            count_tokens=lambda: token_counts(self.plan, self.tokenizer),
        )

    def committed(self) -> set[int]:
        """Indices of finished shards. Writes nothing.

        Raises:
            MismatchError: There is a store that was made with other inputs or settings.
        """
        if not self.location.exists(MANIFEST_FILE):
            return set()
        reader = StoreReader.open(self.location)
        if not reader.commits:
            return set()
        require_same_store(reader, self.manifest)
        return reader.committed(self.plan.shards)
