"""`store show`: one segment as its model saw it, each token with what was expected in its place."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from store_schema.errors import ConfigError, CorruptionError, MissingError
from store_schema.layout import Arrays, Origin
from store_schema.location import storage_errors
from store_schema.plan import RESTORE, SEGMENTS_FILE, Plan, Segment, ShardRecord
from store_schema.vocabulary import Vocabulary
from store_tools.places import SoundReader, StorePlace, planned_shard
from store_tools.visible import cut, padded, quoted, visible, width

LISTED = 20
_TOKEN_COLUMNS = 20
_GAP = "  "


@dataclass(frozen=True, slots=True)
class Expected:
    """One token that might have stood at a position.

    Args:
        token_id: In the store's vocabulary.
        spelt: Its bytes; of a special token how it is written.
        logprob: Nats.
    """

    token_id: int
    spelt: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Position:
    """One token of the text.

    Args:
        index: Within the segment.
        data: Its bytes in the text.
        token_id: In the store's vocabulary.
        logprob: Nats; None where it is not known.
        tail_mass: Probability outside the entries.
        best: The most probable tokens, best first.
        origin: Of an aligned store.
    """

    index: int
    data: bytes
    token_id: int
    logprob: float | None
    tail_mass: float
    best: tuple[Expected, ...]
    origin: Origin | None


@dataclass(frozen=True, slots=True)
class ShownSegment:
    """One segment of a store.

    Args:
        store: What people call the store.
        kind: "source" or "aligned".
        source: Name of the source.
        row: Of the plan's segment table.
        shard: Where it lies.
        segment: From the plan; None without one.
        positions: Its tokens.
    """

    store: str
    kind: str
    source: str
    row: int
    shard: int
    segment: Segment | None
    positions: tuple[Position, ...]

    @property
    def title(self) -> str:
        """Its id, or its row where the plan is not known."""
        return f"row {self.row}" if self.segment is None else self.segment.segment_id

    @property
    def num_bytes(self) -> int:
        """Of the text."""
        return sum(len(position.data) for position in self.positions)

    @property
    def bpb(self) -> float | None:
        """Bits per byte of the labels that are known; None where there is none."""
        known = [(p.logprob, len(p.data)) for p in self.positions if p.logprob is not None]
        size = sum(length for _, length in known)
        return -sum(nats for nats, _ in known) / math.log(2) / size if size else None

    @property
    def kept_mass(self) -> float | None:
        """Mean of the positions that have entries."""
        kept = [1 - position.tail_mass for position in self.positions if position.best]
        return sum(kept) / len(kept) if kept else None


@dataclass(frozen=True, slots=True)
class Listed:
    """A segment in a list to choose from.

    Args:
        row: Of the plan's segment table.
        segment: From the plan; None without one.
        text: Its bytes.
    """

    row: int
    segment: Segment | None
    text: bytes


# ------------------------------------------------------------------------------- reading


def read_segment(place: StorePlace, wanted: str, *, top: int) -> ShownSegment:
    """Find a segment in a store and read it.

    Args:
        place: The store.
        wanted: Segment id, or row of the plan's segment table.
        top: Tokens shown of each position.

    Raises:
        MissingError: The plan or the store has no such segment.
        ConfigError: An id is given and there is no plan.
        CorruptionError: The shard is damaged.
    """
    reader, plan = place.open(), place.plan()
    if plan is None:
        row = _row_number(wanted)
        if row is None:
            raise ConfigError(
                "no plan to find a segment's id in",
                where="--segment",
                got=visible(wanted),
                hint="give its row number, or --plan",
            )
        shard, segment = _shard_of_row(reader, row), None
    else:
        reader.require_plan(plan)
        record = _find(plan, wanted)
        row = _row_number(wanted)
        segments = plan.segments(record)
        chosen = (
            s for s in segments if (s.segment_id == wanted if row is None else s.index == row)
        )
        shard, segment = record.index, next(chosen)
        row = segment.index
        if shard not in reader.commits:
            raise MissingError(
                f"shard {shard}, which holds the segment, is not committed",
                where=reader.location.url,
                hint=f"`{place.rerun(reader.manifest.kind, reader.manifest.source)}` writes it",
            )
        reader.require_shards([record])
    arrays = reader.read(shard)
    manifest = reader.manifest
    positions = positions_of(arrays, row, segment, reader.vocabulary, top=top)
    return ShownSegment(place.name, manifest.kind, manifest.source, row, shard, segment, positions)


def positions_of(
    arrays: Arrays, row: int, segment: Segment | None, vocabulary: Vocabulary, *, top: int
) -> tuple[Position, ...]:
    """The tokens of one segment.

    Args:
        arrays: Of its shard.
        row: Of the plan's segment table.
        segment: With its text; None takes the text from the tokens.
        vocabulary: Of the store.
        top: Tokens shown of each position.
    """
    (place,) = np.flatnonzero(arrays["segment_ids"] == row)[:1]
    start, stop = map(int, arrays["token_offsets"][place : place + 2])
    text = None if segment is None else segment.text.encode()
    positions = []
    begin = 0
    for i in range(start, stop):
        token, end = int(arrays["token_ids"][i]), int(arrays["byte_ends"][i])
        label = float(arrays["label_logprobs"][i])
        first, last = map(int, arrays["entry_offsets"][i : i + 2])
        best = [
            Expected(int(e), spelt(vocabulary, int(e)), float(logprob))
            for e, logprob in zip(
                arrays["entry_ids"][first : min(last, first + top)],
                arrays["entry_logprobs"][first : min(last, first + top)],
                strict=True,
            )
        ]
        positions.append(
            Position(
                i - start,
                spelt(vocabulary, token) if text is None else text[begin:end],
                token,
                None if math.isnan(label) else label,
                float(arrays["tail_mass"][i]),
                tuple(best),
                Origin(int(arrays["origin"][i])) if "origin" in arrays else None,
            )
        )
        begin = end
    return tuple(positions)


def spelt(vocabulary: Vocabulary, token_id: int) -> bytes:
    """How a token is written; models may have ids that their tokenizer does not know."""
    if token_id < len(vocabulary) and vocabulary.spelt[token_id]:
        return vocabulary.spelt[token_id]
    return f"<id {token_id}>".encode()


def list_segments(place: StorePlace, count: int = LISTED) -> list[Listed]:
    """The first segments of a store's first shards, to choose from."""
    reader, plan = place.open(), place.plan()
    if plan is not None:
        reader.require_plan(plan)
    found: list[Listed] = []
    for shard in sorted(reader.commits):
        if plan is not None:
            record = planned_shard(plan, shard, reader.location.url)
            found += [Listed(s.index, s, s.text.encode()) for s in plan.segments(record)]
        else:
            found += _listed_without_plan(reader, shard, count)
        if len(found) >= count:
            break
    return found[:count]


