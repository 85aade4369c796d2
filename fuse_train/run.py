"""The train stage: the fused run, then the CLM control, each resumed or skipped as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuse_train.asn import AdaptiveSelector
from fuse_train.checkpoint import TrainState, latest_checkpoint, publish_folder, sweep
from fuse_train.config import TrainSection
from fuse_train.final import DoneRecord, final_weights, publish_final, read_done
from fuse_train.heads import check_head
from fuse_train.model_card import CardFacts
from fuse_train.models import identity, load_model, own_dtype
from fuse_train.samples import AlignedSamples, domains_of
from fuse_train.selector_training import new_selector, train_selector
from fuse_train.selectors import Selector, build_selector
from fuse_train.step_log import StepLog
from fuse_train.stream import SampleStream, StreamOptions
from fuse_train.trainer import LoopInputs, TrainingLoop
from fuse_train.validation import ValidSet, check_valid, load_valid
from launch.progress import Progress
from launch.signals import StopFlag, stop_on_signals
from launch.summary import logs_folder
from store_schema.config import ModelRef, RunConfig
from store_schema.errors import ConfigError, MismatchError, ModelError
from store_schema.fingerprint import fingerprint
from store_schema.location import open_location
from store_schema.plan import Plan
from store_schema.reader import StoreReader
from store_schema.tokenizer import SegmentTokenizer


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished training.

    Args:
        record: Of its final folder.
        folder: Where that is.
        fresh: False when it had been finished before.
    """

    record: DoneRecord
    folder: Path
    fresh: bool


@dataclass(frozen=True, slots=True)
class Inputs:
    """What both trainings share: opened and checked before any model is loaded."""

    run: RunConfig
    plan: Plan
    samples: AlignedSamples
    tokenizer: SegmentTokenizer
    domains: tuple[str, ...]


def output_folder(run: RunConfig) -> Path:
    """Where models of a run go; they are always local."""
    return logs_folder(run).parent


def final_folder(run: RunConfig, label: str) -> Path:
    """Final folder of the "fused" or the "control" training."""
    root = output_folder(run)
    return root / "final" if label == "fused" else root / "control" / "final"


def train_run(run: RunConfig) -> list[Outcome]:
    """Train what is not finished.

    Returns:
        The fused outcome, and the control's where the config asks for it.

    Raises:
        MissingError: Plan, stores or shards are not there yet.
        MismatchError: Things that do not belong together.
        ModelError: The target cannot be trained, or a step was not finite.
        Stopped: A signal asked to stop.
    """
    section = run.section("train", TrainSection)
    inputs = open_inputs(run, section)
    jobs = [("fused", section)]
    if section.control:
        jobs.append(("control", section.control_section()))
    outcomes = []
    with stop_on_signals() as stop:
        for label, recipe in jobs:
            outcomes.append(_train_one(inputs, label, recipe, stop))
            stop.check()
    return outcomes


def open_inputs(run: RunConfig, section: TrainSection, split: str | None = None) -> Inputs:
    """Open plan and aligned stores for one split, checked against the target's tokenizer.

    Args:
        run: The run.
        section: Its train section.
        split: None takes `train_split`.
    """
    plan = Plan.open(open_location(f"{run.data_folder}/plan"))
    tokenizer = SegmentTokenizer.load(run.target, name="target")
    stores = {name: StoreReader.open(open_location(run.aligned_url(name))) for name in run.sources}
    samples = AlignedSamples(
        plan,
        stores,
        tokenizer,
        split=split or section.train_split,
        append_eos=section.append_eos,
        max_positions=_max_positions(run.target),
    )
    return Inputs(run, plan, samples, tokenizer, domains_of(plan))


