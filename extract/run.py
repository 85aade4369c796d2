"""Running a stage: every pending shard of every source through its model and into its store."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing

from extract.engine_kinds import ENGINES
from extract.engines.memory import check_memory
from extract.engines.protocol import Engine, EngineMemoryError, EngineSpec
from extract.engines.registry import open_engine
from extract.scoring.bos_probe import probe_bos
from extract.scoring.brancher import Brancher
from extract.scoring.causality import require_causal
from extract.scoring.children import check_stop_fd, run_children
from extract.scoring.pipeline import Pipeline
from extract.scoring.sources import CheckedSource, check_source, model_folder
from extract.scoring.stage import Job, Stage
from launch.process import SMALLER_STEPS
from launch.progress import Progress
from launch.quantities import size_text
from launch.shard_queue import shard_queue
from launch.signals import stop_on_signals
from launch.work import Part, others_line, work_line
from launch.worklog import WorkLog
from store_schema.config import RunConfig
from store_schema.errors import ModelError, Stopped, TokenizerError
from store_schema.plan.plan import ShardRecord
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import MANIFEST_FILE

PROBED_SEGMENTS = 8
"""The longest of the first shard's first segments, this many, is used to check the model."""


def score(engine: Engine, job: Job) -> None:
    """Score the shards of a job; before a source's first one, check its BOS setting."""
    probe_bos(engine, job)
    name, plan = job.source.name, job.source.plan
    pending = job.queue.pending
    total, left = (
        sum(shard.num_tokens[name] for shard in shards)
        for shards in (
            job.part.mine(plan.shards) if job.part.limit is None else pending,
            pending,
        )
    )

    def on_scored(num_positions: int) -> None:
        job.check()
        progress.add(num_positions, f"{size_text(job.written)} written")

    section = job.source.spec.section
    brancher = None
    if section.branches is not None:
        brancher = Brancher.of(
            job.source.run, plan, job.source.tokenizer, section.branches, job.writer.encoding
        )
    with Progress(name, total, unit="tok", done=total - left) as progress:
        try:
            with Pipeline(
                job.source.tokenizer,
                plan,
                job.commit,
                queue_bytes=section.queue_mib << 20,
                records_bad=section.on_bad == "record",
                longest=job.source.spec.longest,
                brancher=brancher,
            ) as pipeline:
                job.check()
                pipeline.score(
                    engine,
                    job.queue,
                    on_scored=on_scored,
                    on_begun=job.session.begun,
                    done_elsewhere=job.queue.done_elsewhere,
                )
        except Stopped:
            job.check()  # a shard may have been committed on the way out
            raise
        except (ModelError, TokenizerError) as error:
            if not job.leaves(error):
                raise
        progress.add(0, f"{size_text(job.written)} written")


def scoring_outlook(source: CheckedSource, pending: Sequence[ShardRecord]) -> str:
    """The line of a dry run for a source."""
    return work_line(f"extract {source.name}", pending, source.name)


SCORING = Stage("extract", "run-source", check_source, score, scoring_outlook, True)


def run_sources(run: RunConfig, names: Sequence[str], part: Part, stage: Stage) -> list[str]:
    """Run a stage for all sources of `names` that have pending shards, each in a child process.

    Args:
        run: The run file.
        names: Sources.
        part: Which of the shards.
        stage: Scoring or generation.

    Returns:
        Names of the sources that had pending shards.

    Raises:
        LogitfuseError: A source cannot be used; nothing was written.
        SystemExit: A child failed and printed why; with its exit code.
    """
    for name in names:
        model_folder(run, name)  # an unusable model is reported even if there is no plan
    plan = open_plan(run)
    sources = [stage.check(run, name, plan) for name in names]
    # Existing stores are opened first, so that a mismatch is found before a new one is made.
    sources.sort(key=lambda source: not source.location.exists(MANIFEST_FILE))
    committed = {s.name: s.open_store().committed(plan.shards) for s in sources}
    pending = {name: part.pending(plan.shards, committed[name]) for name in names}
    # The shards are fixed here: a child restarted after memory ran out must not apply its limit twice.
    parts = {
        name: part.without_stealing() if part.limit is None else part.only(shards)
        for name, shards in pending.items()
        if shards
    }
    if parts and part.limit is None:
        parts[list(parts)[-1]] = part  # the model is loaded: it goes on with what others have left
    forked = [s.name for s in sources if ENGINES[s.spec.section.engine].loader == "transformers"]
    with stop_on_signals() as flag:
        run_children(run, stage.child, parts, flag, forked)
        # Its own shards of all sources came first; the last one's process went on with others'.
        shards = [shard.index for shard in part.shards_of_others(plan.shards)]
        others = {
            s.name: part
            for s in sources
            if s.name not in list(parts)[-1:]
            and not s.open_store().committed_now().issuperset(shards)
        }
        run_children(run, stage.child, others, flag, forked)
    return list(parts | others)


