"""`extract plan`: documents are cut for all tokenizers, and segments assigned to shards, once.

The assignment is a pure function of seed and documents: documents of a split are ordered by a seeded
SHA-256 of their ids, so that each shard mixes domains; segments of a document stay in order.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from extract.config import CorpusSection, ExtractSection, PlanSection
from extract.corpus.corpus import corpus_location, open_corpus, read_documents
from extract.corpus.splits import require_splits
from extract.plan.cutting import CutCorpus, cut_corpus
from extract.plan.kept_plan import KeptPlan, documents_of, existing_stores, keep_plan, split_digests
from store_schema import SCHEMA_VERSION
from store_schema.config import RunConfig, TemplateSettings
from store_schema.errors import ConfigError, InputError, LogitfuseError, ModelError
from store_schema.fingerprint import fingerprint
from store_schema.model.model_check import Loader, require_language_model, require_packages
from store_schema.model.models import max_positions, model_config, resolve_model
from store_schema.model.weight_files import absent_weights, require_no_damage
from store_schema.plan.plan import PLAN_FILE, SEGMENTS_FILE, Plan, Segment, write_plan
from store_schema.plan.run_plan import plan_location
from store_schema.text.tokenizer import SegmentTokenizer

_log = logging.getLogger(__name__)

TARGET = "target"
_DEFAULT_TEMPLATE = TemplateSettings().model_dump(mode="json")


def load_tokenizers(run: RunConfig) -> dict[str, SegmentTokenizer]:
    """Tokenizers of all sources and the target, by model name."""
    refs = {**run.sources, TARGET: run.target}
    return {name: SegmentTokenizer.load(ref, name=name) for name, ref in refs.items()}


def make_plan(run: RunConfig, *, recut: bool = False) -> tuple[Plan, bool]:
    """Make the plan of a run, or update the existing one.

    Once there are stores of a plan, its segments are kept if they fit the run file as it is now.

    Args:
        run: The run file.
        recut: Cut all text again even if there are stores. The caller then passes them to
            `uncommit_changed`.

    Returns:
        The plan, and whether it was written: False if the existing one is up to date.

    Raises:
        MissingError: There is no corpus.
        MismatchError: The segments that stores were made from do not fit the run file; nothing was
            written.
        TokenizerError: A tokenizer cannot represent a document.
        InputError: No text, or none of a split that a section of the run file needs.
    """
    section = run.section("plan", PlanSection)
    corpus = open_corpus(corpus_location(run))
    _require_models(run, section)
    tokenizers = load_tokenizers(run)
    fingerprints = {name: tokenizer.fingerprint for name, tokenizer in tokenizers.items()}
    made_from = [corpus.corpus_fingerprint, section.content(), fingerprints, run.seed]
    request = fingerprint(["plan", SCHEMA_VERSION, *made_from])
    location = plan_location(run.data_folder)
    plan = Plan.find(location)
    if plan is not None and plan.record.request_fingerprint == request:
        cut_for_this = not plan.record.settings.get("kept")
        if cut_for_this or not recut:
            require_splits(run, plan.splits(), where=location.url, left_out={})
            return plan, False
    for tokenizer in tokenizers.values():
        tokenizer.warn_of_class()
        tokenizer.warn_of_missing_bos()
    table = read_documents(corpus_location(run), corpus)
    digests = split_digests(table)
    stores = existing_stores(run)
    kept = None
    if plan is not None and stores and not recut:
        kept = keep_plan(plan, corpus.corpus_fingerprint, digests, tokenizers, section, stores)
        table = documents_of(table, kept.new_splits)
    cut = _cut(run, table, tokenizers, section, kept)
    start = 0 if kept is None else kept.plan.record.num_segments
    shards = _shards(table, cut, list(tokenizers), section.shard_tokens, run.seed, start)
    location.write_atomic("config.yaml", run.resolved().encode())
    try:
        plan = write_plan(
            location,
            shards,
            corpus_fingerprint=corpus.corpus_fingerprint,
            request_fingerprint=request,
            tokenizers=fingerprints if kept is None else kept.tokenizers,
            settings=section.content() | _figures(run, cut, kept),
            documents=digests if kept is None else kept.documents,
            kept=None if kept is None else kept.plan,
        )
    except BaseException:
        with contextlib.suppress(LogitfuseError):  # the first error is the one to report
            if not location.exists(PLAN_FILE):  # else the plan is complete and needs its segments
                location.delete(SEGMENTS_FILE)
        raise
    return plan, True


def _cut(
    run: RunConfig,
    table: pa.Table,
    tokenizers: Mapping[str, SegmentTokenizer],
    section: PlanSection,
    kept: KeptPlan | None,
) -> CutCorpus:
    """Cut the documents of a table; refuse if a split that the run needs has no text."""
    drop = run.section("corpus", CorpusSection).on_bad == "drop"
    cut = cut_corpus(table, tokenizers, section.max_tokens, drop_unreadable=drop)
    if not cut.rows and kept is None:
        raise InputError("no document is left", where="plan", got=f"dropped {dict(cut.dropped)}")
    present = set(table["split"].take(pa.array(cut.rows, pa.int64())).to_pylist())
    present |= set() if kept is None else set(kept.plan.splits())
    require_splits(run, sorted(present), where=plan_location(run.data_folder).url, left_out={})
    return cut


def _figures(run: RunConfig, cut: CutCorpus, kept: KeptPlan | None) -> dict[str, Any]:
    """The record's settings beside the section: seed, dropped documents, context tokens, ..."""
    dropped, context = Counter(cut.dropped), Counter(cut.context_tokens)
    unwritten = {name: Counter(kinds) for name, kinds in cut.unwritten.items()}
    if kept is not None:
        for name, kinds in kept.plan.record.settings.get("unwritten", {}).items():
            unwritten.setdefault(name, Counter()).update(kinds)
        dropped.update(kept.plan.record.settings.get("dropped", {}))
        context.update(kept.context_tokens)
    figures = {
        "seed": run.seed,
        "dropped": dict(sorted(dropped.items())),
        "context_tokens": dict(context),
        "unwritten": {name: dict(kinds) for name, kinds in unwritten.items() if kinds},
        "templates": _templates(run),
    }
    return figures if kept is None else figures | {"kept": True}


