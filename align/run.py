"""The align stage: every source store of a run into the target's tokens, shard by shard."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from align.config import AlignSection
from align.continuation import PairCounts, first_tokens
from align.first_token import piece_table
from align.project import VocabularyMap, copy_exact, join_segments, project, statistics
from launch.progress import Progress
from launch.quantities import size_text
from launch.signals import StopFlag
from launch.work import Part, work_line
from launch.worklog import Session, WorkLog
from store_schema import SCHEMA_VERSION
from store_schema.config import RunConfig
from store_schema.errors import MismatchError
from store_schema.frequency import token_counts
from store_schema.layout import Arrays
from store_schema.location import Location, open_location
from store_schema.manifest import Commit, Manifest, ModelIdentity
from store_schema.plan import Plan, ShardRecord
from store_schema.presets import Encoding, StoreSection
from store_schema.reader import MANIFEST_FILE, StoreReader
from store_schema.selection import select_entries
from store_schema.tokenizer import EncodedSegment, SegmentTokenizer
from store_schema.writer import StoreWriter


@dataclass(frozen=True, slots=True)
class AlignSummary:
    """What one source's alignment amounts to over its committed shards.

    Args:
        source: Name.
        commits: All commits of the aligned store.
        done: Shards aligned by this run.
        seconds: Of this run.
    """

    source: str
    commits: tuple[Commit, ...]
    done: int
    seconds: float

    def total(self, name: str) -> float:
        """Sum of one statistic over the commits."""
        return sum(commit.stats.get(name, 0.0) for commit in self.commits)

    @property
    def coverage(self) -> float:
        """Share of the target's positions that have a distribution."""
        return 1.0 - self.total("origin_none") / max(self.total("positions"), 1.0)


@dataclass(frozen=True, slots=True)
class CheckedAlignment:
    """One source's alignment as far as can be told before any shard is read.

    Args:
        run: The run file.
        source: Name of the source.
        plan: Its shards are the units of work.
        reader: Of the source store.
        target: The target's tokenizer.
        section: How to align.
        manifest: Of the aligned store.
    """

    run: RunConfig
    source: str
    plan: Plan
    reader: StoreReader
    target: SegmentTokenizer
    section: AlignSection
    manifest: Manifest

    @property
    def location(self) -> Location:
        """Where the aligned store lies."""
        return open_location(self.run.aligned_url(self.source))

    def open_store(self) -> StoreWriter:
        """Create the aligned store, or go on with it.

        Raises:
            MismatchError: The store there was made from something else.
        """
        return StoreWriter.open(
            self.location,
            self.manifest,
            self.target.vocabulary,
            config=self.run.resolved(),
            count_tokens=lambda: token_counts(self.plan, self.target),
        )


def check_alignment(run: RunConfig, source: str) -> CheckedAlignment:
    """Open and check what one source's alignment is made from. Writes nothing.

    Raises:
        MissingError: The plan or the source store is not there.
        MismatchError: Plan, store, tokenizer or method do not belong together.
    """
    section = run.section("align", AlignSection)
    plan = Plan.open(open_location(f"{run.data_folder}/plan"))
    reader = StoreReader.open(open_location(run.store_url(source)))
    reader.require_plan(plan)
    target = SegmentTokenizer.load(run.target, name="target")
    require_tokenizer(plan, target)
    manifest = aligned_manifest(reader, len(plan.shards), target, run, section)
    return CheckedAlignment(run, source, plan, reader, target, section, manifest)


def align_source(run: RunConfig, source: str, part: Part, stop: StopFlag) -> AlignSummary:
    """Align what is pending of one source.

    Args:
        run: The run file.
        source: Name of the source.
        part: Which shards are ours.
        stop: Asked between shards.

    Raises:
        MissingError: The plan or the source store is not there, or not complete.
        MismatchError: Plan, store, tokenizer or settings changed since.
        Stopped: On a signal; committed shards stay.
    """
    started = time.monotonic()
    checked = check_alignment(run, source)
    writer = checked.open_store()
    pending = part.pending(checked.plan.shards, writer.committed())
    if pending:
        with WorkLog(run, "align", source, part.worker).session(pending, "target") as log:
            align_shards(checked, writer, pending, stop, log)
    commits = StoreReader.open(writer.location).commits
    return AlignSummary(
        source,
        tuple(commits[index] for index in sorted(commits)),
        len(pending),
        time.monotonic() - started,
    )


def dry_run(run: RunConfig, source: str, part: Part) -> str:
    """Check what can be checked without reading a shard, and say what would be done.

    Writes nothing.

    Raises:
        MissingError: The plan or a shard of the source store is not there.
        MismatchError: Plan, store, tokenizer or settings changed since.
    """
    checked = check_alignment(run, source)
    location = checked.location
    committed: set[int] = set()
    if location.exists(MANIFEST_FILE) and StoreReader.open(location).commits:
        committed = checked.open_store().committed()  # creates nothing where there are commits
    pending = part.pending(checked.plan.shards, committed)
    checked.reader.require_shards(pending)
    return work_line(f"align {source}", pending, "target")


def align_shards(
    checked: CheckedAlignment,
    writer: StoreWriter,
    pending: list[ShardRecord],
    stop: StopFlag,
    log: Session,
) -> None:
    """Align and commit shards, one after the other."""
    checked.reader.require_shards(pending)
    mapping = None
    if checked.section.method == "bytes":
        mapping = vocabulary_map(checked.reader, checked.plan, checked.target, checked.section)
    total, written = sum(shard.num_tokens["target"] for shard in pending), 0
    with Progress(f"align {checked.source}", total, unit="tok") as progress:
        for shard in pending:
            stop.check()
            begun = time.monotonic()
            arrays, figures = align_shard(checked, shard, mapping, writer.encoding)
            commit = writer.write(shard, arrays, figures)
            stop.progressed = True
            size_bytes = sum(file.size for file in commit.files.values())
            written += size_bytes
            log.shard(
                shard.index,
                tokens=commit.counts.positions,
                seconds=time.monotonic() - begun,
                size_bytes=size_bytes,
            )
            progress.add(shard.num_tokens["target"], f"{size_text(written)} written")