def dry_run(run: RunConfig, names: Sequence[str], part: Part, stage: Stage) -> list[str]:
    """Check what can be checked without loading a model; writes nothing.

    Returns:
        Lines that say what the stage would do for each source.

    Raises:
        LogitfuseError: A source cannot be used, or there is not enough memory.
    """
    for name in names:
        model_folder(run, name)
    plan = open_plan(run)
    lines = []
    for name in names:
        source = stage.check(run, name, plan)
        committed = source.committed()
        pending = part.pending(plan.shards, committed)
        others = others_line(part, plan.shards, committed)
        lines.append(stage.outlook(source, pending) + others)
        if pending:
            lines.append(f"  {check_memory(source.spec)}")
    return lines


def run_source(
    run: RunConfig,
    name: str,
    part: Part,
    stage: Stage = SCORING,
    *,
    stop_fd: int | None = None,
    halvings: int = 0,
) -> None:
    """Run a stage for the pending shards of one source, in this process.

    Args:
        run: The run file.
        name: The source.
        part: Which of the shards.
        stage: Scoring or generation.
        stop_fd: File descriptor of a pipe whose closing asks to stop, or None.
        halvings: How often to halve the engine's batches, because memory ran out.

    Raises:
        Stopped: Asked to stop; committed shards stay.
        LogitfuseError: The source cannot be run.
        SystemExit: Memory ran out, and smaller batches may fit.
    """
    with stop_on_signals() as flag:
        plan = open_plan(run)
        source = stage.check(run, name, plan)
        writer = source.open_store()
        queue = shard_queue(part, plan.shards, writer)
        if not queue:
            return
        spec = halved(source.spec, halvings)
        check_memory(spec)
        check_stop_fd(flag, stop_fd)
        log = WorkLog(run, stage.name, name, part.worker)
        try:
            with log.session(queue.pending, name if stage.planned_tokens else None) as session:
                start = time.monotonic()
                with closing(open_engine(spec)) as engine:
                    seconds = time.monotonic() - start
                    print(f"{name}: {engine.description} ready in {seconds:.1f} s", file=sys.stderr)
                    _require_causal(engine, spec, source, plan.shards[0])
                    stage.work(engine, Job(source, writer, part, queue, session, flag, stop_fd))
        except EngineMemoryError as error:
            if halved(spec, 1) == spec:
                raise
            print(f"{name}: {error.what}; going on with half of that", file=sys.stderr)
            raise SystemExit(SMALLER_STEPS) from error


def _require_causal(
    engine: Engine, spec: EngineSpec, source: CheckedSource, shard: ShardRecord
) -> None:
    if not spec.generates:
        segments = source.plan.segments(shard)[:PROBED_SEGMENTS]
        encoded = source.tokenizer.encode(segments)
        # Longer ones are recorded as unscored (`extract.on_bad`).
        fitting = [part for part in encoded if len(part.input_ids) <= spec.longest]
        require_causal(engine, spec, fitting)


def halved(spec: EngineSpec, times: int) -> EngineSpec:
    """The spec with the engine's batches halved so many times, unless the engine does that itself."""
    import torch

    kind = ENGINES[spec.section.engine]
    fewer: EngineSpec = kind.halved(spec, times, on_cpu=not torch.cuda.is_available())
    return fewer
