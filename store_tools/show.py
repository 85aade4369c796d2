"""`store show`: the tokens of one segment, each with the most probable tokens in its place."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from launch.visible import visible
from store_schema.errors import ConfigError, MissingError
from store_schema.layout import Arrays, Finish, Origin
from store_schema.plan.find_segment import find_segment, row_number
from store_schema.plan.plan import Plan, Segment
from store_schema.store.answers import TEXT_ARRAYS, StoredAnswer, read_answers
from store_schema.store.segment_rows import place_of, rows_of
from store_schema.text.vocabulary import Vocabulary
from store_tools.places import StorePlace, TolerantReader, planned_shard

LISTED = 20


@dataclass(frozen=True, slots=True)
class Expected:
    """One of the most probable tokens of a position.

    Args:
        token_id: In the store's vocabulary.
        written: Its bytes; of a special token its text.
        logprob: Nats.
    """

    token_id: int
    written: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Branch:
    """What the source would go on with after an entry that is not the text's own token.

    Args:
        written: The entry's bytes.
        tail_mass: Probability outside the branch's entries.
        best: The most probable tokens after it, best first.
    """

    written: bytes
    tail_mass: float
    best: tuple[Expected, ...]


@dataclass(frozen=True, slots=True)
class Position:
    """One token of the text.

    Args:
        index: Number within the segment.
        data: Its bytes in the text.
        token_id: In the store's vocabulary.
        logprob: Nats; None where it is not known, as in all of an answer.
        tail_mass: Probability outside the entries; 1 where nothing is known.
        best: The most probable tokens, best first.
        origin: Origin of the row, in an aligned store.
        name: Text of a token that has no bytes of the text, as of a special token; b"" for others.
        branches: Its branches, in a source store that has some.
    """

    index: int
    data: bytes
    token_id: int
    logprob: float | None = None
    tail_mass: float = 1.0
    best: tuple[Expected, ...] = ()
    origin: Origin | None = None
    name: bytes = b""
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """Further facts of an answer in a generated store.

    Args:
        number: Number of the answer, from 0.
        count: Number of answers to the prompt.
        finish: How it ended.
        prompt: (role, text) of the turns before it; () without a plan.
    """

    number: int
    count: int
    finish: Finish
    prompt: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ShownSegment:
    """One segment of a store, or in a generated store one answer to its prompt.

    Args:
        store: The store's name in messages.
        kind: Kind of the store.
        source: Name of the source.
        row: Row in the plan's segment table.
        shard: Index of its shard.
        segment: From the plan; None without one.
        positions: Its tokens.
        answer: Facts of the answer, in a generated store.
    """

    store: str
    kind: str
    source: str
    row: int
    shard: int
    segment: Segment | None
    positions: tuple[Position, ...]
    answer: ShownAnswer | None = None

    @property
    def title(self) -> str:
        """Its id, or its row if the plan is not known, and the answer's number."""
        name = f"row {self.row}" if self.segment is None else self.segment.segment_id
        return name if self.answer is None else f"{name}, answer {self.answer.number}"

    @property
    def num_bytes(self) -> int:
        """Bytes of the text."""
        return sum(len(position.data) for position in self.positions)

    @property
    def bpb(self) -> float | None:
        """Bits per byte of the labels with a known log-probability; None if there is none."""
        known = [(p.logprob, len(p.data)) for p in self.positions if p.logprob is not None]
        size = sum(length for _, length in known)
        return -sum(nats for nats, _ in known) / math.log(2) / size if size else None

    @property
    def kept_mass(self) -> float | None:
        """Mean mass in entries, of positions that have entries; None if there is none."""
        kept = [1 - position.tail_mass for position in self.positions if position.best]
        return sum(kept) / len(kept) if kept else None


@dataclass(frozen=True, slots=True)
class Listed:
    """A segment in a list to choose from.

    Args:
        row: Row in the plan's segment table.
        segment: From the plan; None without one.
        text: Its bytes, or those of the answer.
        answer: The answer, in a generated store.
    """

    row: int
    segment: Segment | None
    text: bytes
    answer: StoredAnswer | None = None