def _templates(run: RunConfig) -> dict[str, Any]:
    """Chat template settings of each model for which the run file sets any."""
    refs = {**run.sources, TARGET: run.target}
    settings = {name: ref.template.model_dump(mode="json") for name, ref in refs.items()}
    return {name: values for name, values in settings.items() if values != _DEFAULT_TEMPLATE}


def _require_models(run: RunConfig, section: PlanSection) -> None:
    """Before anything is tokenised, refuse models that cannot be used and segments that are longer
    than a model can read. Weights may be absent, but not damaged."""
    extract = run.section("extract", ExtractSection)
    loader = extract.loader
    for name, ref in {**run.sources, TARGET: run.target}.items():
        folder = resolve_model(ref)
        absent = absent_weights(folder)
        require_no_damage(folder)
        by = "transformers" if name == TARGET else loader
        require_language_model(ref, folder, name=name, loader=by)
        _look_for_packages(folder, name, by)
        if absent is not None:
            _log.warning("%s can be planned for, not run yet: %s", name, absent.line())
        longest = max_positions(model_config(folder))
        records = name != TARGET and extract.on_bad == "record"
        if longest is not None and section.max_tokens > longest and not records:
            raise ConfigError(
                f"segments are longer than {name} can read",
                where="plan.max_tokens",
                expected=f"at most {longest}",
                got=section.max_tokens,
            )


def _look_for_packages(folder: Path, name: str, loader: Loader) -> None:
    """Refuse quantised weights for which transformers lacks a package; only warn if they may be run
    with vLLM, which has kernels of its own."""
    if loader == "vllm":
        return
    try:
        require_packages(folder, name=name)
    except ModelError as error:
        if loader == "transformers":
            raise
        _log.warning("%s needs vLLM in an environment like this one: %s", name, error.line())


