"""`train explain`: what target and pool predict at each position of one segment.

The numbers are those of the training loss, computed by its own code: the labels' NLL under the target,
the selector's weights, their pool, and the weight of the fusion loss. Matrix products are in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuse_train.config import TrainSection
from fuse_train.data.samples import Sample
from fuse_train.data.stream import SampleStream, training_order
from fuse_train.explain.model import ChosenModel, choose_model, load_chosen
from fuse_train.explain.positions import Position, explain_sample
from fuse_train.gate.first_reading import FirstReadings
from fuse_train.gate.held_out import HeldOutText
from fuse_train.inputs import (
    Inputs,
    job_fingerprint,
    kept_selectors,
    open_inputs,
    output_folder,
    stream_options,
)
from fuse_train.loop.checkpoint import (
    PREVIOUS_CHECKPOINT_HINT,
    TrainState,
    latest_checkpoint,
)
from fuse_train.loop.likelihood import row_nats
from fuse_train.loop.objective import FusionObjective
from fuse_train.loop.schedule import progress_at, steps_in_all
from fuse_train.loop.validation import load_valid
from fuse_train.machine.processes import connected_state
from fuse_train.selector_fit.selector_start import SelectorStart
from fuse_train.selector_fit.selector_training import split_batches
from fuse_train.selectors.selectors import Selector
from launch.signals import stop_on_signals
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, InputError, MissingError
from store_schema.plan.find_segment import find_segment, segment_in_document
from store_schema.plan.plan import Plan, Segment, ShardRecord


@dataclass(frozen=True, slots=True)
class Explained:
    """What target and pool predict in one segment.

    Args:
        segment: The segment.
        shard: Index of its shard in the plan.
        model: Which weights of the target, in words.
        model_folder: Folder of these weights.
        selector: Which selector, in words.
        hindsight: Whether its weights saw the labels.
        clm_weight: lambda without the fusion gate.
        fusion_share: The pool's weight in its best mixture with the target in the segment's domain,
            which the fusion gate takes as share or as prior; 1 without a gate.
        share_from: Where it is from, in words.
        first_reading: Whether the posterior gate has the target's first reading of the segment; else
            what the model that is shown predicts takes its place.
        sources: Names, in the order of weights.
        positions: All positions of the segment.
    """

    segment: Segment
    shard: int
    model: str
    model_folder: str
    selector: str
    hindsight: bool
    clm_weight: float
    fusion_share: float
    share_from: str
    first_reading: bool
    sources: tuple[str, ...]
    positions: tuple[Position, ...]

    def most_different(self, count: int) -> list[Position]:
        """Fused positions where target and pool differ most about the label, most different first."""
        known = [p for p in self.positions if p.fused and p.ahead_nats is not None]
        return sorted(known, key=lambda p: -abs(p.ahead_nats or 0.0))[:count]


def explain_segment(
    run: RunConfig, *, segment: str | None, document: str | None = None, model: str | None = None
) -> Explained:
    """Compute what target and pool predict in one segment of the plan.

    Args:
        run: The run file.
        segment: Id or row of the plan; with `document` its number there, None for the only one.
        document: Id of the document that holds it.
        model: As `name` of `choose_model`.

    Raises:
        ConfigError: Neither segment nor document, several segments to choose from, or no such model.
        MissingError: No plan, no such segment, or stores without its shard.
        MismatchError: A checkpoint, model or store of another config or tokenizer.
        InputError: No source covers any position of the segment.
        ModelError: The model cannot be loaded, or cannot take the segment.
    """
    section = run.section("train", TrainSection)
    inputs = open_inputs(run, section)
    record, chosen_segment = find_segment(inputs.plan, _wanted(inputs.plan, segment, document))
    sample = _sample(inputs, section, record, chosen_segment)
    job = job_fingerprint(inputs, "fused", section)
    checkpoint = latest_checkpoint(output_folder(run) / "checkpoints", job)
    chosen = choose_model(inputs, section, model, checkpoint)
    processes = connected_state()
    target = load_chosen(run, chosen, inputs.tokenizer, chosen_segment).to(processes.device).eval()
    with stop_on_signals() as stop:
        selector, selector_words = _selector(
            inputs, section, checkpoint, processes.device, stop.check
        )
    objective = FusionObjective(target, selector, section, inputs.samples.sources)
    step = 0 if checkpoint is None else checkpoint[1].step
    order = training_order(inputs.samples, stream_options(run, section))
    num_steps = steps_in_all(section, len(order), order.num_steps)
    objective.at_progress(progress_at(step, num_steps), order.stage_at(step))
    shares, share_from = _fusion_shares(inputs, checkpoint, chosen, objective, processes)
    objective.fusion_shares = shares
    if checkpoint is not None and section.fusion_gate.kind == "posterior":
        objective.readings = FirstReadings.load(
            checkpoint[0] / "trainer", hint=PREVIOUS_CHECKPOINT_HINT
        )
    positions = explain_sample(objective, sample, inputs.domains, inputs.tokenizer.vocabulary)
    return Explained(
        segment=chosen_segment,
        shard=record.index,
        model=chosen.title,
        model_folder=chosen.where,
        selector=selector_words,
        hindsight=selector.hindsight,
        clm_weight=objective.weights.clm_weight,
        fusion_share=shares.get(chosen_segment.domain, 1.0),
        share_from=share_from,
        first_reading=objective.readings is not None
        and chosen_segment.segment_id in objective.readings,
        sources=inputs.samples.sources,
        positions=positions,
    )


# ------------------------------------------------------------------------------------- the segment


def _wanted(plan: Plan, segment: str | None, document: str | None) -> str:
    """Id or row of the segment that the options name."""
    if document is not None:
        return segment_in_document(plan, document, segment)
    if segment is None:
        raise ConfigError(
            "no segment named",
            where="command line",
            expected="--segment ID, or --document ID where the document has one segment",
        )
    return segment


def _sample(inputs: Inputs, section: TrainSection, record: ShardRecord, segment: Segment) -> Sample:
    """The segment as training would read it, also of another split than the one trained on."""
    stores = inputs.samples.stores
    lacking = [name for name, reader in stores.items() if record.index not in reader.commits]
    if lacking and (len(lacking) == len(stores) or not section.allow_partial):
        raise MissingError(
            f"shard {record.index} (split {record.split}), which holds the segment, is not aligned yet",
            where=f"segment {ascii(segment.segment_id)[1:-1]}",
            got="missing for " + ", ".join(lacking),
            hint="`logitfuse align run` writes it; or choose a segment of another split",
        )
    samples = inputs.samples
    if record.split != samples.split:
        # Only the segment's own shard has to be there.
        lenient = section.model_copy(update={"allow_partial": True})
        samples = open_inputs(inputs.run, lenient, record.split).samples
    position = [shard.index for shard in samples.shards].index(record.index)
    shard = samples.load(position, with_sources=True)
    sample = shard.sample(segment.index - record.start)
    if not any(np.diff(a["entry_offsets"])[sample.rows].any() for a in shard.sources):
        raise InputError(
            "no source covers any position of the segment",
            where=f"segment {ascii(segment.segment_id)[1:-1]}",
            expected="a position that a source covers",
            hint="`logitfuse align view` shows the sources' distributions and where they were lost",
        )
    return sample


# ------------------------------------------------------------------------ the state of the training


def _selector(
    inputs: Inputs,
    section: TrainSection,
    checkpoint: tuple[Path, TrainState] | None,
    device: torch.device,
    on_step: Callable[[], None],
) -> tuple[Selector, str]:
    """The run's selector and where it is from; one not trained yet is trained on the stores now."""
    run = inputs.run
    stream = SampleStream(inputs.samples, stream_options(run, section), inputs.domains)
    start = SelectorStart(
        section,
        run.seed,
        stream,
        lambda: open_inputs(run, section, section.valid_split).samples,
        device,
        on_step,
        kept_selectors(run),
    )
    saved: Path | None = None
    words: str = section.selector
    kind = section.selector_kind
    if kind.learns:
        finished = output_folder(run) / "selector"
        if section.options_of(kind).frozen:
            words += f" of train.{kind.field}.start_from"
        elif checkpoint is not None:
            saved, words = checkpoint[0] / "trainer", f"{words} of {checkpoint[0].name}"
        elif finished.is_dir():
            saved, words = finished, f"{words} of {finished.name}/"
        else:
            words += " as training would begin with it"
    return start.make(saved).to(device).eval(), words


