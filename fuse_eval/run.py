"""The stages of this package: estimate pools, evaluate models, write the report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fuse_eval import bpb, forecast
from fuse_eval.config import EvaluateSection
from fuse_eval.evaluation import evaluation_record
from fuse_eval.findings import BEFORE, CONTROL, FUSED
from fuse_eval.interference.blocks import (
    BLOCKS_FILE,
    block_sizes,
    by_segment,
    text_blocks,
    write_blocks,
)
from fuse_eval.interference.documents import document_differences, interference_record
from fuse_eval.summary import EVALUATION_FILE, POOL_FILE, read_json, report_location, write_json
from fuse_train.config import TrainSection
from fuse_train.data.domain_prior import domains_of
from fuse_train.data.samples import AlignedSamples
from fuse_train.inputs import kept_selectors, stream_options
from fuse_train.model.identity import identity
from fuse_train.run import final_folder
from fuse_train.selectors import SELECTORS
from launch.signals import StopFlag
from store_schema import __version__
from store_schema.config import ModelRef, RunConfig
from store_schema.disk.location import Location
from store_schema.errors import MissingError
from store_schema.fingerprint import fingerprint
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.store.same_source import aligned_stores, require_run_sources
from store_schema.text.tokenizer import SegmentTokenizer

if TYPE_CHECKING:
    from fuse_train.selectors.selectors import Selector


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage wrote, now or (`fresh` False) in an earlier run."""

    content: dict[str, Any]
    fresh: bool


def final_folders(run: RunConfig) -> dict[str, Path]:
    """Final folders of the fused model and the control."""
    return {FUSED: final_folder(run, "fused"), CONTROL: final_folder(run, "control")}


# --------------------------------------------------------------------------------- eval run


def evaluate(run: RunConfig, stop: StopFlag) -> StageResult:
    """Score every model on the section's split, and compare them.

    Raises:
        MissingError: Nothing planned or trained yet.
        MismatchError: A tokenizer is not the plan's, or a store is of another model than the run
            file's source.
        Stopped: On a signal; scores of finished models are kept.
    """
    section = run.section("evaluate", EvaluateSection)
    plan = open_plan(run)
    require_run_sources(run, plan)
    models = models_to_score(run, section)
    tokenizers = bpb.run_tokenizers(run, plan)
    requests = {
        name: bpb.score_request(ref, plan, section.split, tokenizers)
        for name, (ref, _) in models.items()
    }
    request = fingerprint(
        {"requests": requests, "section": section.content(), "seed": run.seed, "by": __version__}
    )
    report = report_location(run)
    before = read_json(report, EVALUATION_FILE)
    complete = before is not None and before.get("fingerprint") == request
    if before is not None and complete and report.exists(BLOCKS_FILE):
        return StageResult(before, fresh=False)
    text = bpb.scored_text(bpb.split_segments(plan, section.split), tokenizers)
    nats = _scores(report, models, requests, text, tokenizers, section, stop)
    sums = {name: by_segment(text.block_ends, values) for name, values in nats.items()}
    record = evaluation_record(text.segments, text.num_bytes, sums, section, seed=run.seed)
    blocks = text_blocks(text.segments, text.block_ends, nats)
    content = {"fingerprint": request} | record
    if CONTROL in models:
        documents = document_differences(blocks, FUSED, CONTROL)
        content["interference"] = interference_record(documents, FUSED, CONTROL, section.confidence)
    content["blocks"] = write_blocks(report, blocks)
    write_json(report, EVALUATION_FILE, content)
    return StageResult(content, fresh=True)


def _scores(
    report: Location,
    models: dict[str, tuple[ModelRef, str]],
    requests: dict[str, str],
    text: bpb.ScoredText,
    tokenizers: dict[str, SegmentTokenizer],
    section: EvaluateSection,
    stop: StopFlag,
) -> dict[str, tuple[float, ...]]:
    """NLL of all blocks under each model (nats): saved ones if they were made by the same request."""
    nats = {}
    for name, (ref, tokenizer) in models.items():
        key = f"scores/{name}.json"
        score = bpb.load_score(report, key, requests[name])
        if score is None:
            started = time.monotonic()
            values = bpb.score_model(
                ref,
                text,
                tokenizers[tokenizer],
                name=name,
                batch_tokens=section.batch_tokens,
                device=bpb.device_of(section.device),
                stop=stop,
            )
            score = bpb.ModelScore(
                model=name,
                request_fingerprint=requests[name],
                nats=tuple(np.concatenate(values).tolist()),
                num_bytes=tuple(block_sizes(text.block_ends).tolist()),
                seconds=time.monotonic() - started,
            )
            bpb.save_score(report, key, score)
        nats[name] = score.nats
    return nats


def models_to_score(run: RunConfig, section: EvaluateSection) -> dict[str, tuple[ModelRef, str]]:
    """Every model of the evaluation with the name of its tokenizer.

    A source that is the target before training is not scored a second time.

    Raises:
        MissingError: The fused model, or the control if the run has one, is not trained yet.
    """
    folders = final_folders(run)
    if not run.section("train", TrainSection).control:
        del folders[CONTROL]
    for name, folder in folders.items():
        if not (folder / "config.json").exists():
            raise MissingError(
                f"no trained model ({name})", where=folder, hint="run `logitfuse train run` first"
            )
    models = {BEFORE: (run.target, "target")}
    for name in (CONTROL, FUSED):
        if name in folders:
            models[name] = (bpb.checkpoint_ref(folders[name], run.target), "target")
    if section.sources:
        models |= {
            source: (ref, source) for source, ref in run.sources.items() if ref != run.target
        }
    return models


