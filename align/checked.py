"""One source's alignment, checked before anything of it is done."""

from __future__ import annotations

from dataclasses import dataclass

from align.config import AlignSection
from align.exact import require_same_vocabulary
from store_schema import SCHEMA_VERSION
from store_schema.config import RunConfig
from store_schema.errors import MismatchError
from store_schema.frequency import token_counts
from store_schema.location import Location, open_location
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.plan import Plan
from store_schema.presets import StoreSection
from store_schema.reader import StoreReader
from store_schema.tokenizer import SegmentTokenizer
from store_schema.writer import StoreWriter


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
    if section.method == "exact":
        require_same_vocabulary(reader.vocabulary, target.vocabulary, where=reader.location.url)
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