def require_tokenizer(plan: Plan, target: SegmentTokenizer) -> None:
    """Refuse a target whose tokenizer is not the one the plan was cut for."""
    planned = plan.record.tokenizers["target"]
    if target.fingerprint != planned:
        raise MismatchError(
            "the target's tokenizer is not the plan's",
            where=plan.location.url,
            expected=f"tokenizer {planned}",
            got=f"tokenizer {target.fingerprint}",
            hint="plan again under another run name",
        )


def aligned_manifest(
    reader: StoreReader,
    num_shards: int,
    target: SegmentTokenizer,
    run: RunConfig,
    section: AlignSection,
) -> Manifest:
    """Manifest of the aligned store: the source's identity, the target's, the method.

    Raises:
        MismatchError: Method `exact` between two vocabularies.
    """
    source = reader.manifest
    if section.method == "exact" and source.vocabulary_fingerprint != target.vocabulary.fingerprint:
        raise MismatchError(
            "method exact needs one vocabulary",
            where=reader.location.url,
            expected=f"vocabulary {target.vocabulary.fingerprint}",
            got=f"vocabulary {source.vocabulary_fingerprint}",
            hint="set align.method to bytes",
        )
    identity = ModelIdentity(
        name=run.target.model,
        model_fingerprint=None,
        tokenizer_fingerprint=target.fingerprint,
        vocab_size=target.vocab_size,
    )
    return source.model_copy(
        update={
            "kind": "aligned",
            "target": identity,
            "extras": (),
            "top_k": source.top_k if section.method == "exact" else section.max_entries,
            "settings": section.content() | {"source_store": source.fingerprint()},
            "encoding": run.section("store", StoreSection).encoding(source.estimator),
            "num_shards": num_shards,
            "schema_version": SCHEMA_VERSION,  # the source store may be older
            "top_p": None,
            "logprob_codec": None,
            "vocabulary_fingerprint": target.vocabulary.fingerprint,
        }
    )


def vocabulary_map(
    reader: StoreReader, plan: Plan, target: SegmentTokenizer, section: AlignSection
) -> VocabularyMap:
    """Build the map, counting continuations on the first split (training text) if asked to.

    The same plan and store give the same map in every worker: only shards of the plan's order enter,
    whatever is committed.
    """
    pieces = piece_table(reader.vocabulary, target)
    counts = PairCounts(len(reader.vocabulary), target.vocab_size)
    if section.continuation == "statistics":
        left = section.statistics_tokens
        for shard in counted_shards(plan):
            if left <= 0:
                break
            left -= shard.num_tokens["target"]
            count_shard(counts, reader, plan, shard, target)
    continuation = counts.continuation(first_tokens(pieces), section.continuation_prior)
    return VocabularyMap(pieces, continuation, target.vocab_size)


def counted_shards(plan: Plan) -> tuple[ShardRecord, ...]:
    """Shards whose text may be counted: the split "train", or the plan's first where there is none.

    Held-out text stays out, so that what is measured on it was not learnt from it.
    """
    splits = plan.splits()
    return splits.get("train", next(iter(splits.values()), ()))


def count_shard(
    counts: PairCounts,
    reader: StoreReader,
    plan: Plan,
    shard: ShardRecord,
    target: SegmentTokenizer,
) -> None:
    """Add one shard to the counts."""
    reader.require_shards([shard])
    arrays = reader.read(shard.index, ["token_offsets", "token_ids", "byte_ends"])
    offsets = arrays["token_offsets"]
    ends = arrays["byte_ends"].astype(np.int64)
    for d, segment in enumerate(target.encode(plan.segments(shard))):
        rows = slice(offsets[d], offsets[d + 1])
        counts.add(
            arrays["token_ids"][rows],
            ends[rows],
            segment.token_ids,
            segment.byte_ends.astype(np.int64),
        )
    counts.merge()


def align_shard(
    checked: CheckedAlignment,
    shard: ShardRecord,
    mapping: VocabularyMap | None,
    encoding: Encoding,
) -> tuple[Arrays, dict[str, float]]:
    """Aligned arrays of one shard and the statistics of what `encoding` keeps of them.

    `mapping` None means method `exact`.
    """
    reader = checked.reader
    source = reader.read(shard.index)
    segments = checked.plan.segments(shard)
    encoded = checked.target.encode(segments)
    if mapping is None:
        require_same_tokens(source, encoded, where=f"{reader.location.url}, shard {shard.index}")
        arrays = copy_exact(source, encoded)
    else:
        texts = [segment.text.encode() for segment in segments]
        max_entries = checked.section.max_entries
        arrays = project(source, texts, encoded, mapping, max_entries=max_entries)
    arrays = select_entries(arrays, encoding)
    return arrays, statistics(arrays, source)


def require_same_tokens(source: Arrays, target: list[EncodedSegment], *, where: str) -> None:
    """Refuse `exact` where the two tokenizers share a table but split a text differently."""
    ids, _, offsets = join_segments(target)
    if np.array_equal(ids, source["token_ids"]) and np.array_equal(
        offsets, source["token_offsets"]
    ):
        return
    raise MismatchError(
        "source and target tokenise differently",
        where=where,
        expected=f"{len(source['token_ids'])} tokens, the source's",
        got=f"{len(ids)} tokens, some of them others",
        hint="set align.method to bytes",
    )
