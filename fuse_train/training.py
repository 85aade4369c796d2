"""One training of a run: from its inputs to a published final folder, resumed where it was stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fuse_train.config import TrainSection
from fuse_train.data.stream import SampleStream
from fuse_train.disk.folders import publish_folder, sweep
from fuse_train.gate.held_out import HeldOutText
from fuse_train.inputs import (
    Inputs,
    final_fingerprint,
    final_folder,
    kept_selectors,
    open_inputs,
    output_folder,
    stream_options,
)
from fuse_train.loop.checkpoint import TrainState, latest_checkpoint
from fuse_train.loop.layout import Layout, WholeLayout
from fuse_train.loop.loop_inputs import LoopInputs
from fuse_train.loop.step_log import StepLog
from fuse_train.loop.trackers import start_trackers, stop_trackers, tracker_folder, tracker_names
from fuse_train.loop.trainer import TrainingLoop
from fuse_train.loop.validation import ValidSet, check_valid, load_valid
from fuse_train.machine.launchers import check_accelerator
from fuse_train.machine.memory_fit import free_memory
from fuse_train.machine.precision import resolve_precision
from fuse_train.machine.processes import connected_state
from fuse_train.model.models import own_dtype
from fuse_train.model.target import Target
from fuse_train.publish.done import DoneRecord, read_done
from fuse_train.publish.dry_save import dry_save
from fuse_train.publish.final import FinalChoice, FinalFiles, final_choice, publish_trained
from fuse_train.publish.model_card import CardFacts
from fuse_train.publish.streamed import publish_streamed
from fuse_train.selector_fit.selector_start import SelectorStart
from fuse_train.selector_fit.selector_training import split_batches
from fuse_train.selectors.selectors import Selector
from fuse_train.sharding.part_files import in_parts
from launch.signals import StopFlag
from launch.summary import logs_folder
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, MismatchError
from store_schema.model.class_config import transformers_config

logger = logging.getLogger(__name__)


def train(
    inputs: Inputs, label: str, section: TrainSection, stop: StopFlag, job: str
) -> tuple[DoneRecord, bool]:
    """Train and publish, in all processes of the training together.

    Args:
        inputs: Of the run.
        label: "fused" or "control".
        section: The training's options.
        stop: Checked between steps.
        job: Its `job_fingerprint`.

    Returns:
        The record of the final folder, and whether it was made now.
    """
    run, root = inputs.run, final_folder(inputs.run, label).parent
    expected = final_fingerprint(run, job)
    own_dtype(run.target)  # refused before anything is loaded
    section = _with_precision(run, section)
    accelerator = _accelerator(run, label, section)
    check_accelerator(accelerator, section)
    if accelerator.is_main_process:
        sweep(root)
        sweep(root / "checkpoints")
    accelerator.wait_for_everyone()
    done = read_done(root / "final", expected)
    if done is None:
        _train_and_publish(inputs, label, section, stop, accelerator, job)
    accelerator.wait_for_everyone()
    record = read_done(root / "final", expected)
    if record is None:
        raise MismatchError("final folder vanished", where=root / "final")
    return record, done is None


def _with_precision(run: RunConfig, section: TrainSection) -> TrainSection:
    """The section with `precision: auto` resolved, alike for all processes and trainings."""
    if section.precision != "auto":
        return section
    state, folder = connected_state(), output_folder(run)
    config = transformers_config(run.target, of="target")
    with state.main_process_first():
        record = resolve_precision(folder, config, state.device, writes=state.is_main_process)
    return section.model_copy(update={"precision": record.precision})


def _accelerator(run: RunConfig, label: str, section: TrainSection) -> Any:
    from accelerate import Accelerator

    connected_state()
    return Accelerator(
        mixed_precision="bf16" if section.precision == "bfloat16" else "no",
        log_with=tracker_names(section) or None,
        project_dir=str(tracker_folder(logs_folder(run), label)),
    )


def _layout(accelerator: Any, section: TrainSection) -> Layout:
    if section.parallel == "ddp" or accelerator.num_processes == 1:
        return WholeLayout(accelerator, section)
    from fuse_train.loop.sharded_layout import ShardedLayout

    return ShardedLayout(accelerator, section)


def _train_and_publish(
    inputs: Inputs,
    label: str,
    section: TrainSection,
    stop: StopFlag,
    accelerator: Any,
    job: str,
) -> None:
    layout = _layout(accelerator, section)
    run, root = inputs.run, final_folder(inputs.run, label).parent
    checkpoints = root / "checkpoints"
    latest = latest_checkpoint(checkpoints, job)
    path, state = latest or (None, TrainState(fingerprint=job, step=0, next_sample=0))
    target = layout.load(run.target, inputs.tokenizer, checkpoint=path, seed=run.seed)
    valid = _valid(inputs, section)
    if valid is not None:
        check_valid(target.model, valid)
    if accelerator.is_main_process:
        _dry_save(inputs, label, section, target, state, root)
    accelerator.wait_for_everyone()
    stream = SampleStream(
        inputs.samples,
        stream_options(run, section),
        inputs.domains,
        with_sources=label == "fused",
        process=(accelerator.process_index, accelerator.num_processes),
    )
    selector = None
    if label == "fused":
        selector = _selector(inputs, section, stream, path, accelerator, stop)
    log_name = "train_steps.jsonl" if label == "fused" else "control_steps.jsonl"
    log = StepLog(logs_folder(run) / log_name if accelerator.is_main_process else None)
    held_out = None
    if label == "fused" and section.fusion_gate.measures:
        held_out = _held_out(inputs, section, valid)
    loop_inputs = LoopInputs(
        label, section, run.seed, stream, valid, inputs.tokenizer, checkpoints, log, held_out
    )
    loop = TrainingLoop(loop_inputs, target, selector, state, layout, path)
    del target, selector, layout  # else they would stay in memory when the loop is deleted below
    start_trackers(accelerator, run.name, label, job, step=state.step)
    try:
        loop.run(stop)
    finally:
        stop_trackers(accelerator)
    state = loop.state
    learned = loop.selector
    if accelerator.is_main_process and learned is not None and learned.learns:
        # Not in final/: engines load every safetensors file beside a model.
        publish_folder(root / "selector", learned.save)
    del loop, loop_inputs, stream, learned
    accelerator.free_memory()
    free_memory()
    if accelerator.is_main_process:
        _finish(inputs, label, section, state, root)
    accelerator.wait_for_everyone()


def _valid(inputs: Inputs, section: TrainSection) -> ValidSet | None:
    shards = inputs.plan.splits().get(section.valid_split)
    if shards:
        return load_valid(inputs.plan, shards, inputs.tokenizer, section.eval_segments)
    needs = [
        name
        for name, needed in (
            ("keep_best", section.keep_best),
            ("early_stopping_patience", section.early_stopping_patience is not None),
        )
        if needed
    ]
    if needs:
        off = {"keep_best": "false", "early_stopping_patience": "null"}
        raise ConfigError(
            "no shard of the split that evaluations need",
            where="train.valid_split",
            expected=", ".join(inputs.plan.splits()),
            got=section.valid_split,
            hint="name another split, or set "
            + " and ".join(f"train.{name} to {off[name]}" for name in needs),
        )
    logger.warning(
        "no shard of split %s (train.valid_split): nothing is evaluated while training",
        section.valid_split,
    )
    return None


def _held_out(inputs: Inputs, section: TrainSection, valid: ValidSet | None) -> HeldOutText:
    """The evaluated segments with the sources' log-probabilities of their labels.

    Raises:
        ConfigError: Nothing is evaluated.
        MissingError: The stores have no shard of that split.
    """
    if valid is None:
        raise ConfigError(
            "the fusion gate needs evaluations during training",
            where="train.fusion_gate",
            expected="text of split " + section.valid_split,
            hint="give the corpus such a split, or set train.fusion_gate.kind to none",
        )
    samples = open_inputs(inputs.run, section, section.valid_split).samples
    return HeldOutText.of(split_batches(samples, inputs.domains), valid.segment_ids)


def _selector(
    inputs: Inputs,
    section: TrainSection,
    stream: SampleStream,
    checkpoint: Path | None,
    accelerator: Any,
    stop: StopFlag,
) -> Selector:
    """The selector that this run starts or resumes with."""
    start = SelectorStart(
        section,
        inputs.run.seed,
        stream,
        lambda: open_inputs(inputs.run, section, section.valid_split).samples,
        accelerator.device,
        stop.check,
        kept_selectors(inputs.run),
    )
    return start.make(None if checkpoint is None else checkpoint / "trainer")


def _dry_save(
    inputs: Inputs, label: str, section: TrainSection, target: Target, state: TrainState, root: Path
) -> None:
    """Try the final save, with placeholders for figures that are not known yet."""
    ref = inputs.run.target
    bpb = dict.fromkeys(inputs.domains, 1.0)
    files = _final_files(
        inputs, label, section, state.model_copy(update={"before": bpb}), FinalChoice(0, None, bpb)
    )
    dry_save(root, target.model, ref, own_dtype(ref), section.lora, files.write)


def _finish(
    inputs: Inputs, label: str, section: TrainSection, state: TrainState, root: Path
) -> None:
    """Publish what was trained, read back from its checkpoint."""
    choice = final_choice(state, root / "checkpoints", keep_best=section.keep_best)
    files = _final_files(inputs, label, section, state, choice)
    trained = choice.folder
    streams = in_parts(trained) if trained is not None else section.parallel == "fsdp2"
    publish = publish_streamed if streams else publish_trained
    publish(root, choice, inputs.run.target, files, adapters=section.lora is not None)


def _final_files(
    inputs: Inputs, label: str, section: TrainSection, state: TrainState, choice: FinalChoice
) -> FinalFiles:
    run = inputs.run
    sources = {name: ref.model for name, ref in run.sources.items()} if label == "fused" else {}
    facts = CardFacts(
        run_name=run.name,
        label=label,
        target=run.target.model,
        sources=sources,
        plan_fingerprint=inputs.plan.fingerprint,
        store_fingerprints={
            name: inputs.samples.stores[name].manifest.fingerprint() for name in sources
        },
        section=section,
        seed=run.seed,
        before=state.before,
        after=choice.bpb,
        step=choice.step,
        num_steps=state.step,
    )
    record = DoneRecord(
        fingerprint=final_fingerprint(run, state.fingerprint),
        label=label,
        num_steps=state.step,
        step=choice.step,
        before=state.before,
        after=choice.bpb,
        seconds=state.seconds,
    )
    return FinalFiles(inputs.tokenizer, record, facts, run.resolved())
