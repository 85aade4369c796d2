"""The plan: documents split into segments, and segments assigned to shards, once for all models.

`segments.parquet` has the segments with their text, one row group per shard, so that a worker reads
only its own; `plan.json` has the rest. It is written last: without it there is no plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from store_schema import SCHEMA_VERSION, __version__
from store_schema.config import StrictModel
from store_schema.disk.bounded import read_record
from store_schema.disk.location import Location
from store_schema.disk.parquet import read_parquet
from store_schema.disk.sealed import MAX_RECORD_BYTES, seal, unseal
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, CorruptionError, MissingError
from store_schema.fingerprint import bytes_digest, fingerprint

RESTORE = "restore the file from a copy or plan again"
MAX_SHARD_TEXT_BYTES = 1 << 30
PLAN_FILE = "plan.json"
SEGMENTS_FILE = "segments.parquet"
GROWN_FILE = "segments.next.parquet"
"""Temporary name of the longer segment file while a plan is extended."""

SEGMENT_SCHEMA = pa.schema(
    [
        ("segment_id", pa.string()),
        ("document_id", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
        ("byte_start", pa.int64()),
        ("byte_end", pa.int64()),
        ("ends_document", pa.bool_()),
        ("context", pa.string()),
        ("text", pa.string()),
        ("author", pa.string()),
        ("corpus", pa.string()),
    ]
)
_SINCE_STAGES = ("author", "corpus")
"""Columns that plans of earlier versions lack; null for documents without an author or a corpus."""
_MAY_BE_NULL = ("context", *_SINCE_STAGES)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a document that fits the context of every model: one sample.

    Args:
        index: Row in the plan's segment table.
        segment_id: Document id, '#', number within the document.
        document_id: The document's id in the corpus.
        domain: The document's domain.
        split: The document's split, such as "train", "valid" or "test".
        byte_start: First byte in the document's UTF-8 text.
        byte_end: Byte after the last; the segments of a document join to its text.
        ends_document: Whether it is the document's last segment.
        context: None, or JSON of the prompt or messages before the text (see SegmentTokenizer).
        text: The text, whose tokens are the rows of stores.
        author: Name of the source that wrote it as an answer, else None.
        corpus: Name of the input that it is from, None where that has no name.
    """

    index: int
    segment_id: str
    document_id: str
    domain: str
    split: str
    byte_start: int
    byte_end: int
    ends_document: bool
    context: str | None
    text: str
    author: str | None = None
    corpus: str | None = None

    @property
    def chat_id(self) -> str | None:
        """Id of its chat, the same for all turns of one chat; None where it is no chat turn."""
        return None if self.context is None else chat_of(self.document_id)

    @property
    def has_prompt(self) -> bool:
        """Whether its context is a prompt that sources may answer: only of a document's first segment,
        and of a chat turn's content, not of the thought before it."""
        asks = self.context is not None and self.byte_start == 0
        return asks and "part" not in json.loads(self.context or "{}")


def chat_of(document_id: str) -> str | None:
    """Id of the chat that a document is a turn of; None where it is no chat turn, by its id."""
    chat, turn, _ = document_id.rpartition("/turn-")
    return chat if turn else None


class ShardRecord(StrictModel):
    """One shard: the unit of work, commit and shuffling. All its segments are of one split."""

    index: int = Field(ge=0)
    split: str
    start: int = Field(ge=0)
    """First segment index."""
    stop: int = Field(ge=0)
    """One past the last segment index."""
    num_bytes: int = Field(ge=0)
    """UTF-8 bytes of the texts."""
    num_tokens: dict[str, int]
    """Tokens by model name (sources and 'target')."""
    fingerprint: str
    """Fingerprint of all fields of its segments."""


class PlanRecord(StrictModel):
    """plan.json."""

    schema_version: int = SCHEMA_VERSION
    corpus_fingerprint: str
    request_fingerprint: str
    """Fingerprint of everything that the plan was made from; the same request gives the same plan."""
    tokenizers: dict[str, str]
    """Tokenizer fingerprint by model name ('target' is one of them)."""
    settings: dict[str, Any]
    """The fields of the run file's section `plan` that determine the plan."""
    num_segments: int = Field(ge=0)
    documents: dict[str, str] = Field(default_factory=dict)
    """Digest of all documents of each split; it does not depend on their order."""
    shards: tuple[ShardRecord, ...]
    created_by: str = f"logitfuse {__version__}"

    @model_validator(mode="after")
    def _consecutive(self) -> Self:
        """Check that shards are in order and that every segment is in one of them."""
        stop = 0
        for index, shard in enumerate(self.shards):
            if shard.index != index or shard.start != stop or shard.stop < stop:
                raise ValueError(f"shard {index} does not follow the one before it")
            stop = shard.stop
        if stop != self.num_segments:
            raise ValueError("shards do not end with the last segment")
        return self

    def fingerprint(self) -> str:
        """Fingerprint of the segments and their shards; it does not depend on the models."""
        return fingerprint([[s.split, s.start, s.stop, s.fingerprint] for s in self.shards])


