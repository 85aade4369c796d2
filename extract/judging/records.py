"""The files of judging, in the folder `judged` of a run.

judged.json             counts; written last: without it judging is not complete
best.parquet            the best answers as a corpus, for `corpus.inputs`
scores.parquet          all scores and votes
parts/<judge>/00000.json   scores of a judge for the answers of one shard of the plan, so that a
stopped run
                        can go on, and an added judge needs only its own scores
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from extract.judge_kinds.kind import Answer, Score
from store_schema import SCHEMA_VERSION, __version__
from store_schema.config import RunConfig, StrictModel
from store_schema.disk.bounded import read_record
from store_schema.disk.location import Location, open_location
from store_schema.disk.parquet import read_parquet
from store_schema.disk.sealed import MAX_RECORD_BYTES, seal, unseal
from store_schema.errors import CorruptionError, MissingError
from store_schema.fingerprint import bytes_digest

JUDGED_FILE, BEST_FILE, SCORES_FILE = "judged.json", "best.parquet", "scores.parquet"
MAKE_AGAIN = "run `logitfuse judge`, which writes it again"
MAX_ROWS = 1 << 31
MAX_TABLE_BYTES = 1 << 36

BEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("messages", pa.string()),
        ("tools", pa.string()),
        ("response", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
        ("author", pa.string()),
        ("answer", pa.int64()),
        ("prompt_id", pa.string()),
        ("votes", pa.float64()),
        ("settled_by", pa.string()),
    ]
)
SCORES_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("source", pa.string()),
        ("answer", pa.int64()),
        ("judge", pa.string()),
        ("score", pa.float64()),
        ("vote", pa.float64()),
        ("failure", pa.string()),
        ("best", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class BestRow:
    """A row of best.parquet.

    Args:
        id: The answer's id in `extract answers`: prompt, author, number.
        prompt: The prompt if it is plain text, else None.
        messages: JSON of the messages before the response, or None.
        tools: JSON of the tools that the chat may call, or None.
        response: The best answer.
        domain: Domain of the prompt.
        split: Split of the prompt.
        author: Name of the source that wrote it.
        answer: Index among the author's answers.
        prompt_id: Id of the document with the prompt.
        votes: Its total over all judges (`extract.judging.votes.totals`).
        settled_by: What decided: votes, likelihood or order.
    """

    id: str
    prompt: str | None
    messages: str | None
    tools: str | None
    response: str
    domain: str
    split: str
    author: str
    answer: int
    prompt_id: str
    votes: float
    settled_by: str

    @classmethod
    def of(cls, best: Answer, votes: float, settled_by: str) -> BestRow:
        """The row of a chosen answer."""
        question = best.question
        return cls(
            id=best.document_id,
            prompt=question.context.get("prompt"),
            messages=_json(question.context.get("messages")),
            tools=_json(question.context.get("tools")),
            response=best.text,
            domain=question.domain,
            split=question.split,
            author=best.source,
            answer=best.number,
            prompt_id=question.document_id,
            votes=votes,
            settled_by=settled_by,
        )

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Role and content of the messages before the response."""
        if self.messages is None:
            return [("prompt", self.prompt or "")]
        return [(m["role"], str(m.get("content") or "")) for m in json.loads(self.messages)]


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A row of scores.parquet.

    Args:
        prompt: Id of the document with the prompt.
        source: Name of the source that wrote the answer.
        answer: Index among the source's answers.
        judge: Name of the judge.
        score: Higher is better; None where the judge has none.
        vote: The judge's vote for it (`extract.judging.votes.judge_votes`); None where it abstains.
        failure: Reason for no score.
        best: Whether the answer was chosen.
    """

    prompt: str
    source: str
    answer: int
    judge: str
    score: float | None
    vote: float | None
    failure: str | None
    best: bool


class JudgeFigures(StrictModel):
    """Figures of one judge."""

    scores: int = Field(ge=0)
    """Number of answers that it scored."""
    failures: dict[str, int]
    """Number of answers without a score, by reason."""
    means: dict[str, float]
    """Mean score by source."""
    chosen: int = Field(ge=0)
    """Number of prompts whose best answer is one that it scored highest."""
    judged: int = Field(ge=0)
    """Number of prompts to which it scored an answer."""


class JudgedRecord(StrictModel):
    """judged.json."""

    schema_version: int = SCHEMA_VERSION
    request_fingerprint: str
    """Of answers, section and judges; the same request gives the same tables."""
    vote: str
    prompts: int = Field(ge=0)
    """Number of prompts in the plan."""
    silent: int = Field(ge=0)
    """Number of prompts dropped because they have no usable answer."""
    only_cut: int = Field(ge=0)
    """Those of them that have an answer which was cut."""
    too_few: int = Field(ge=0)
    """Number of prompts dropped because they have fewer answers than `judge.min_answers`."""
    none_passes: int = Field(default=0, ge=0)
    """Number of prompts dropped because no answer has every judge's `min_score`."""
    held: tuple[str, ...]
    """Ids of prompts that contain their answer."""
    held_dropped: bool
    left_out: dict[str, dict[str, int]]
    """Number of answers that were not judged, by source and reason."""
    answers: dict[str, int]
    """Number of answers that were judged, by source."""
    best: dict[str, dict[str, int]]
    """Number of prompts by domain and author of the best answer."""
    settled_by: dict[str, int]
    """Number of prompts by what decided: votes, likelihood or order."""
    ties_not_scored: int = 0
    """Ties that the order decided although `judge.scored_in` is set: it lacks one of their answers."""
    judges: dict[str, JudgeFigures]
    digests: dict[str, str]
    """SHA-256 of the tables, by file."""
    created_by: str = f"logitfuse {__version__}"