def _max_positions(ref: ModelRef) -> int | None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            ref.model, revision=ref.revision, trust_remote_code=ref.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            "model of target cannot be loaded", where=ref.model, got=str(error)[:200]
        ) from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def job_fingerprint(inputs: Inputs, label: str, section: TrainSection) -> str:
    """Of everything that shapes the weights. The control does not depend on the stores."""
    run = inputs.run
    content: dict[str, Any] = {
        "label": label,
        "train": section.content(),
        "seed": run.seed,
        "plan": inputs.plan.fingerprint,
        "target": identity(run.target),
        "tokenizer": inputs.tokenizer.fingerprint,
    }
    if label == "fused":
        content["stores"] = [
            [name, reader.manifest.fingerprint()] for name, reader in inputs.samples.stores.items()
        ]
        if section.asn.start_from is not None:
            content["selector"] = _selector_identity(Path(section.asn.start_from), section)
    return fingerprint(content)


def _selector_identity(folder: Path, section: TrainSection) -> str:
    selector = AdaptiveSelector(section.asn)
    selector.load(folder)
    return fingerprint({name: t.tolist() for name, t in selector.state_dict().items()})


def _train_one(inputs: Inputs, label: str, section: TrainSection, stop: StopFlag) -> Outcome:
    from accelerate import Accelerator

    run, root = inputs.run, final_folder(inputs.run, label).parent
    mark = job_fingerprint(inputs, label, section)
    done = read_done(root / "final", mark)
    if done is not None:
        return Outcome(done, root / "final", fresh=False)
    accelerator = Accelerator(mixed_precision="bf16" if section.precision == "bfloat16" else "no")
    _refuse_sharding(accelerator, section)
    checkpoints = root / "checkpoints"
    if accelerator.is_main_process:
        sweep(root)
        sweep(checkpoints)
    found = latest_checkpoint(checkpoints, mark)
    path, state = found if found else (None, TrainState(fingerprint=mark, step=0, next_sample=0))
    model = _target(run, inputs.tokenizer, path)
    valid = _valid(inputs, section)
    if valid is not None:
        check_valid(model, valid)
    stream = _stream(inputs, section, accelerator, with_sources=label == "fused")
    selector = None
    if label == "fused":
        selector = _selector(inputs, section, stream, path, accelerator, stop)
    log_name = "train_steps.jsonl" if label == "fused" else "control_steps.jsonl"
    log = StepLog(logs_folder(run) / log_name if accelerator.is_main_process else None)
    loop_inputs = LoopInputs(
        label, section, run.seed, stream, valid, inputs.tokenizer, checkpoints, log
    )
    loop = TrainingLoop(loop_inputs, model, selector, state, accelerator, path)
    loop.run(stop)
    if accelerator.is_main_process:
        _finish(inputs, label, section, loop, root, mark)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    record = read_done(root / "final", mark)
    if record is None:
        raise MismatchError("final folder vanished", where=root / "final")
    return Outcome(record, root / "final", fresh=True)


def _refuse_sharding(accelerator: Any, section: TrainSection) -> None:
    """The head's weight is read whole in the loss: what shards parameters would break it silently."""
    kind = str(accelerator.distributed_type.value)
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ConfigError(
            "launcher shards parameters, which this trainer does not support",
            where="accelerate",
            expected="one process, or data parallel (MULTI_GPU)",
            got=kind,
        )
    if section.batch_segments < accelerator.num_processes:
        raise ConfigError(
            "fewer segments in a batch than processes",
            where="train.batch_segments",
            expected=f"at least {accelerator.num_processes}",
            got=section.batch_segments,
        )


def _target(run: RunConfig, tokenizer: SegmentTokenizer, checkpoint: Path | None) -> Any:
    ref = run.target
    if checkpoint is not None:
        ref = ref.model_copy(update={"model": str(checkpoint), "revision": None})
    model = load_model(ref, where="target")
    rows = int(model.get_input_embeddings().weight.shape[0])
    if rows < tokenizer.vocab_size:
        raise ModelError(
            "target's embedding is smaller than its tokenizer",
            where=run.target.model,
            expected=f"at least {tokenizer.vocab_size} rows",
            got=rows,
            hint="the tokenizer belongs to another model, or resize the embedding first",
        )
    check_head(model, where=run.target.model)
    return model


