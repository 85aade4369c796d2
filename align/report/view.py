"""`align view`: one segment with both tokenisations, what a source said and what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from align.config import AlignSection
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import ConfigError, CorruptionError, MismatchError, MissingError
from store_schema.layout import Arrays, Kind, Origin
from store_schema.plan.find_segment import find_segment
from store_schema.plan.plan import Plan, Segment, ShardRecord
from store_schema.plan.run_plan import open_plan
from store_schema.store.guards import REPAIR
from store_schema.store.reader import StoreReader
from store_schema.store.same_source import require_same_source
from store_schema.store.segment_rows import Row, place_of, rows_of
from store_schema.text.vocabulary import Vocabulary

LN2 = math.log(2)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes between two offsets where tokens of both sides end.

    Args:
        start: First byte.
        end: One past the last byte.
        source_nats: What the source spends on its tokens there; None where not known.
        aligned_nats: What the aligned labels spend there; None where one is not known.
    """

    start: int
    end: int
    source_nats: float | None
    aligned_nats: float | None

    @property
    def excess_nats(self) -> float | None:
        """What alignment adds; None where a side is not known."""
        if self.source_nats is None or self.aligned_nats is None:
            return None
        return self.aligned_nats - self.source_nats


@dataclass(frozen=True, slots=True)
class Token:
    """How a token is written.

    Args:
        written: Its bytes; of a special token its name.
        special: Whether it stands for a role, not for bytes.
    """

    written: bytes
    special: bool


@dataclass(frozen=True, slots=True)
class ViewedSource:
    """One segment as a source read it and as it was aligned.

    Args:
        name: Of the source.
        tokens: The source's.
        positions: The target's.
        origins: Where the distribution of each position comes from.
        span_of: Span of each position.
        spans: In order.
        source_names: How the source's tokens that occur here are written, by id.
        target_names: The same of the target's.
    """

    name: str
    tokens: tuple[Row, ...]
    positions: tuple[Row, ...]
    origins: tuple[Origin, ...]
    span_of: tuple[int, ...]
    spans: tuple[Span, ...]
    source_names: Mapping[int, Token]
    target_names: Mapping[int, Token]

    def covering(self, byte: int) -> int | None:
        """The source token that covers a byte; the last one behind the text, None without any."""
        for index, row in enumerate(self.tokens):
            if row.end > byte:
                return index
        return len(self.tokens) - 1 if self.tokens else None

    def count(self, origin: Origin) -> int:
        """Positions of an origin."""
        return self.origins.count(origin)

    @property
    def common_bytes(self) -> int:
        """Bytes of the spans that both sides know."""
        return sum(s.end - s.start for s in self.spans if s.excess_nats is not None)

    @property
    def bpb(self) -> tuple[float, float] | None:
        """Bits per byte as aligned and of the source, on the bytes in common; None without any."""
        known = [s for s in self.spans if s.source_nats is not None and s.aligned_nats is not None]
        size = self.common_bytes * LN2
        if not size:
            return None
        aligned = sum(s.aligned_nats or 0.0 for s in known)
        return aligned / size, sum(s.source_nats or 0.0 for s in known) / size


@dataclass(frozen=True, slots=True)
class ViewedSegment:
    """What `align view` shows.

    Args:
        segment: From the plan.
        shard: Where it lies.
        sources: At least one.
    """

    segment: Segment
    shard: int
    sources: tuple[ViewedSource, ...]


# ------------------------------------------------------------------------------- reading


def read_view(run: RunConfig, sources: Iterable[str], wanted: str, *, top: int) -> ViewedSegment:
    """Find a segment and read it from the source and aligned stores of some sources.

    Args:
        run: The run file.
        sources: Names.
        wanted: Segment id, or row of the plan's segment table.
        top: Entries shown of each distribution.

    Raises:
        MissingError: No plan, no store, no such segment, or a shard that is not aligned yet.
        MismatchError: Plan and stores do not belong together.
        CorruptionError: Something that was read is damaged.
    """
    plan = open_plan(run)
    record, segment = find_segment(plan, wanted)
    viewed = [view_source(run, plan, record, segment, source, top=top) for source in sources]
    return ViewedSegment(segment, record.index, tuple(viewed))


def open_stores(run: RunConfig, plan: Plan, source: str) -> tuple[StoreReader, StoreReader]:
    """The source store and the aligned store of a source, proved to belong together.

    Raises:
        MissingError: One of them is not there (yet).
        MismatchError: Other kinds, another plan, other settings, or aligned from another source store.
    """
    stored = open_store(run.store_url(source), "source", plan)
    aligned = open_aligned(run, plan, source)
    made_from = aligned.manifest.settings.get("source_store")
    if made_from is not None and made_from != stored.manifest.fingerprint():
        raise MismatchError(
            "aligned from another source store",
            where=aligned.location.url,
            expected=f"store {stored.manifest.fingerprint()}",
            got=f"store {str(made_from)[:64]!r}",
            hint="align again under another run name, with `data_dir` the folder of the stores",
        )
    return stored, aligned