def shard_fingerprint(segments: Sequence[Segment]) -> str:
    """Fingerprint of a shard's segments: of every field except their index in the plan."""
    fields = [name for name in SEGMENT_SCHEMA.names if name not in ("text", *_SINCE_STAGES)]

    def values(segment: Segment) -> list[Any]:
        since = [getattr(segment, name) for name in _SINCE_STAGES]
        return [
            bytes_digest(segment.text.encode()),
            *(getattr(segment, name) for name in fields),
            # Left out where null, so that fingerprints of earlier versions stay the same.
            *(since if any(value is not None for value in since) else []),
        ]

    return fingerprint([values(segment) for segment in segments])


class Plan:
    """A finished plan, opened for reading."""

    def __init__(
        self, location: Location, record: PlanRecord, fingerprint: str | None = None
    ) -> None:
        """A plan from its record.

        Args:
            location: Its folder.
            record: plan.json, or a copy with the token counts of another model.
            fingerprint: Fingerprint of plan.json, if `record` is such a copy.
        """
        self.location = location
        self.record = record
        self._fingerprint = fingerprint

    @classmethod
    def open(cls, location: Location) -> Plan:
        """Open the plan at `location`.

        Raises:
            MissingError: There is none (yet).
            CorruptionError: plan.json is damaged.
        """
        plan = cls.find(location)
        if plan is None:
            raise MissingError(
                "no plan", where=location.url, hint="run `logitfuse extract plan` first"
            )
        return plan

    @classmethod
    def find(cls, location: Location) -> Plan | None:
        """The plan at `location`, None if there is none (yet).

        Raises:
            CorruptionError: plan.json is damaged.
        """
        data = read_record(location, PLAN_FILE, MAX_RECORD_BYTES, RESTORE)
        if data is None:
            return None
        where = f"{location.url}/{PLAN_FILE}"
        return cls(location, unseal(PlanRecord, data, where=where, hint=RESTORE))

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """All shards, in order."""
        return self.record.shards

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the plan."""
        return self._fingerprint or self.record.fingerprint()

    def splits(self) -> dict[str, tuple[ShardRecord, ...]]:
        """Shards by split, in order of first appearance."""
        by_split: dict[str, tuple[ShardRecord, ...]] = {}
        for shard in self.shards:
            by_split[shard.split] = (*by_split.get(shard.split, ()), shard)
        return by_split

    def segments(self, shard: ShardRecord) -> list[Segment]:
        """The segments of one shard, checked against the shard's fingerprint.

        Raises:
            CorruptionError: The segment file is damaged, or is not that of plan.json.
        """
        where = f"{self.location.url}/{SEGMENTS_FILE}, shard {shard.index}"
        with self.location.open_read(SEGMENTS_FILE) as file:
            table = read_parquet(
                file,
                SEGMENT_SCHEMA,
                max_rows=shard.stop - shard.start,
                max_bytes=MAX_SHARD_TEXT_BYTES,
                where=where,
                hint=RESTORE,
                row_group=shard.index,
                since=_SINCE_STAGES,
            )
        _require_segment_table(table, where)
        try:
            rows = table.to_pylist()
        except ValueError as error:  # text that is not UTF-8
            raise CorruptionError(
                "segments unreadable", where=where, got=str(error), hint=RESTORE
            ) from error
        segments = [Segment(shard.start + i, **row) for i, row in enumerate(rows)]
        if shard_fingerprint(segments) != shard.fingerprint:
            raise CorruptionError(
                "segments are not those of the plan",
                where=where,
                expected=shard.fingerprint,
                got=shard_fingerprint(segments),
                hint=RESTORE,
            )
        return segments


def write_plan(
    location: Location,
    shards: Iterable[tuple[Sequence[Segment], dict[str, int]]],
    *,
    corpus_fingerprint: str,
    request_fingerprint: str,
    tokenizers: dict[str, str],
    settings: dict[str, Any],
    documents: dict[str, str] | None = None,
    kept: Plan | None = None,
) -> Plan:
    """Write a plan: segments first, plan.json last.

    If it is killed, there is no plan, or with `kept` that plan is unchanged.

    Args:
        location: The plan's folder.
        shards: For each shard its segments (at least one; indices consecutive over all shards,
            one split each) and its number of tokens by model.
        corpus_fingerprint: Of the corpus it is made from.
        request_fingerprint: Of everything the plan is made from.
        tokenizers: Tokenizer fingerprints by model name.
        settings: The fields of section `plan` that determine it.
        documents: Digest of the documents of each split.
        kept: An existing plan to extend: `shards` are put after its own.

    Returns:
        The plan.

    Raises:
        ConfigError: More shards than one plan.json can have.
    """
    if kept is None:
        location.delete(PLAN_FILE)
        records = _write_segments(location, SEGMENTS_FILE, shards, None)
    else:
        records = _grow(location, shards, kept)
    record = PlanRecord(
        corpus_fingerprint=corpus_fingerprint,
        request_fingerprint=request_fingerprint,
        tokenizers=tokenizers,
        settings=settings,
        num_segments=records[-1].stop if records else 0,
        documents=documents or {},
        shards=tuple(records),
    )
    location.write_atomic(PLAN_FILE, _readable(record, location.url))
    return Plan(location, record)


ShardContent = tuple[Sequence[Segment], dict[str, int]]


def _grow(location: Location, shards: Iterable[ShardContent], kept: Plan) -> list[ShardRecord]:
    """Write a segment file with further shards; returns the records of all shards.

    The longer file replaces the old one atomically and begins with the same row groups, so processes
    that have the old plan open can go on reading.
    """
    shards = iter(shards)
    first = next(shards, None)
    if first is None:
        return list(kept.shards)
    records = _write_segments(location, GROWN_FILE, chain([first], shards), kept)
    location.replace(GROWN_FILE, SEGMENTS_FILE)
    return records


def _write_segments(
    location: Location, key: str, shards: Iterable[ShardContent], kept: Plan | None
) -> list[ShardRecord]:
    """Write the segments of `kept`, then of `shards`; returns the records of all."""
    records = [] if kept is None else list(kept.shards)
    with storage_errors(f"{location.url}/{key}"), location.open_write(key) as sink:
        with pq.ParquetWriter(
            sink, SEGMENT_SCHEMA, compression="zstd", write_page_checksum=True
        ) as writer:
            for shard in records:
                stays = kept.segments(shard) if kept is not None else []
                writer.write_table(_segment_table(stays), row_group_size=len(stays))
            for index, (segments, num_tokens) in enumerate(shards, len(records)):
                writer.write_table(_segment_table(segments), row_group_size=len(segments))
                records.append(_shard_record(index, segments, num_tokens))
    location.make_durable(key)
    return records


def _readable(record: PlanRecord, where: str) -> bytes:
    data = seal(record)
    if len(data) > MAX_RECORD_BYTES:  # readers would refuse it
        raise ConfigError(
            "plan.json would be too long",
            where=where,
            expected=f"at most {MAX_RECORD_BYTES} bytes",
            got=f"{len(data)} for {len(record.shards)} shards",
            hint="raise plan.shard_tokens",
        )
    return data


def _require_segment_table(table: pa.Table, where: str) -> None:
    nulls = [n for n in table.column_names if n not in _MAY_BE_NULL and table[n].null_count]
    if nulls:
        raise CorruptionError("null in a field", where=where, got=nulls, hint=RESTORE)


def _segment_table(segments: Sequence[Segment]) -> pa.Table:
    columns = {name: [getattr(s, name) for s in segments] for name in SEGMENT_SCHEMA.names}
    return pa.table(columns, schema=SEGMENT_SCHEMA)


def _shard_record(
    index: int, segments: Sequence[Segment], num_tokens: dict[str, int]
) -> ShardRecord:
    return ShardRecord(
        index=index,
        split=segments[0].split,
        start=segments[0].index,
        stop=segments[-1].index + 1,
        num_bytes=sum(s.byte_end - s.byte_start for s in segments),
        num_tokens=num_tokens,
        fingerprint=shard_fingerprint(segments),
    )
