"""`extract run`: each source in a process of its own, shard by shard into its store.

The parent checks everything about every source before the first engine starts, then runs one child
after the other: their memory is freed between sources, and vLLM's patches of model classes stay in
the process that asked for them. A pipe is the child's leash: when the parent asks it to stop, or
dies, the pipe closes, and the child stops before its next batch.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from extract.config import ExtractSection
from extract.engine import EngineSpec, engine_spec, open_engine
from extract.planning import plan_location
from extract.score import score_shard
from launch.progress import Progress
from launch.signals import StopFlag, stop_on_signals
from launch.work import Worker, pending_shards
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, MismatchError, ModelError
from store_schema.fingerprint import model_fingerprint
from store_schema.frequency import token_counts
from store_schema.location import open_location
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.models import resolve_model
from store_schema.plan import Plan, ShardRecord
from store_schema.presets import StoreSection
from store_schema.reader import MANIFEST_FILE
from store_schema.tokenizer import SegmentTokenizer
from store_schema.writer import StoreWriter

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Read when libraries are loaded, so the child has to be born with them."""


@dataclass(frozen=True, slots=True)
class CheckedSource:
    """A source that can be scored as far as can be told without loading it."""

    name: str
    plan: Plan
    tokenizer: SegmentTokenizer
    spec: EngineSpec
    manifest: Manifest


def check_source(run: RunConfig, name: str, plan: Plan) -> CheckedSource:
    """Check a source against the run file and the plan. Writes nothing.

    Raises:
        ModelError: The model cannot be used.
        MismatchError: Its tokenizer is not the one the plan was made with.
        ConfigError: An option does not fit the model.
    """
    ref = run.sources[name]
    section = run.section("extract", ExtractSection)
    folder = resolve_model(ref)
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ModelError("model folder has no weights", where=folder, expected="*.safetensors")
    tokenizer = SegmentTokenizer.load(ref, name=name)
    planned = plan.record.tokenizers.get(name)
    if planned != tokenizer.fingerprint:
        raise MismatchError(
            f"the plan was made with another vocabulary than that of the model given for {name}",
            where=f"{plan.location.url}, {ref.model}",
            expected=f"tokenizer {planned}",
            got=f"tokenizer {tokenizer.fingerprint}",
            hint="give the model that was planned with, or plan anew under another run name",
        )
    spec = engine_spec(
        name,
        folder,
        ref,
        section,
        vocab_size=tokenizer.vocab_size,
        longest=int(plan.record.settings["max_tokens"]),
        seed=run.seed,
    )
    settings = {
        "engine": section.engine,
        "dtype": spec.dtype,
        "fp32_head": spec.fp32_head,
        **section.sampling_settings(run.seed),
    }
    manifest = Manifest(
        kind="source",
        source=name,
        model=ModelIdentity(
            name=ref.model,
            model_fingerprint=model_fingerprint(folder),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
        ),
        corpus_fingerprint=plan.record.corpus_fingerprint,
        plan_fingerprint=plan.fingerprint,
        num_shards=len(plan.shards),
        estimator=section.estimator,
        top_k=section.max_entries,
        encoding=run.section("store", StoreSection).encoding(section.estimator),
        settings=settings,
        vocabulary_fingerprint=tokenizer.vocabulary.fingerprint,
    )
    return CheckedSource(name, plan, tokenizer, spec, manifest)


def open_store(run: RunConfig, source: CheckedSource) -> StoreWriter:
    """Create the source's store, or go on with it.

    Raises:
        MismatchError: The store there was made from something else.
    """
    location = open_location(run.store_url(source.name))
    return StoreWriter.open(
        location,
        source.manifest,
        source.tokenizer.vocabulary,
        config=run.resolved(),
        count_tokens=lambda: token_counts(source.plan, source.tokenizer),
    )