def _listed_without_plan(reader: SoundReader, shard: int, count: int) -> list[Listed]:
    arrays = reader.read(shard, ("segment_ids", "token_offsets", "token_ids"))
    rows, offsets = arrays["segment_ids"][:count], arrays["token_offsets"]
    ids = arrays["token_ids"].tolist()
    return [
        Listed(int(row), None, b"".join(spelt(reader.vocabulary, i) for i in ids[start:stop]))
        for row, start, stop in zip(rows, offsets, offsets[1:], strict=False)
    ]


def _row_number(wanted: str) -> int | None:
    """A row where digits are given: ids of segments always have a '#'."""
    return int(wanted) if wanted.isascii() and wanted.isdecimal() and len(wanted) < 16 else None


def _shard_of_row(reader: SoundReader, row: int) -> int:
    for shard in sorted(reader.commits):
        if row in reader.read(shard, ("segment_ids",))["segment_ids"]:
            return shard
    raise MissingError("no such segment", where=reader.location.url, got=f"row {row}")


def _find(plan: Plan, wanted: str) -> ShardRecord:
    """The shard that holds a segment."""
    row = _row_number(wanted)
    if row is not None and row < plan.record.num_segments:
        starts = [record.start for record in plan.shards]
        # Shards without segments begin where the next one does: the last of equals has the row.
        return plan.shards[bisect_right(starts, row) - 1]
    if row is None:
        for record in plan.shards:
            if wanted in _ids(plan, record):
                return record
    raise MissingError(
        "no such segment",
        where=plan.location.url,
        got=visible(wanted),
        hint="without --segment the command lists the first ones",
    )


