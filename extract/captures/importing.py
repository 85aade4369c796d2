"""Fills a source store from a capture, shard by shard, in place of running the model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from extract.captures.columns import Entries
from extract.captures.files import Capture, Piece, Wanted
from extract.captures.matching import Index, fingerprint_of
from extract.config import ExtractSection
from extract.engines.protocol import DenseRows
from extract.scoring.rows import ScoredSegment, scored_segment, unscored_segment
from extract.scoring.score import UNSCORED, shard_arrays, shard_stats
from extract.scoring.sources import require_planned
from launch.progress import Progress
from launch.signals import StopFlag
from launch.work import Part
from launch.worklog import WorkLog
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import ConfigError, CorruptionError, MismatchError
from store_schema.layout import Arrays
from store_schema.manifest import Manifest
from store_schema.model.class_config import model_rows
from store_schema.plan.plan import Segment, ShardRecord
from store_schema.plan.run_plan import open_plan
from store_schema.presets import StoreSection
from store_schema.store.planned_store import PlannedStore
from store_schema.store.same_source import source_identity
from store_schema.text.encoded import EncodedSegment
from store_schema.text.tokenizer import SegmentTokenizer

ENGINE = "distillkit"
"""In the manifest's settings, in place of the engine that ran the model."""
KNOWN_LABELS, RESCALED = "known_labels", "rescaled"
"""Figures of a shard: positions whose label is an entry; positions whose entries were above 1."""
SPARE_IDS = 1024
"""Ids that a capture's vocabulary may have beyond the tokenizer's and the model's rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedCapture(PlannedStore):
    """A source store to be filled from a capture, after all checks that need no row of it.

    Args:
        name: Name of the source.
        capture: The capture.
        records_missing: Whether segments that it lacks are kept without a distribution.
    """

    name: str
    capture: Capture
    records_missing: bool


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did, or would do.

    Args:
        shards: Shards that were pending.
        segments: Their segments that have tokens.
        missing: Of these, those that the capture lacks.
        positions: Positions that were written.
        known_labels: Positions of them whose label's probability is known.
        rescaled: Positions of them whose entries were above 1 in sum.
    """

    shards: int
    segments: int
    missing: int
    positions: int = 0
    known_labels: int = 0
    rescaled: int = 0


def check_capture(run: RunConfig, name: str, capture: Capture) -> CheckedCapture:
    """Check a capture against the run file and the plan. Writes nothing.

    Raises:
        MismatchError: Another tokenizer than the plan's, or than the capture's.
        ConfigError: The run file asks for what a capture does not have.
    """
    section = run.section("extract", ExtractSection)
    for wrong, key in ((section.branches, "branches"), (section.estimator != "topk", "estimator")):
        if wrong:
            raise ConfigError(
                "a capture has the most probable entries alone", where=f"extract.{key}",
                hint="leave the option out in a run file for this source",
            )  # fmt: skip
    plan, ref = open_plan(run), run.sources[name]
    tokenizer = SegmentTokenizer.load(ref, name=name)
    require_planned(plan, name, ref, tokenizer)
    params = capture.params
    if params is not None:
        most = max(tokenizer.vocab_size, model_rows(ref) or 0) + SPARE_IDS
        if not tokenizer.vocab_size - 1 <= params.d <= most:
            raise MismatchError(
                "the capture is of another vocabulary",
                where=capture.path,
                expected=f"{tokenizer.vocab_size} ids of {ref.model}, or some more",
                got=f"{params.d} in its compression parameters",
                hint="name the model that was captured as the source",
            )
    described = {} if params is None else params.model_dump(mode="json")
    manifest = Manifest(
        kind="source",
        source=name,
        # Which weights made the capture is not known, so none are named.
        model=source_identity(ref, tokenizer, folder=None),
        corpus_fingerprint=plan.record.corpus_fingerprint,
        plan_fingerprint=plan.fingerprint,
        num_shards=len(plan.shards),
        top_k=params.k if params is not None else section.top_k,
        encoding=run.section("store", StoreSection).encoding(),
        settings={
            "engine": ENGINE,
            "capture": capture.fingerprint(),
            "format": capture.form,
            "compression": described,
        },
        vocabulary_fingerprint=tokenizer.vocabulary.fingerprint,
    )
    return CheckedCapture(
        run=run,
        plan=plan,
        tokenizer=tokenizer,
        manifest=manifest,
        location=open_location(run.store_url(name)),
        name=name,
        capture=capture,
        records_missing=section.on_bad == "record",
    )