# ------------------------------------------------------------------------------- reading


def read_segment(
    place: StorePlace, wanted: str, *, top: int, answer: int | None = None
) -> ShownSegment:
    """Read a segment of a store.

    Args:
        place: The store.
        wanted: Segment id, or row of the plan's segment table.
        top: Number of most probable tokens of each position.
        answer: In a generated store, which answer to the segment's prompt; None takes the first.

    Raises:
        MissingError: The plan or the store has no such segment or answer.
        ConfigError: An id is given and there is no plan, or an answer and the store has none.
        CorruptionError: The shard is damaged.
    """
    reader, plan = place.open(), place.plan()
    manifest = reader.manifest
    if answer is not None and manifest.kind != "generated":
        raise ConfigError(
            "only generated stores have answers", where="--answer", got=f"a {manifest.kind} store"
        )
    shard, row, segment = _located(place, reader, plan, wanted)
    arrays = reader.read(shard)
    shown, text = None, None if segment is None else segment.text.encode()
    if manifest.kind == "generated":
        at, stored, count = _answer_of(arrays, row, answer or 0, reader)
        prompt = () if segment is None else prompt_turns(segment.context)
        shown, text = ShownAnswer(stored.number, count, stored.finish, prompt), stored.text
    else:
        at = place_of(arrays, row, f"{reader.location.url}, shard {shard}")
    positions = positions_of(arrays, at, text, reader.vocabulary, top=top)
    return ShownSegment(
        place.name, manifest.kind, manifest.source, row, shard, segment, positions, shown
    )


def _located(
    place: StorePlace, reader: TolerantReader, plan: Plan | None, wanted: str
) -> tuple[int, int, Segment | None]:
    """Shard and row of a segment, and the segment if the plan is known."""
    if plan is None:
        row = row_number(wanted)
        if row is None:
            raise ConfigError(
                "no plan to find a segment's id in",
                where="--segment",
                got=visible(wanted),
                hint="give its row number, or --plan",
            )
        return _shard_of_row(reader, row), row, None
    reader.require_plan(plan)
    record, segment = find_segment(plan, wanted)
    if record.index not in reader.commits:
        raise MissingError(
            f"shard {record.index}, which holds the segment, is not committed",
            where=reader.location.url,
            hint=f"`{place.rerun(reader.manifest.kind, reader.manifest.source)}` writes it",
        )
    reader.require_shards([record])
    return record.index, segment.index, segment


def _answer_of(
    arrays: Arrays, row: int, number: int, reader: TolerantReader
) -> tuple[int, StoredAnswer, int]:
    """Index of an answer on the axis D, the answer, and the number of answers to its prompt."""
    answers = [
        (at, a) for at, a in enumerate(read_answers(arrays, reader.vocabulary)) if a.row == row
    ]
    for at, answer in answers:
        if answer.number == number:
            return at, answer, len(answers)
    raise MissingError(
        f"no answer {number}"
        if answers
        else "no answers: the segment does not begin with a prompt",
        where=f"{reader.location.url}, row {row}",
        expected=f"one of {len(answers)}, counted from 0" if answers else None,
        hint=None if answers else "without --segment the command lists the first answers",
    )