def _valid(inputs: Inputs, section: TrainSection) -> ValidSet | None:
    shards = inputs.plan.splits().get(section.valid_split)
    if shards:
        return load_valid(inputs.plan, shards, inputs.tokenizer, section.eval_segments)
    if section.keep_best:
        raise ConfigError(
            "no shard of the split that evaluations need",
            where="train.valid_split",
            expected=", ".join(inputs.plan.splits()),
            got=section.valid_split,
            hint="name another split, or set train.keep_best to false",
        )
    return None


def stream_options(run: RunConfig, section: TrainSection) -> StreamOptions:
    """How the training stream deals samples."""
    return StreamOptions(
        seed=run.seed,
        batch_segments=section.batch_segments,
        micro_batch_segments=section.micro_batch_segments,
        shuffle_shards=section.shuffle_shards,
        cache_gib=section.cache_gib,
        prefetch_batches=section.prefetch_batches,
    )


def _stream(
    inputs: Inputs, section: TrainSection, accelerator: Any, *, with_sources: bool
) -> SampleStream:
    return SampleStream(
        inputs.samples,
        stream_options(inputs.run, section),
        inputs.domains,
        with_sources=with_sources,
        process=(accelerator.process_index, accelerator.num_processes),
    )


def _selector(
    inputs: Inputs,
    section: TrainSection,
    stream: SampleStream,
    checkpoint: Path | None,
    accelerator: Any,
    stop: StopFlag,
) -> Selector:
    """The selector as this run goes on with it: resumed, given, pretrained or untrained.

    Every process pretrains the same network on the same batches, so nothing is sent around.
    """
    if section.selector != "asn":
        return build_selector(section, inputs.samples.sources)
    asn = section.asn
    selector = new_selector(asn, inputs.run.seed)
    if checkpoint is not None:
        selector.load(checkpoint / "trainer")
    elif asn.start_from is not None:
        selector.load(Path(asn.start_from))
    elif asn.pretrain_steps and asn.objective != "fusion":
        alone = pretrain_stream(stream, asn.pretrain_batch_segments)
        with Progress("train selector", asn.pretrain_steps, unit="step") as progress:

            def on_step(step: int, nats: float) -> None:
                stop.check()
                progress.add(1, f"pool {nats:.4f} nats")

            selector = train_selector(
                alone,
                asn,
                seed=inputs.run.seed,
                feedback_weight=section.feedback_weight,
                on_step=on_step,
                device=accelerator.device,
            )
    return selector


def pretrain_stream(stream: SampleStream, batch_segments: int) -> SampleStream:
    """The same samples in batches of their own size, without entries, decoded once for both."""
    options = StreamOptions(
        seed=stream.options.seed,
        batch_segments=batch_segments,
        micro_batch_segments=batch_segments,
        shuffle_shards=stream.options.shuffle_shards,
        cache_gib=stream.options.cache_gib,
    )
    return SampleStream(
        stream.samples, options, stream.domains, with_entries=False, cache=stream.cache
    )


def _finish(
    inputs: Inputs, label: str, section: TrainSection, loop: TrainingLoop, root: Path, mark: str
) -> None:
    run, state = inputs.run, loop.state
    model, step, bpb = final_weights(
        loop.model, state, root / "checkpoints", run.target, keep_best=section.keep_best
    )
    dtype = own_dtype(run.target, model)
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
        after=bpb,
        step=step,
        num_steps=state.step,
    )
    record = DoneRecord(
        fingerprint=mark,
        label=label,
        num_steps=state.step,
        step=step,
        before=state.before,
        after=bpb,
        seconds=state.seconds,
    )
    if isinstance(loop.selector, AdaptiveSelector):
        # Not in final/: engines load every safetensors file that lies beside a model.
        publish_folder(root / "selector", loop.selector.save)
    publish_final(root / "final", model, inputs.tokenizer.hf, record, facts, run.resolved(), dtype)
