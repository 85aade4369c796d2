"""The jobs that a run still needs, and what each waits for, from what is pending alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from launch.pending import Pending
from launch.slurm.script import ArrayLimits, ArrayPart, Job, array_parts
from launch.stages import ShardedStage, Stage
from store_schema.errors import MissingError


@dataclass(frozen=True, slots=True)
class Request:
    """What the user wants to submit.

    Args:
        stages: Consecutive stages.
        sources: Sources to extract and align.
        options: sbatch's options by stage.
        workers: Workers of each source, by stage.
        limits: The cluster's limits.
        processes_per_node: Processes of a training on each node without GPUs; None for one.
    """

    stages: tuple[Stage, ...]
    sources: tuple[str, ...]
    options: Mapping[Stage, Mapping[str, str]]
    workers: Mapping[ShardedStage, int]
    limits: ArrayLimits
    processes_per_node: int | None = None


def needed_jobs(request: Request, pending: Pending) -> list[Job]:
    """The jobs to submit, in an order in which each comes after those it waits for.

    An alignment waits for the extraction of its source; training waits for all alignments. In pairwise
    training each pair is a job, and the last job, which merges, waits for them all. Training is left
    out if a source would still not be aligned then, unless only training is requested.

    Raises:
        MissingError: Input of a requested stage is neither there nor requested.
    """
    pending.require_extracted(request.stages, request.sources)
    jobs: list[Job] = []
    alignments: list[str] = []
    for source in request.sources:
        extraction: list[Job] = []
        if "extract" in request.stages:
            extraction = _arrays("extract", source, request, pending.extract[source], ())
        waits = tuple(job.stem for job in extraction)
        alignment: list[Job] = []
        if "align" in request.stages:
            alignment = _arrays("align", source, request, pending.align[source], waits)
        jobs += extraction + alignment
        alignments += [job.stem for job in alignment]
    missing = unaligned(request, pending)
    if missing and request.stages == ("train",):
        raise MissingError(
            "sources are not aligned",
            where=", ".join(missing),
            hint="`logitfuse submit extract` submits what is missing, and the training after it",
        )
    if "train" in request.stages and pending.train and not missing:
        options, after = request.options["train"], tuple(alignments)
        training = partial(Job, "train", processes_per_node=request.processes_per_node)
        # Two pairs or more: one alone is trained by the job that merges.
        pairs = pending.pairs if len(pending.pairs) > 1 else ()
        of_pairs = [training(source, options, after=after) for source in pairs]
        jobs += of_pairs
        jobs.append(training(None, options, after=(*after, *(job.stem for job in of_pairs))))
    return jobs


def unaligned(request: Request, pending: Pending) -> list[str]:
    """Sources that prevent a training job: neither aligned nor to be aligned by the request."""
    if "train" not in request.stages or not pending.train:
        return []
    coming = request.sources if "align" in request.stages else ()
    return [source for source, shards in pending.align.items() if shards and source not in coming]


def _arrays(
    stage: ShardedStage,
    source: str,
    request: Request,
    pending: Collection[int],
    after: tuple[str, ...],
) -> list[Job]:
    """Job arrays of one source, with only the workers that have something to do."""
    workers = request.workers.get(stage, 1)
    parts: list[ArrayPart] = array_parts({shard % workers for shard in pending}, request.limits)
    options = request.options[stage]
    return [
        Job(stage, source, options, workers, part, number if len(parts) > 1 else 0, after)
        for number, part in enumerate(parts, start=1)
    ]