def import_capture(
    checked: CheckedCapture, part: Part, stop: StopFlag, *, dry: bool = False
) -> Imported:
    """Write the pending shards of a source store from its capture.

    Args:
        checked: Store and capture.
        part: Which of the shards.
        stop: Checked between shards.
        dry: Only look for the segments; writes nothing.

    Raises:
        MismatchError: Segments are not in the capture (unless `extract.on_bad: record`), or the store
            was made from something else.
        CorruptionError: The capture is damaged.
        Stopped: Asked to stop; committed shards stay.
    """
    shards = checked.plan.shards
    committed = checked.committed() if dry else checked.open_store().committed(shards)
    pending = part.pending(shards, committed)
    if not pending:
        return Imported(0, 0, 0)
    segments, texts = _texts(checked, pending)
    index = Index(np.unique(texts))
    _find(checked.capture, index, stop)
    missing = index.missing()
    if missing and not checked.records_missing:
        raise _not_there(checked, pending, index, segments)
    if dry:
        return Imported(len(pending), segments, missing)
    return _write(checked, part, pending, index, stop)


def _encoded(
    checked: CheckedCapture, shard: ShardRecord
) -> Iterator[tuple[Segment, EncodedSegment, int | None]]:
    """Segments of a shard, as tokens, with the fingerprint of their input; None without tokens."""
    segments = checked.plan.segments(shard)
    for segment, part in zip(segments, checked.tokenizer.encode(segments), strict=True):
        text = fingerprint_of(part.input_ids) if len(part.token_ids) else None
        yield segment, part, text


def _texts(checked: CheckedCapture, pending: Sequence[ShardRecord]) -> tuple[int, np.ndarray]:
    """Number of segments with tokens, and the fingerprints of their inputs."""
    texts = [text for shard in pending for *_, text in _encoded(checked, shard) if text is not None]
    return len(texts), np.array(texts, np.uint64)


def _find(capture: Capture, index: Index, stop: StopFlag) -> None:
    with Progress("find the segments", capture.num_rows(), unit="row") as progress:
        for batch in capture.tokens():
            stop.check()
            index.add(batch)
            progress.add(len(batch.row_offsets) - 1)


def _not_there(
    checked: CheckedCapture, pending: Sequence[ShardRecord], index: Index, segments: int
) -> MismatchError:
    lost = [
        segment.segment_id
        for shard in pending
        for segment, _, text in _encoded(checked, shard)
        if text is not None and index.place(text) is None
    ]
    return MismatchError(
        f"{len(lost):,} of {segments:,} segments are not in the capture",
        where=checked.capture.path,
        expected="for each segment a text that begins with its tokens, context and BOS too",
        got=f"none for {', '.join(lost[:3])}{' and others' if lost[3:] else ''}",
        hint="plan the documents that were captured, whole (`plan.max_tokens`), with the same chat "
        "template; or keep such segments without a distribution with `extract.on_bad: record`",
    )


def _write(
    checked: CheckedCapture,
    part: Part,
    pending: Sequence[ShardRecord],
    index: Index,
    stop: StopFlag,
) -> Imported:
    """Read, convert and commit the shards."""
    writer, name = checked.open_store(), checked.name
    total = sum(shard.num_tokens[name] for shard in pending)
    sums: defaultdict[str, float] = defaultdict(float)
    log = WorkLog(checked.run, "extract", name, part.worker)
    with log.session(pending, name) as session, Progress(name, total, unit="tok") as progress:
        for shard in pending:
            stop.check()
            session.begun(shard.index)
            begun = time.monotonic()
            arrays, stats = _shard(checked, shard, index, begun)
            commit = writer.write(shard, arrays, stats)
            stop.progressed = True
            session.shard(
                shard.index,
                tokens=commit.counts.positions,
                seconds=stats["seconds"],
                size_bytes=sum(file.size for file in commit.files.values()),
            )
            for key in ("segments", UNSCORED, KNOWN_LABELS, RESCALED, "positions"):
                sums[key] += stats.get(key, 0.0)
            progress.add(shard.num_tokens[name])
    return Imported(
        len(pending),
        int(sums["segments"]),
        int(sums[UNSCORED]),
        int(sums["positions"]),
        int(sums[KNOWN_LABELS]),
        int(sums[RESCALED]),
    )