def open_aligned(run: RunConfig, plan: Plan, source: str) -> StoreReader:
    """The aligned store of a source.

    Raises:
        MissingError: There is none (yet).
        MismatchError: Of another kind, plan or model, or made with other settings than the run
            file's.
    """
    aligned = open_store(run.aligned_url(source), "aligned", plan)
    require_same_source(run, source, aligned, plan)
    asked, made = run.section("align", AlignSection).content(), aligned.manifest.settings
    other = [name for name in asked if name in made and made[name] != asked[name]]
    if other:
        raise MismatchError(
            "aligned with other settings than the run file's",
            where=aligned.location.url,
            expected=", ".join(f"align.{name} {asked[name]}" for name in other),
            got=", ".join(f"{name} {made[name]}" for name in other)[:200],
            hint="put the settings back, or align again under another run name, with `data_dir` the "
            "folder of the stores",
        )
    return aligned


def open_store(url: str, kind: Kind, plan: Plan) -> StoreReader:
    """A store of the plan.

    Raises:
        MissingError: There is none (yet).
        MismatchError: It is of another kind or of another plan.
    """
    reader = StoreReader.open(open_location(url))
    if reader.manifest.kind != kind:
        raise MismatchError(
            "store of another kind", where=url, expected=kind, got=reader.manifest.kind
        )
    reader.require_plan(plan)
    return reader


def view_source(
    run: RunConfig, plan: Plan, record: ShardRecord, segment: Segment, source: str, *, top: int
) -> ViewedSource:
    """One segment of one source; errors as in `read_view`."""
    stored, aligned = open_stores(run, plan, source)
    if record.index not in aligned.commits:
        raise MissingError(
            f"shard {record.index}, which holds the segment, is not aligned yet",
            where=aligned.location.url,
            hint=f"`logitfuse align run --source {source}` goes on with it; or choose other "
            "sources with --source",
        )
    found = []
    for reader in (stored, aligned):
        reader.require_shards([record])
        arrays = reader.read(record.index)
        where = f"{reader.location.url}, shard {record.index}"
        at = place_of(arrays, segment.index, where)
        rows = rows_of(arrays, at, top=top)
        _require_whole(rows, segment, where)
        found.append((arrays, at, rows))
    (_, _, tokens), (arrays, at, positions) = found
    begin, end = map(int, arrays["token_offsets"][at : at + 2])
    return ViewedSource(
        source,
        tokens,
        positions,
        tuple(map(Origin, arrays["origin"][begin:end].tolist())),
        tuple(arrays["span_index"][begin:end].tolist()),
        spans_of(arrays, at),
        names_of(tokens, stored.vocabulary),
        names_of(positions, aligned.vocabulary),
    )


def _require_whole(rows: Sequence[Row], segment: Segment, where: str) -> None:
    """Refuse tokens that do not end where the text ends."""
    size, end = len(segment.text.encode()), rows[-1].end if rows else 0
    if end != size:
        raise CorruptionError(
            "tokens do not end where the text ends",
            where=f"{where}, row {segment.index}, array byte_ends",
            expected=f"{size} bytes",
            got=end,
            hint=REPAIR,
        )


def spans_of(arrays: Arrays, at: int) -> tuple[Span, ...]:
    """The spans of one segment, with what either side spends on them."""
    rows = slice(*map(int, arrays["token_offsets"][at : at + 2]))
    first, last = map(int, arrays["span_offsets"][at : at + 2])
    aligned = [0.0] * (last - first)
    with_tokens = set()
    pairs = zip(arrays["span_index"][rows].tolist(), arrays["label_logprobs"][rows], strict=True)
    for span, label in pairs:
        aligned[span] -= float(label)  # unknown once, unknown ever: NaN
        with_tokens.add(span)
    spans, start = [], 0
    for span, i in enumerate(range(first, last)):
        end, own = int(arrays["span_byte_ends"][i]), -float(arrays["span_logprobs"][i])
        labels = aligned[span] if span in with_tokens else math.nan
        spans.append(Span(start, end, _known(own), _known(labels)))
        start = end
    return tuple(spans)


def _known(nats: float) -> float | None:
    return max(nats, 0.0) if math.isfinite(nats) else None


def names_of(rows: Sequence[Row], vocabulary: Vocabulary) -> dict[int, Token]:
    """How every token that occurs in some rows is written."""
    ids = {row.token_id for row in rows} | {entry for row in rows for entry, _ in row.entries}
    found = {}
    for i in sorted(ids):
        known = i < len(vocabulary) and bool(vocabulary.written[i])
        found[i] = Token(vocabulary.spelling(i), not known or bool(vocabulary.special[i]))
    return found


def require_position(view: ViewedSegment, position: int) -> None:
    """Refuse a position that the segment does not have.

    Raises:
        ConfigError: Names the range.
    """
    count = min(len(source.positions) for source in view.sources)
    if position >= count:
        raise ConfigError(
            "no such position",
            where="--position",
            expected=f"0 to {count - 1}" if count else "none, the segment has no tokens",
            got=position,
        )
