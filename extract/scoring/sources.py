"""Checks of a source against the run file and the plan, before any of its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from extract.branch_config import BranchOptions
from extract.config import ExtractSection
from extract.engine_kinds import ENGINES
from extract.engines.protocol import EngineSpec, engine_spec
from store_schema.config import ModelRef, RunConfig
from store_schema.disk.location import Location, open_location
from store_schema.errors import MismatchError
from store_schema.manifest import BRANCHES_SETTING, Manifest
from store_schema.model.model_check import require_language_model, require_packages
from store_schema.model.models import resolve_model
from store_schema.model.weight_files import require_weights
from store_schema.plan.plan import Plan
from store_schema.presets import Encoding, StoreSection
from store_schema.store.planned_store import PlannedStore
from store_schema.store.reader import MANIFEST_FILE, StoreReader
from store_schema.store.same_source import source_identity
from store_schema.text.tokenizer import SegmentTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSource(PlannedStore):
    """A source that has passed all checks that need no loaded model.

    Args:
        name: Its name in the run file.
        spec: What the engine needs to open it.
    """

    name: str
    spec: EngineSpec


def require_planned(plan: Plan, name: str, ref: ModelRef, tokenizer: SegmentTokenizer) -> None:
    """Refuse a tokenizer that the plan was not made with."""
    planned = plan.record.tokenizers.get(name)
    if planned != tokenizer.fingerprint:
        other = f"the plan was made with another tokenizer of {name} than the model's"
        raise MismatchError(
            other if planned else f"the plan was made without {name}",
            where=f"{plan.location.url}, {ref.model}",
            expected=f"tokenizer {planned}" if planned else "a source of the plan",
            got=f"tokenizer {tokenizer.fingerprint}",
            hint="run `logitfuse extract plan`: it keeps the segments if they fit the new model",
        )


def check_source(
    run: RunConfig,
    name: str,
    plan: Plan,
    *,
    kind: Literal["source", "generated"] = "source",
) -> CheckedSource:
    """Check a source. Writes nothing.

    Args:
        run: The run file.
        name: The source.
        plan: Of the run.
        kind: Of the store to fill.

    Raises:
        ModelError: The model cannot be used.
        MismatchError: Its tokenizer is not the one the plan was made with.
        ConfigError: An option does not fit the model.
    """
    ref = run.sources[name]
    url = run.store_url(name) if kind == "source" else run.generated_url(name)
    location = open_location(url)
    section, generates = run.section("extract", ExtractSection), kind == "generated"
    section = section_with_engine(section.answering() if generates else section, location)
    folder = model_folder(run, name)
    tokenizer = SegmentTokenizer.load(ref, name=name)
    require_planned(plan, name, ref, tokenizer)
    spec = engine_spec(
        name,
        folder,
        ref,
        section,
        vocab_size=tokenizer.vocab_size,
        longest=int(plan.record.settings["max_tokens"]),
        seed=run.seed,
    )
    if ENGINES[spec.section.engine].loader == "transformers":
        require_packages(folder, name=name)
    store = run.section("store", StoreSection)
    encoding = Encoding() if generates else store.encoding(section.estimator)
    manifest = Manifest(
        kind=kind,
        source=name,
        model=source_identity(ref, tokenizer, folder=folder),
        corpus_fingerprint=plan.record.corpus_fingerprint,
        plan_fingerprint=plan.fingerprint,
        num_shards=len(plan.shards),
        estimator=section.estimator,
        top_k=None if generates else section.max_entries,
        encoding=encoding,
        settings=shaping_settings(spec) | branch_settings(section.branches, plan, location),
        vocabulary_fingerprint=tokenizer.vocabulary.fingerprint,
    )
    return CheckedSource(
        run=run,
        plan=plan,
        tokenizer=tokenizer,
        manifest=manifest,
        location=location,
        name=name,
        spec=spec,
    )


def branch_settings(
    options: BranchOptions | None, plan: Plan, location: Location
) -> dict[str, Any]:
    """The settings of branches for a store's manifest; empty without branches.

    The target of an existing store stays: branches that were chosen for another tokenizer may be used.

    Args:
        options: Of the run file.
        plan: Has the target's tokenizer.
        location: Of the store, which need not exist.
    """
    if options is None:
        return {}
    wanted = options.model_dump(mode="json")
    if location.exists(MANIFEST_FILE):
        kept = StoreReader.open(location).manifest.settings.get(BRANCHES_SETTING)
        if isinstance(kept, dict) and wanted == {k: v for k, v in kept.items() if k != "target"}:
            return {BRANCHES_SETTING: kept}
    return {BRANCHES_SETTING: wanted | {"target": plan.record.tokenizers.get("target")}}


def section_with_engine(section: ExtractSection, location: Location) -> ExtractSection:
    """The section, with `engine: auto` replaced by the engine that an existing store was made with.

    Args:
        section: The run file's `extract`.
        location: Of the store, which need not exist.
    """
    if section.engine != "auto" or not location.exists(MANIFEST_FILE):
        return section
    engine = str(StoreReader.open(location).manifest.settings.get("engine"))
    if engine in ENGINES.table and ENGINES[engine].can_serve(section):
        return section.model_copy(update={"engine": engine})
    return section


def model_folder(run: RunConfig, name: str) -> Path:
    """The folder of a source's model, after the checks that need only its files.

    Raises:
        ModelError: The model is missing or incomplete, is not a causal language model, or has a type
            that the engine does not know.
    """
    ref = run.sources[name]
    folder = resolve_model(ref)
    require_weights(folder)
    loader = run.section("extract", ExtractSection).loader
    require_language_model(ref, folder, name=name, loader=loader)
    return folder


def shaping_settings(spec: EngineSpec) -> dict[str, Any]:
    """Settings that determine a store's content besides model, text and entries, for its manifest."""
    section = spec.section
    settings = {"engine": section.engine, "dtype": spec.dtype, "fp32_head": spec.fp32_head}
    if section.quantization is not None:
        settings["quantization"] = section.quantization
    kind = ENGINES[section.engine]
    if kind.section is not None:
        settings |= section.model_dump(mode="json", include={kind.field})
    return settings | section.sampling_settings(spec.seed)
