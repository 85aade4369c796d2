"""`align view`: one segment in both tokenisations, with each source's stored and aligned rows."""

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
    """A common span: bytes between two offsets where a source and a target token end.

    Args:
        start: First byte.
        end: One past the last byte.
        source_nats: NLL of the source's tokens in it; None where one is not known.
        aligned_nats: NLL of the aligned labels in it; None where one is not known.
    """

    start: int
    end: int
    source_nats: float | None
    aligned_nats: float | None

    @property
    def excess_nats(self) -> float | None:
        """NLL that alignment adds; None where a side is not known."""
        if self.source_nats is None or self.aligned_nats is None:
            return None
        return self.aligned_nats - self.source_nats


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is shown.

    Args:
        written: Its bytes; of a special token its name.
        special: Whether it is a special token, which stands for no bytes.
    """

    written: bytes
    special: bool


@dataclass(frozen=True, slots=True)
class ViewedSource:
    """One segment's rows of one source, stored and aligned.

    Args:
        name: Name of the source.
        tokens: Rows of the source store, one for each source token.
        positions: Aligned rows, one for each target token.
        origins: Origin of each aligned row.
        span_of: Index of each position's span.
        spans: Common spans, in order.
        source_names: Every source token that occurs in a row, by id.
        target_names: Every target token that occurs in a row, by id.
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
        """Index of the source token that covers a byte; of the last token for a byte after the text;
        None where there are no tokens."""
        for index, row in enumerate(self.tokens):
            if row.end > byte:
                return index
        return len(self.tokens) - 1 if self.tokens else None

    def count(self, origin: Origin) -> int:
        """Number of positions of an origin."""
        return self.origins.count(origin)

    @property
    def common_bytes(self) -> int:
        """Bytes of the spans whose NLL is known on both sides."""
        return sum(s.end - s.start for s in self.spans if s.excess_nats is not None)

    @property
    def bpb(self) -> tuple[float, float] | None:
        """Bits per byte of the aligned labels and of the source's tokens, on `common_bytes`; None
        where there are none."""
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
        segment: The plan's segment.
        shard: Index of its shard.
        sources: At least one source's rows.
    """

    segment: Segment
    shard: int
    sources: tuple[ViewedSource, ...]


# ------------------------------------------------------------------------------- reading


def read_view(run: RunConfig, sources: Iterable[str], wanted: str, *, top: int) -> ViewedSegment:
    """Find a segment and read it from the source and aligned stores of some sources.

    Args:
        run: The run file.
        sources: Names of the sources.
        wanted: Segment id, or row of the plan's segment table.
        top: Entries of each row, at most.

    Raises:
        MissingError: No plan, no store, no such segment, or a shard that is not aligned yet.
        MismatchError: Plan and stores do not belong together.
        CorruptionError: A file that was read is damaged.
    """
    plan = open_plan(run)
    record, segment = find_segment(plan, wanted)
    viewed = [view_source(run, plan, record, segment, source, top=top) for source in sources]
    return ViewedSegment(segment, record.index, tuple(viewed))


def open_stores(run: RunConfig, plan: Plan, source: str) -> tuple[StoreReader, StoreReader]:
    """The source store and the aligned store of a source, checked to belong together.

    Raises:
        MissingError: One of them is not there (yet).
        MismatchError: A wrong kind, plan or setting, or aligned from another source store.
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
        MismatchError: It has another kind, plan or model, or other settings than the run file.
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
            hint=f"run `logitfuse align run --source {source}`, or choose other sources with --source",
        )
    sides = []
    for reader in (stored, aligned):
        reader.require_shards([record])
        arrays = reader.read(record.index)
        where = f"{reader.location.url}, shard {record.index}"
        at = place_of(arrays, segment.index, where)
        rows = rows_of(arrays, at, top=top)
        _require_whole(rows, segment, where)
        sides.append((arrays, at, rows))
    (_, _, tokens), (arrays, at, positions) = sides
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
    """The common spans of one segment with their NLL.

    Args:
        arrays: The aligned store's arrays of the shard.
        at: Index of the segment within the shard.
    """
    rows = slice(*map(int, arrays["token_offsets"][at : at + 2]))
    first, last = map(int, arrays["span_offsets"][at : at + 2])
    aligned = [0.0] * (last - first)
    with_tokens = set()
    pairs = zip(arrays["span_index"][rows].tolist(), arrays["label_logprobs"][rows], strict=True)
    for span, label in pairs:
        aligned[span] -= float(label)  # one unknown label makes the sum unknown (NaN)
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
    """Every token that occurs in some rows, by id."""
    ids = {row.token_id for row in rows} | {entry for row in rows for entry, _ in row.entries}
    names = {}
    for i in sorted(ids):
        known = i < len(vocabulary) and bool(vocabulary.written[i])
        names[i] = Token(vocabulary.spelling(i), not known or bool(vocabulary.special[i]))
    return names


def require_position(view: ViewedSegment, position: int) -> None:
    """Refuse a position that the segment does not have.

    Raises:
        ConfigError: It has no such position; the message has the range.
    """
    count = min(len(source.positions) for source in view.sources)
    if position >= count:
        raise ConfigError(
            "no such position",
            where="--position",
            expected=f"0 to {count - 1}" if count else "none, the segment has no tokens",
            got=position,
        )