# --------------------------------------------------------------------------------- eval pool


def estimate_pools(run: RunConfig, stop: StopFlag) -> StageResult:
    """Score each source, each selector's pool and the target before training on the aligned stores.

    Raises:
        MissingError: Stores are not complete.
        MismatchError: Stores, plan and target do not belong together.
        Stopped: On a signal; nothing is written.
    """
    section = run.section("evaluate", EvaluateSection)
    train = run.section("train", TrainSection)
    plan = open_plan(run)
    stores = aligned_stores(run, plan)
    learners, recipe = pool_recipe(section, train)
    request = fingerprint(
        {
            "stores": {source: store.manifest.fingerprint() for source, store in stores.items()},
            "target": identity(run.target),
            "section": section.content(),
            "train": recipe,
            "seed": run.seed,
            "forecast": [forecast.ORDER, forecast.TOKENS_PER_DOMAIN, forecast.SHARE_TAKEN],
            "by": __version__,
        }
        | learners
    )
    report = report_location(run)
    before = read_json(report, POOL_FILE)
    if before is not None and before.get("fingerprint") == request:
        return StageResult(before, fresh=False)
    content = {"fingerprint": request, "split": section.split}
    content |= _pool_content(run, plan, stores, section, train, stop)
    write_json(report, POOL_FILE, content)
    return StageResult(content, fresh=True)


def pool_recipe(
    section: EvaluateSection, train: TrainSection
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the pools depend on, for fingerprints: options of selectors that learn, and the rest."""
    names = {*section.pool_selectors, train.selector}
    kinds = [k for k in SELECTORS if k.section is not None]
    kinds = [k for k in kinds if k.always_in_fingerprint or k.name in names]
    learners = {kind.field for kind in kinds if kind.learns}
    rest = {kind.field for kind in kinds} - learners
    rest |= {"selector", "feedback_weight", "train_split", "valid_split"}
    return (
        train.model_dump(mode="json", include=learners),
        train.model_dump(mode="json", include=rest),
    )


def _pool_content(
    run: RunConfig,
    plan: Plan,
    stores: dict[str, StoreReader],
    section: EvaluateSection,
    train: TrainSection,
    stop: StopFlag,
) -> dict[str, Any]:
    import torch

    from fuse_eval import pool
    from fuse_train.data.stream import SampleStream
    from fuse_train.gate.held_out import span_nats
    from fuse_train.selector_fit.selector_training import split_batches

    tokenizer = bpb.run_tokenizers(run.model_copy(update={"sources": {}}), plan)["target"]
    domains, device = domains_of(plan), bpb.device_of(section.device)
    segments = bpb.split_segments(plan, section.split)
    opened = partial(AlignedSamples, plan, stores, tokenizer)
    with_features = pool.need_features(section, train)
    made: dict[str, Selector] = {}
    if not all(SELECTORS[name].by_rule for name in pool.pool_names(section, train)):
        learned_from = opened(split=train.train_split, with_features=with_features)
        made = pool.learned_selectors(
            section,
            train,
            SampleStream(learned_from, stream_options(run, train), domains, with_entries=False),
            lambda: opened(split=train.valid_split, with_features=False),
            seed=run.seed,
            device=device,
            kept_in=kept_selectors(run),
            stop=stop,
        )
    encoded = tokenizer.encode(segments)
    target_nats = bpb.model_rows(
        run.target,
        encoded,
        name="target",
        batch_tokens=section.batch_tokens,
        device=device,
        stop=stop,
    )
    sources = list(run.sources)
    for part, nats in zip(encoded, target_nats, strict=True):
        if part.ends_turn:
            nats[-1] = np.nan  # pools are compared on text
    named = pool.pool_selectors(section, train, sources, made)
    asked = pool.asked_selectors(named, sources)
    # The estimate computes its own features, without the rows that it leaves out.
    samples = opened(split=section.split, with_features=False)
    totals = pool.estimate(
        samples, domains, sources, asked, target_nats, stop, with_features=with_features
    )
    record = pool.estimate_record(totals, named, sources)
    if train.selector in named:
        rows = {s.segment_id: n for s, n in zip(segments, target_nats, strict=True)}
        own = opened(split=section.split, with_features=train.needs_features)
        batches = list(split_batches(own, domains))
        spans = span_nats(batches, named[train.selector], rows, torch.device("cpu"))
        sizes = {domain: sums["common_bytes"] for domain, sums in record["domains"].items()}
        record["mixture"] = pool.mixtures(spans, sizes)
        shards = plan.splits()[train.train_split]
        train_segments = (segment for shard in shards for segment in plan.segments(shard))
        ngrams = forecast.ngram_rows(train_segments, segments, tokenizer)
        for name, nats in rows.items():
            ngrams[name][np.isnan(nats)] = np.nan  # the same rows as the target's
        ngram_spans = span_nats(batches, named[train.selector], ngrams, torch.device("cpu"))
        record["forecast"] = pool.forecast_record(forecast.forecasts(spans, ngram_spans), sizes)
    return record