def _shard(
    checked: CheckedCapture, shard: ShardRecord, index: Index, begun: float
) -> tuple[Arrays, dict[str, float]]:
    """Arrays and figures of one shard."""
    parts = list(_encoded(checked, shard))
    scored = [unscored_segment(len(part.token_ids)) for _, part, _ in parts]
    groups: defaultdict[tuple[int, int], list[Wanted]] = defaultdict(list)
    missing = 0
    for key, (_, part, text) in enumerate(parts):
        place = None if text is None else index.place(text)
        missing += text is not None and place is None
        if place is not None:
            before, length = len(part.context_ids), len(part.input_ids)
            groups[place.file, place.group].append(
                Wanted(key, place.row, place.start, length, max(before - 1, 0), length - 1)
            )
    rescaled = 0
    for (file, group), wanted in sorted(groups.items()):
        for piece in checked.capture.read(file, group, wanted):
            part = parts[piece.key][1]
            scored[piece.key] = _scored(piece, part, checked.tokenizer.vocab_size)
            rescaled += piece.entries.rescaled
    segments, encoded = [s for s, _, _ in parts], [p for _, p, _ in parts]
    arrays = shard_arrays(segments, encoded, scored)
    labels, seconds = arrays["label_logprobs"], time.monotonic() - begun
    figures = {
        "segments": float(sum(text is not None for *_, text in parts)),
        "positions": float(len(labels)),
        KNOWN_LABELS: float((~np.isnan(labels)).sum()),
        RESCALED: float(rescaled),
        **({UNSCORED: float(missing)} if missing else {}),
    }
    return arrays, shard_stats(segments, encoded, scored, seconds) | figures


def _scored(piece: Piece, part: EncodedSegment, vocab_size: int) -> ScoredSegment:
    """Rows of a segment as the store keeps them; a label that is no entry is not known."""
    if piece.token_ids.tolist() != part.input_ids:
        raise CorruptionError("other tokens than when it was searched", where=piece.where)
    entries: Entries = piece.entries
    logprobs = entries.logprobs.astype(np.float32)
    labels = part.token_ids[len(part.token_ids) - len(logprobs) :].astype(np.int64)
    is_label = (entries.ids == labels[:, None]) & (logprobs > -np.inf)
    dense = DenseRows(entries.ids, logprobs, np.zeros(len(logprobs), np.float32))
    made = scored_segment(dense, len(part.token_ids), vocab_size=vocab_size, where=piece.where)
    known = np.full(len(part.token_ids), np.nan, np.float32)
    found = np.where(is_label, logprobs, -np.inf).max(axis=1, initial=-np.inf)
    known[len(known) - len(found) :] = np.where(np.isfinite(found), found, np.nan)
    return replace(made, label_logprobs=known)


def import_lines(name: str, done: Imported, *, dry: bool) -> list[str]:
    """What an import did, for the user."""
    if not done.shards:
        return [f"import {name} complete, nothing to do"]
    there = done.segments - done.missing
    lines = [f"{name}: {there:,} of {done.segments:,} segments are in the capture"]
    if dry:
        return [f"{lines[0]}; {done.shards} shard(s) would be written"]
    lines.append(
        f"{done.shards} shard(s), {done.positions:,} positions written; the label's probability is "
        f"known at {done.known_labels / max(done.positions, 1):.1%} of them"
    )
    if done.rescaled:
        lines.append(f"{done.rescaled:,} positions had probabilities above 1 in sum, brought to 1")
    return lines
