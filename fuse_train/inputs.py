"""Inputs that all trainings of a run share, opened and checked before any model is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from fuse_train.config import TrainSection
from fuse_train.data.domain_prior import domains_of
from fuse_train.data.samples import AlignedSamples
from fuse_train.model.identity import identity, own_dtype_name
from launch.summary import logs_folder
from store_schema.config import RunConfig
from store_schema.errors import InputError
from store_schema.fingerprint import fingerprint
from store_schema.model.models import model_positions
from store_schema.plan.columns import segment_columns
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from store_schema.store.same_source import aligned_stores
from store_schema.text.tokenizer import SegmentTokenizer

if (
    TYPE_CHECKING
):  # the following are without torch, so that it is not loaded for a finished training
    from fuse_train.data.stream import StreamOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Plan, stores and tokenizer of a run.

    Args:
        run: The run file.
        plan: The run's segments.
        samples: The aligned stores, opened for one split.
        tokenizer: The target's.
        domains: All domains of the plan.
    """

    run: RunConfig
    plan: Plan
    samples: AlignedSamples
    tokenizer: SegmentTokenizer
    domains: tuple[str, ...]


def output_folder(run: RunConfig) -> Path:
    """Folder of a run's models; it is always local."""
    return logs_folder(run).parent


def kept_selectors(run: RunConfig) -> Path:
    """Folder of selectors that were trained on the stores alone, kept for later stages."""
    return output_folder(run) / "selectors" / "kept"


def final_folder(run: RunConfig, label: str) -> Path:
    """Final folder of the "fused" or the "control" training."""
    root = output_folder(run)
    return root / "final" if label == "fused" else root / "control" / "final"


def open_inputs(run: RunConfig, section: TrainSection, split: str | None = None) -> Inputs:
    """Open plan and aligned stores for one split, checked against the target's tokenizer.

    Args:
        run: The run.
        section: Its train section.
        split: None takes `train_split`.

    Raises:
        MismatchError: A store is of another model than the run file's source, of another plan, or of
            another target.
    """
    plan = open_plan(run)
    tokenizer = SegmentTokenizer.load(run.target, name="target")
    samples = AlignedSamples(
        plan,
        aligned_stores(run, plan),
        tokenizer,
        split=split or section.train_split,
        append_eos=section.append_eos,
        max_positions=model_positions(run.target),
        allow_partial=section.allow_partial,
        with_spans=section.loss.span_weight > 0,
        with_features=section.needs_features,
        prior_split=section.train_split,
    )
    return Inputs(run, plan, samples, tokenizer, domains_of(plan))


def check_domains(inputs: Inputs, section: TrainSection) -> None:
    """Refuse to train without text of a domain that the plan has.

    Raises:
        InputError: Names the domains; `allow_partial` trains without them.
    """
    if section.allow_partial:
        return
    where = f"{inputs.plan.location.url}, split {section.train_split}"
    sizes = split_bytes(inputs.plan, section.train_split)
    empty = [domain for domain in inputs.domains if not sizes.get(domain)]
    if empty:
        raise InputError(
            "domains without text to train on",
            where=where,
            expected=", ".join(inputs.domains),
            got="no text of " + ", ".join(empty),
            hint="add documents of these domains, or train without them by `--allow-partial`",
        )


def warn_of_authors(inputs: Inputs, section: TrainSection) -> None:
    """Name texts that selector author cannot weigh by their author, which is no source."""
    if section.selector != "author":
        return
    table = segment_columns(inputs.plan, ["author", "split"])
    authors = table.filter(pc.equal(table["split"], section.train_split))["author"].to_pylist()
    counts = Counter(name for name in authors if name is not None)
    others = [name for name in counts.most_common() if name[0] not in inputs.run.sources]
    if not counts:
        logger.warning(
            "train.selector author: no text has an author, so author.otherwise weighs the sources of "
            "all (corpus.inputs[].columns.author names the column)"
        )
    elif others:
        logger.warning(
            "train.selector author: author.otherwise weighs the sources of texts whose author is none "
            "of them: %s segments",
            ", ".join(f"{name} {number:,}" for name, number in others),
        )


def split_bytes(plan: Plan, split: str) -> dict[str, int]:
    """Bytes of text by domain in one split of the plan."""
    table = segment_columns(plan, ["domain", "split", "byte_start", "byte_end"])
    chosen = table.filter(pc.equal(table["split"], split))
    sizes = pc.subtract(chosen["byte_end"], chosen["byte_start"])
    sums = pa.table({"domain": chosen["domain"], "bytes": sizes})
    summed = sums.group_by("domain", use_threads=False).aggregate([("bytes", "sum")])
    return dict(
        zip(summed["domain"].to_pylist(), map(int, summed["bytes_sum"].to_pylist()), strict=True)
    )


def stream_options(run: RunConfig, section: TrainSection) -> StreamOptions:
    """Options of the training stream, from the run file."""
    from fuse_train.data.stream import StreamOptions

    return StreamOptions(
        seed=run.seed,
        batch_segments=section.batch_segments,
        micro_batch_segments=section.micro_batch_segments,
        shuffle_shards=section.shuffle_shards,
        cache_gib=section.cache_gib,
        prefetch_batches=section.prefetch_batches,
        pack_tokens=section.pack_tokens,
        whole_chats=section.chats == "whole",
        stages=section.stages,
        text_share=section.text_share,
    )


def job_fingerprint(inputs: Inputs, label: str, section: TrainSection) -> str:
    """Fingerprint of everything that shapes a training's weights. The control's is without the sources;
    the dtype of the final weights is in neither (`final_fingerprint` adds it)."""
    run, samples = inputs.run, inputs.samples
    target = {name: value for name, value in identity(run.target).items() if name != "dtype"}
    content: dict[str, Any] = {
        "label": label,
        "train": section.content(),
        "seed": run.seed,
        "text": [
            [shard.start, shard.fingerprint]
            for split in (section.train_split, section.valid_split)
            for shard in inputs.plan.splits().get(split, ())
        ],
        "target": target,
        "tokenizer": inputs.tokenizer.fingerprint,
    }
    if label == "fused" and section.loss.keep_share is not None:
        content["micro_batch_segments"] = section.micro_batch_segments  # rows are chosen within one
    if samples.missing:
        content["shards"] = [shard.index for shard in samples.shards]
    if label == "fused":
        content["stores"] = [
            [name, reader.manifest.fingerprint()] for name, reader in samples.stores.items()
        ]
        if samples.missing:
            content["missing"] = {name: sorted(shards) for name, shards in samples.missing.items()}
        if section.learned is not None and section.learned.start_from is not None:
            from fuse_train.selector_fit.selector_start import saved_identity

            content["selector"] = saved_identity(section, len(run.sources))
    return fingerprint(content)


def final_fingerprint(run: RunConfig, job: str) -> str:
    """Fingerprint of a final folder: of the training `job`, and the dtype of the weights."""
    return fingerprint({"job": job, "dtype": f"torch.{own_dtype_name(run.target)}"})