def prompt_turns(context: str | None) -> tuple[tuple[str, str], ...]:
    """(role, text) of the turns in a segment's context; the context as it is if it is no known JSON."""
    if context is None:
        return ()
    try:
        content = json.loads(context)
        if "prompt" in content:
            return (("prompt", str(content["prompt"])),)
        return tuple((str(turn["role"]), str(turn["content"])) for turn in content["messages"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return (("context", context),)


def positions_of(
    arrays: Arrays, at: int, text: bytes | None, vocabulary: Vocabulary, *, top: int
) -> tuple[Position, ...]:
    """The tokens of one segment or answer.

    Args:
        arrays: Arrays of its shard.
        at: Its index on the axis D.
        text: Its bytes; None takes them from the tokens.
        vocabulary: The store's vocabulary.
        top: Number of most probable tokens of each position.
    """
    spelling = vocabulary.spelling
    start, stop = map(int, arrays["token_offsets"][at : at + 2])
    if "finish" in arrays:
        positions, begin = [], 0
        for i, token in enumerate(arrays["token_ids"][start:stop].tolist()):
            end = int(arrays["byte_ends"][start + i])
            data = spelling(token) if text is None else text[begin:end]
            positions.append(Position(i, data, token, name=spelling(token) * (end == begin)))
            begin = end
        return tuple(positions)
    origins: list[Origin | None] = [None] * (stop - start)
    if "origin" in arrays:
        origins = [Origin(number) for number in arrays["origin"][start:stop].tolist()]
    branches = _branches(arrays, start, stop, vocabulary, top)
    return tuple(
        Position(
            i,
            spelling(row.token_id) if text is None else text[row.start : row.end],
            row.token_id,
            row.logprob,
            row.tail_mass,
            tuple(Expected(e, spelling(e), logprob) for e, logprob in row.entries),
            origin,
            branches=tuple(branches[i]),
        )
        for i, (row, origin) in enumerate(zip(rows_of(arrays, at, top=top), origins, strict=True))
    )


def _branches(
    arrays: Arrays, start: int, stop: int, vocabulary: Vocabulary, top: int
) -> list[list[Branch]]:
    """The branches of each position from `start` to `stop`."""
    found: list[list[Branch]] = [[] for _ in range(start, stop)]
    if "branch_tokens" not in arrays:
        return found
    spelling, offsets = vocabulary.spelling, arrays["branch_entry_offsets"]
    for b in range(*np.searchsorted(arrays["branch_positions"], [start, stop]).tolist()):
        entries = slice(int(offsets[b]), min(int(offsets[b + 1]), int(offsets[b]) + top))
        ids = arrays["branch_entry_ids"][entries].tolist()
        logprobs = arrays["branch_entry_logprobs"][entries].tolist()
        best = tuple(Expected(e, spelling(e), p) for e, p in zip(ids, logprobs, strict=True))
        written = spelling(int(arrays["branch_tokens"][b]))
        branch = Branch(written, float(arrays["branch_tail_mass"][b]), best)
        found[int(arrays["branch_positions"][b]) - start].append(branch)
    return found


def list_segments(place: StorePlace, count: int = LISTED) -> list[Listed]:
    """The first segments or answers of a store's first shards, to choose from."""
    reader, plan = place.open(), place.plan()
    if plan is not None:
        reader.require_plan(plan)
    listed: list[Listed] = []
    for shard in sorted(reader.commits):
        segments: list[Segment] = []
        if plan is not None:
            segments = plan.segments(planned_shard(plan, shard, reader.location.url))
        if reader.manifest.kind == "generated":
            by_row = {segment.index: segment for segment in segments}
            answers = read_answers(reader.read(shard, TEXT_ARRAYS), reader.vocabulary)
            listed += [Listed(a.row, by_row.get(a.row), a.text, a) for a in answers]
        elif plan is not None:
            listed += [Listed(s.index, s, s.text.encode()) for s in segments]
        else:
            listed += _listed_without_plan(reader, shard, count)
        if len(listed) >= count:
            break
    return listed[:count]


def _listed_without_plan(reader: TolerantReader, shard: int, count: int) -> list[Listed]:
    arrays = reader.read(shard, ("segment_ids", "token_offsets", "token_ids"))
    rows, offsets = arrays["segment_ids"][:count], arrays["token_offsets"]
    ids = arrays["token_ids"].tolist()
    return [
        Listed(int(row), None, b"".join(reader.vocabulary.spelling(i) for i in ids[start:stop]))
        for row, start, stop in zip(rows, offsets, offsets[1:], strict=False)
    ]


def _shard_of_row(reader: TolerantReader, row: int) -> int:
    for shard in sorted(reader.commits):
        if row in reader.read(shard, ("segment_ids",))["segment_ids"]:
            return shard
    raise MissingError("no such segment", where=reader.location.url, got=f"row {row}")