def assign_to_shards(
    sizes: Sequence[Sequence[int]], shard_tokens: int
) -> list[list[tuple[int, int]]]:
    """Assign segments to shards of similar size, keeping documents whole where possible.

    Args:
        sizes: For each document, in order, the tokens of its segments.
        shard_tokens: Approximate tokens of a shard.

    Returns:
        For each shard its (document, segment) index pairs, in order.
    """
    total = sum(map(sum, sizes))
    size = total / max(round(total / shard_tokens), 1)
    shards: list[list[tuple[int, int]]] = []
    shard: list[tuple[int, int]] = []
    filled = 0  # tokens of the open shard

    def close() -> None:
        nonlocal shard, filled
        shards.append(shard)
        shard, filled = [], 0

    for document, segments in enumerate(sizes):
        whole = sum(segments)
        # Only a document that is itself longer than a shard may lie in several.
        if shard and whole <= size and filled + whole / 2 > size:
            close()
        for number, tokens in enumerate(segments):
            if shard and whole > size and filled + tokens / 2 > size:
                close()
            shard.append((document, number))
            filled += tokens
    if shard:
        close()
    return shards


def shuffled(ids: Sequence[str], seed: int) -> list[int]:
    """Indices of `ids` in the order of a seeded SHA-256 of each."""
    keys = [hashlib.sha256(f"shuffle:{seed}:{name}".encode()).digest() for name in ids]
    return sorted(range(len(ids)), key=lambda i: (keys[i], ids[i]))


def _shards(
    table: pa.Table, cut: CutCorpus, models: list[str], shard_tokens: int, seed: int, start: int
) -> Iterator[tuple[list[Segment], dict[str, int]]]:
    """Shards as `write_plan` takes them: splits one after the other, texts read when needed."""
    target = models.index(TARGET)
    splits = table["split"].take(pa.array(cut.rows, pa.int64())).to_pylist()
    ids = table["document_id"].take(pa.array(cut.rows, pa.int64())).to_pylist()
    index = start
    for split in dict.fromkeys(sorted(splits, key=_split_order)):
        members = [i for i, name in enumerate(splits) if name == split]
        order = [members[i] for i in shuffled([ids[i] for i in members], seed)]
        sizes = [[c.num_tokens[target] for c in cut.cuts[i]] for i in order]
        build = _segment_builder(table, cut)
        for pairs in assign_to_shards(sizes, shard_tokens):
            segments = []
            for document, number in pairs:
                segments.append(build(index, order[document], number))
                index += 1
            counts = np.array([cut.cuts[order[d]][n].num_tokens for d, n in pairs]).sum(axis=0)
            yield segments, dict(zip(models, counts.tolist(), strict=True))


def _split_order(name: str) -> tuple[int, str]:
    known = ("train", "valid", "test")
    return (known.index(name) if name in known else len(known), name)


def _segment_builder(table: pa.Table, cut: CutCorpus) -> Callable[[int, int, int], Segment]:
    last: tuple[int, dict[str, str], bytes] | None = None

    def build(index: int, kept: int, number: int) -> Segment:
        nonlocal last
        if last is None or last[0] != kept:
            row = table.slice(cut.rows[kept], 1).to_pylist()[0]
            last = (kept, row, row["text"].encode())
        _, row, data = last
        piece = cut.cuts[kept][number]
        return Segment(
            index=index,
            segment_id=f"{row['document_id']}#{number}",
            document_id=row["document_id"],
            domain=row["domain"],
            split=row["split"],
            byte_start=piece.start,
            byte_end=piece.end,
            ends_document=piece.end == len(data),
            context=row["context"],
            text=data[piece.start : piece.end].decode(),
            author=row.get("author"),
            corpus=row.get("corpus"),
        )

    return build