def run_extract(run: RunConfig, names: Sequence[str], worker: Worker) -> list[str]:
    """Score all sources of `names` that have pending shards.

    Args:
        run: The run file.
        names: Sources; () means all.
        worker: Which part of the shards.

    Returns:
        Names of the sources that had something to do.

    Raises:
        LogitfuseError: A source cannot be used; nothing was written.
        SystemExit: A child failed; it has told why, its exit code is passed on.
    """
    unknown = [name for name in names if name not in run.sources]
    if unknown:
        raise ConfigError(
            "no such source", where="--source", expected=", ".join(run.sources), got=unknown[0]
        )
    plan = Plan.open(plan_location(run))
    sources = [check_source(run, name, plan) for name in names or run.sources]
    # Stores that are there are looked at first, so that a mismatch leaves no new one behind.
    sources.sort(key=lambda s: not open_location(run.store_url(s.name)).exists(MANIFEST_FILE))
    writers = {source.name: open_store(run, source) for source in sources}
    pending = {
        name: pending_shards(plan.shards, writer.committed(), worker)
        for name, writer in writers.items()
    }
    todo = [name for name in names or run.sources if pending[name]]
    del sources
    with stop_on_signals() as flag:
        for name in todo:
            flag.check()
            _run_child(run, name, worker, flag)
    return todo


def _run_child(run: RunConfig, name: str, worker: Worker, flag: StopFlag) -> None:
    with tempfile.TemporaryDirectory(prefix="logitfuse-") as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(run.resolved(), encoding="utf-8")
        leash, hand = os.pipe()
        try:
            # -P: a folder called `extract` where the user stands must not be taken for ours.
            command = [sys.executable, "-P", "-m", "extract", "run-source", str(config)]
            command += ["--source", name, "--worker", str(worker), "--leash", str(leash)]
            child = subprocess.Popen(
                command,
                pass_fds=[leash],
                env=_QUIET | os.environ | {"PYTHONPATH": _python_path()},
            )
            code = _wait(child, flag, hand)
        finally:
            os.close(leash)
    if code < 0 and not flag.asked:
        raise ModelError(
            f"the process that scores {name} was killed",
            where=run.store_url(name),
            got=signal.Signals(-code).name,
            hint="memory running out is the usual cause; rerun to go on",
        )
    if code > 0:
        raise SystemExit(code)
    flag.check()


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def _wait(child: subprocess.Popen[bytes], flag: StopFlag, hand: int) -> int:
    """Wait for the child; let go of its leash when asked to stop or on any error."""
    held = True
    try:
        while True:
            try:
                return child.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                if flag.asked and held:
                    os.close(hand)
                    held = False
    finally:
        if held:
            os.close(hand)


def run_source(run: RunConfig, name: str, worker: Worker, leash: int | None) -> None:
    """Score the pending shards of one source in this process.

    Args:
        run: The run file.
        name: The source.
        worker: Which part of the shards.
        leash: Descriptor of a pipe whose closing asks to stop; None for none.

    Raises:
        Stopped: Asked to stop; what is committed stays.
        LogitfuseError: The source cannot be scored.
    """
    with stop_on_signals() as flag:
        plan = Plan.open(plan_location(run))
        source = check_source(run, name, plan)
        writer = open_store(run, source)
        pending = pending_shards(plan.shards, writer.committed(), worker)
        if not pending:
            return
        _check(flag, leash)
        start = time.monotonic()
        engine = open_engine(source.spec)
        seconds = time.monotonic() - start
        section = source.spec.section
        print(f"{name}: {section.engine} engine ready in {seconds:.1f} s", file=sys.stderr)
        try:
            _check(flag, leash)
            mine = [s for s in plan.shards if s.index % worker.count == worker.index]
            total, left = (sum(s.num_tokens[name] for s in part) for part in (mine, pending))
            with Progress(name, total, unit="tok", done=total - left) as progress:

                def on_scored(num_positions: int) -> None:
                    _check(flag, leash)
                    progress.add(num_positions)

                for shard in pending:
                    segments = plan.segments(shard)
                    arrays, stats = score_shard(
                        engine, source.tokenizer, segments, on_scored=on_scored
                    )
                    _require_planned(shard, name, int(stats["tokens"]))
                    _check(flag, leash)
                    writer.write(shard, arrays, stats)
        finally:
            engine.close()


def _check(flag: StopFlag, leash: int | None) -> None:
    if leash is not None and not flag.asked and select.select([leash], [], [], 0)[0]:
        flag.ask(signal.SIGTERM)
    flag.check()


def _require_planned(shard: ShardRecord, name: str, num_tokens: int) -> None:
    if num_tokens != shard.num_tokens[name]:
        raise MismatchError(
            "tokens of a shard are not those of the plan",
            where=f"shard {shard.index}, source {name}",
            expected=shard.num_tokens[name],
            got=num_tokens,
            hint="another version of the tokenizers library splits otherwise; plan anew with it",
        )