def _fusion_shares(
    inputs: Inputs,
    checkpoint: tuple[Path, TrainState] | None,
    chosen: ChosenModel,
    objective: FusionObjective,
    processes: Any,
) -> tuple[dict[str, float], str]:
    """The fusion gate's share by domain, and where it is from: the last evaluation, or measured now."""
    section, selector = objective.section, objective.selector
    if section.fusion_gate.kind == "none" or selector is None:
        return {}, "no fusion gate"
    if checkpoint is not None and checkpoint[1].fusion_shares:
        return checkpoint[1].fusion_shares, f"last evaluation before {checkpoint[0].name}"
    samples = open_inputs(inputs.run, section, section.valid_split).samples
    shards = inputs.plan.splits()[section.valid_split]
    valid = load_valid(inputs.plan, shards, inputs.tokenizer, section.eval_segments)
    held_out = HeldOutText.of(split_batches(samples, inputs.domains), valid.segment_ids)
    rows = row_nats(
        objective.model,
        valid.encoded,
        batch_segments=section.micro_batch_segments,
        head_chunk_rows=section.head_chunk_rows,
    )
    named = dict(zip(valid.segment_ids, rows, strict=True))
    shares = held_out.shares(selector, named, processes)
    return shares, f"measured now on split {section.valid_split} with {chosen.title}"