def _ids(plan: Plan, record: ShardRecord) -> list[str]:
    """Segment ids of a shard, without reading its texts; the shard found is checked when read."""
    where = f"{plan.location.url}/{SEGMENTS_FILE}, shard {record.index}"
    with storage_errors(where), plan.location.open_read(SEGMENTS_FILE) as file:
        try:
            table = pq.ParquetFile(file).read_row_group(record.index, columns=["segment_id"])
            found: list[str] = table["segment_id"].to_pylist()
        except (pa.ArrowException, ValueError, IndexError, KeyError) as error:
            raise CorruptionError(
                "not readable as Parquet", where=where, got=str(error)[:200], hint=RESTORE
            ) from error
    return found


# ------------------------------------------------------------------------------- for a terminal


def share(logprob: float) -> str:
    """A probability as people read it."""
    probability = math.exp(logprob)
    if probability >= 0.0995:
        return f"{probability:.1%}"
    return f"{probability:.2%}" if probability >= 1e-4 else "<0.01%"


def heading(shown: ShownSegment) -> str:
    """What is shown, in one line."""
    segment = shown.segment
    facts = [f"row {shown.row}", f"shard {shown.shard}"]
    if segment is not None:
        facts += [f"domain {visible(segment.domain)}", f"split {visible(segment.split)}"]
    bpb = "no label known" if shown.bpb is None else f"{shown.bpb:.3f} bits per byte"
    return (
        f"{visible(shown.store)}, segment {visible(shown.title)} ({', '.join(facts)}): "
        f"{shown.num_bytes} bytes, {len(shown.positions)} positions, {bpb}"
    )


def segment_text(shown: ShownSegment, columns: int) -> str:
    """The segment as a table of `columns` columns, one position after the other."""
    tokens = [quoted(position.data) for position in shown.positions]
    token_columns = min(max(map(width, [*tokens, "token"])), _TOKEN_COLUMNS)
    head = f"{'':>5} {padded('token', token_columns)} {'nats':>8} {'prob':>7} {'tail':>6}"
    if shown.kind == "aligned":
        head += f" {'origin':<8}"
    room = max(columns - width(head) - len(_GAP), 24)
    lines = [heading(shown), "", f"{head}{_GAP}most probable, * the one that stands there"]
    for position, token in zip(shown.positions, tokens, strict=True):
        label = position.logprob
        known = f"{'-':>8} {'-':>7}" if label is None else f"{label:>8.3f} {share(label):>7}"
        line = f"{position.index:>5} {padded(token, token_columns)} {known}"
        line += f" {position.tail_mass:>6.3f}"
        if position.origin is not None:
            line += f" {position.origin.name.lower():<8}"
        best = _wrapped(position, room)
        lines.append(f"{line}{_GAP}{best[0]}")
        lines += [f"{'':<{width(head)}}{_GAP}{more}" for more in best[1:]]
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(position: Position, room: int) -> list[str]:
    """The most probable tokens in lines of at most `room` columns."""
    if not position.best:
        return ["nothing known"]
    lines: list[str] = []
    for item in position.best:
        mark = "*" if item.token_id == position.token_id else ""
        text = f"{mark}{cut(quoted(item.spelt), room - 8)} {share(item.logprob)}"
        if lines and width(lines[-1]) + len(_GAP) + width(text) <= room:
            lines[-1] += _GAP + text
        else:
            lines.append(text)
    return lines


def list_text(listed: list[Listed], columns: int) -> str:
    """Segments to choose from, one a line."""
    lines = ["first segments; give --segment one of these ids or rows:"]
    for item in listed:
        name, domain = "", ""
        if item.segment is not None:
            name, domain = visible(item.segment.segment_id), visible(item.segment.domain)
        begun = f"{item.row:>7}  {padded(name, 28)} {padded(domain, 12)} {len(item.text):>7} B  "
        lines.append(begun + cut(visible(item.text[:400]), max(columns - width(begun), 20)))
    return "\n".join(lines)