class PartRecord(StrictModel):
    """Scores of a judge for the answers of one shard, in the order of the answers."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    """Of judge and answers."""
    scores: tuple[float | None, ...]
    failures: dict[str, str]
    """Reason for no score, by index of the answer."""

    @classmethod
    def of(cls, fingerprint: str, scores: Sequence[Score]) -> PartRecord:
        """The record of some scores, none of which is NaN."""
        failures = {str(i): s.failure or "" for i, s in enumerate(scores) if s.value is None}
        values = tuple(s.value for s in scores)
        return cls(fingerprint=fingerprint, scores=values, failures=failures)

    def read(self) -> list[Score]:
        """The scores."""
        return [Score(s, self.failures.get(str(i))) for i, s in enumerate(self.scores)]


def judged_location(run: RunConfig) -> Location:
    """Folder or URL of a run's judging."""
    return open_location(run.folder).child("judged")


def kept_record(location: Location) -> JudgedRecord | None:
    """The record of finished judging; None where there is none, or a table was changed.

    Raises:
        CorruptionError: judged.json is damaged.
    """
    data = read_record(location, JUDGED_FILE, MAX_RECORD_BYTES, MAKE_AGAIN)
    if data is None:
        return None
    where = f"{location.url}/{JUDGED_FILE}"
    record = unseal(JudgedRecord, data, where=where, hint=f"delete it; {MAKE_AGAIN}")
    for name, digest in record.digests.items():
        if not location.exists(name) or bytes_digest(location.read_bytes(name)) != digest:
            return None
    return record


def write_judged(
    location: Location,
    record: JudgedRecord,
    best: Sequence[BestRow],
    scores: Sequence[ScoreRow],
    config: str,
) -> JudgedRecord:
    """Write the tables, then judged.json; returns the record with the tables' digests."""
    location.delete(JUDGED_FILE)
    tables = {
        BEST_FILE: _parquet([asdict(row) for row in best], BEST_SCHEMA),
        SCORES_FILE: _parquet([asdict(row) for row in scores], SCORES_SCHEMA),
    }
    location.write_atomic("config.yaml", config.encode())
    for name, data in tables.items():
        location.write_atomic(name, data)
    digests = {name: bytes_digest(data) for name, data in tables.items()}
    record = record.model_copy(update={"digests": digests})
    location.write_atomic(JUDGED_FILE, seal(record))
    return record


def open_judged(run: RunConfig) -> tuple[JudgedRecord, Location]:
    """The record and the folder of finished judging.

    Raises:
        MissingError: Judging is not finished (yet).
        CorruptionError: A file is damaged.
    """
    location = judged_location(run)
    if not location.exists(JUDGED_FILE):
        raise MissingError(
            "nothing is judged", where=location.url, hint="run `logitfuse judge` first"
        )
    record = kept_record(location)
    if record is None:
        raise CorruptionError("a table was changed", where=location.url, hint=MAKE_AGAIN)
    return record, location


def read_best(location: Location) -> list[BestRow]:
    """The rows of best.parquet."""
    return [BestRow(**row) for row in _rows(location, BEST_FILE, BEST_SCHEMA)]


def read_scores(location: Location) -> list[ScoreRow]:
    """The rows of scores.parquet."""
    return [ScoreRow(**row) for row in _rows(location, SCORES_FILE, SCORES_SCHEMA)]


def part_key(judge: str, shard: int) -> str:
    """Key of a judge's scores for a shard."""
    return f"parts/{judge}/{shard:05d}.json"


def read_part(
    location: Location, key: str, fingerprint: str, num_answers: int
) -> list[Score] | None:
    """Kept scores; None where there are none, or they are of other answers or another judge."""
    data = read_record(location, key, MAX_RECORD_BYTES, MAKE_AGAIN)
    if data is None:
        return None
    try:
        part = unseal(PartRecord, data, where=f"{location.url}/{key}")
    except CorruptionError:
        return None  # scored again
    if part.fingerprint != fingerprint or len(part.scores) != num_answers:
        return None
    return part.read()


def write_part(location: Location, key: str, fingerprint: str, scores: Sequence[Score]) -> None:
    """Write the scores of a shard."""
    location.write_atomic(key, seal(PartRecord.of(fingerprint, scores)))


def _parquet(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _rows(location: Location, name: str, schema: pa.Schema) -> list[dict[str, Any]]:
    with location.open_read(name) as file:
        table = read_parquet(
            file, schema, max_rows=MAX_ROWS, max_bytes=MAX_TABLE_BYTES,
            where=f"{location.url}/{name}", hint=MAKE_AGAIN,
        )  # fmt: skip
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)
