"""All checks of one source's alignment that need no shard, made before any work."""

from __future__ import annotations

from dataclasses import dataclass

from align.config import AlignSection
from align.counts.counted_text import counts_text, planned_count, text_fingerprint
from align.methods import METHODS
from launch.progress import Progress
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.manifest import Manifest
from store_schema.model.models import model_positions
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from store_schema.presets import StoreSection
from store_schema.store.aligned_place import aligned_store_url
from store_schema.store.planned_store import PlannedStore
from store_schema.store.reader import StoreReader
from store_schema.store.same_source import require_same_source, source_identity
from store_schema.text.plan_tokens import plan_for
from store_schema.text.tokenizer import SegmentTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedAlignment(PlannedStore):
    """One source's alignment: plan, target's tokenizer and both stores, checked against each other.

    Args:
        source: Name of the source.
        reader: Reader of the source store.
        section: Section `align` of the run file.
    """

    source: str
    reader: StoreReader
    section: AlignSection

    @property
    def target(self) -> SegmentTokenizer:
        """The target's tokenizer, which is the aligned store's."""
        return self.tokenizer


def check_alignment(run: RunConfig, source: str, *, keep: bool = True) -> CheckedAlignment:
    """Open and check all inputs of one source's alignment.

    Writes only one file, and only for a target that the plan was not made for: how many of the target's
    tokens each shard has.

    Args:
        run: The run file.
        source: Name of the source.
        keep: Whether to write that file.

    Raises:
        MissingError: The plan or the source store is not there.
        MismatchError: Plan, store, model, tokenizer or method do not belong together.
        TokenizerError: The target's tokenizer cannot represent a segment.
    """
    section = run.section("align", AlignSection)
    plan = open_plan(run)
    reader = StoreReader.open(open_location(run.store_url(source)))
    reader.require_plan(plan)
    require_same_source(run, source, reader, plan)
    target = SegmentTokenizer.load(run.target, name="target")
    plan = planned_for_target(run, plan, target, keep=keep)
    manifest = aligned_manifest(reader, plan, target, run, section)
    return CheckedAlignment(
        run=run,
        plan=plan,
        tokenizer=target,
        manifest=manifest,
        location=open_location(aligned_store_url(run, source, manifest)),
        source=source,
        reader=reader,
        section=section,
    )


def planned_for_target(run: RunConfig, plan: Plan, target: SegmentTokenizer, *, keep: bool) -> Plan:
    """The plan with this target's token counts, counted now if it was made for another target."""
    if plan.record.tokenizers.get("target") == target.fingerprint:
        return plan
    total = sum(shard.num_bytes for shard in plan.shards)
    longest = model_positions(run.target)
    with Progress("count the target's tokens", total, unit="B") as progress:
        return plan_for(
            plan, "target", target, keep=keep, max_positions=longest, on_shard=progress.add
        )


def aligned_manifest(
    reader: StoreReader,
    plan: Plan,
    target: SegmentTokenizer,
    run: RunConfig,
    section: AlignSection,
) -> Manifest:
    """Manifest of the aligned store: identities of source and target, and the method's settings.

    Raises:
        MismatchError: The method cannot work with the two vocabularies.
    """
    source = reader.manifest
    method = METHODS[section.method]
    method.check(reader.vocabulary, target.vocabulary, reader.location.url)
    settings = section.content() | {"source_store": source.fingerprint()}
    if counts_text(section):
        settings["counted_text"] = text_fingerprint(planned_count(plan, section))
    return source.model_copy(
        update={
            "kind": "aligned",
            "target": source_identity(run.target, target, folder=None),
            "top_k": method.top_k(section, source.max_entries),
            "settings": settings,
            "corpus_fingerprint": plan.record.corpus_fingerprint,
            "plan_fingerprint": plan.fingerprint,
            "encoding": run.section("store", StoreSection).encoding(source.estimator),
            "num_shards": len(plan.shards),
            "vocabulary_fingerprint": target.vocabulary.fingerprint,
        }
    )
