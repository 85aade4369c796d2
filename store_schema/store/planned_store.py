"""A store that a stage fills, checked before anything of it is made."""

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
    """What a store is to hold, and where.

    Args:
        run: The run file.
        plan: Its shards are the units of work.
        tokenizer: Whose tokens the store's positions are.
        manifest: Of the store.
        location: Where it lies.
    """

    run: RunConfig
    plan: Plan
    tokenizer: SegmentTokenizer
    manifest: Manifest
    location: Location

    def open_store(self) -> StoreWriter:
        """Create the store, or go on with it.

        Raises:
            MismatchError: The store there was made from something else.
        """
        return StoreWriter.open(
            self.location,
            self.manifest,
            self.tokenizer.vocabulary,
            config=self.run.resolved(),
            count_tokens=lambda: token_counts(self.plan, self.tokenizer),
        )

    def committed(self) -> set[int]:
        """Finished shards, told without writing anything.

        Raises:
            MismatchError: The store there was made from something else.
        """
        if not self.location.exists(MANIFEST_FILE):
            return set()
        reader = StoreReader.open(self.location)
        if not reader.commits:
            return set()
        require_same_store(reader, self.manifest)
        return reader.committed(self.plan.shards)
