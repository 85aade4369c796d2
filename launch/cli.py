"""`logitfuse submit` and `logitfuse preset`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from launch.command import (
    SOURCE_OPTION,
    StageGroup,
    echo_json,
    echo_next,
    echo_pages,
    json_option,
    run_options,
)
from launch.slurm.options import options_of, parse_options
from launch.slurm.script import Job, Place, dependency_options, script_text
from launch.stages import STAGES, Stage, parse_workers, stages_from
from launch.visible import table
from launch.work import chosen_sources, range_text, shard_ranges
from store_schema.config import RunConfig
from store_schema.errors import ConfigError

if TYPE_CHECKING:  # the command line is answered before a store's packages are loaded
    pass


class Amount(click.FloatRange):
    """A number of seconds or of a resource, as Ray takes them.

    Args:
        units: Whether it counts what is shared by fractions of one unit, but not across units.
    """

    def __init__(self, *, units: bool = False) -> None:
        super().__init__(min=0)
        self._units = units

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; a usage error if it is none."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number) or 0 < number < _LEAST:
            self.fail(f"{value} is neither 0 nor a number from {_LEAST}.", param, ctx)
        if self._units and number > 1 and not number.is_integer():
            self.fail(f"{value} is neither a whole number nor a part of one.", param, ctx)
        return number


_LEAST = 0.0001
"""Ray's precision of amounts."""


def ray_options(work: str, gpus_of: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: add --ray and what goes with it; the command gets `ray`, the address, and the others,
    None where not given.

    Args:
        work: What is done on the cluster, for the help.
        gpus_of: Who takes the GPUs.
    """
    options = (
        click.option(
            "--ray",
            metavar="ADDRESS",
            help=f"Run {work} on a Ray cluster instead, and wait for them: auto, or host:port of its "
            "head node. --workers is then the number of workers at a time, by default as many as there "
            "is room for.",
        ),
        click.option(
            "--gpus-per-worker",
            "gpus",
            type=Amount(units=True),
            help=f"With --ray: GPUs of each {gpus_of}.  [default: 1 if there are any]",
        ),
        click.option(
            "--cpus-per-worker",
            "cpus",
            type=Amount(),
            help="With --ray: CPUs of each worker.  [default: 1]",
        ),
        click.option(
            "--node-timeout",
            "node_timeout_s",
            type=Amount(),
            metavar="SECONDS",
            help="With --ray: how long to wait for a first node that has room for a worker, where an "
            "autoscaler starts nodes.  [default: 0]",
        ),
    )

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.command("submit")
@click.argument("stage", type=click.Choice(STAGES))
@run_options
@SOURCE_OPTION
@click.option(
    "--slurm",
    "slurm",
    multiple=True,
    metavar="[STAGE:]KEY=VALUE,...",
    help="Long options of sbatch for all stages, or for one; an empty value removes one.",
)
@click.option(
    "--workers",
    "workers",
    multiple=True,
    metavar="[STAGE:]N",
    help="Workers (tasks of a job array) for each source, in all stages or in one.  [default: 1]",
)
@click.option("--only", is_flag=True, help="Submit just STAGE, not those that follow.")
@click.option("--dry-run", is_flag=True, help="Write and print the scripts, submit nothing.")
@click.option(
    "--force",
    is_flag=True,
    help="Submit even if jobs of this run that do the same work are queued or running.",
)
@ray_options("extraction and alignment", "worker of an extraction")
@json_option
def submit(
    run: RunConfig,
    stage: Stage,
    names: tuple[str, ...],
    slurm: tuple[str, ...],
    workers: tuple[str, ...],
    only: bool,
    dry_run: bool,
    force: bool,
    ray: str | None,
    as_json: bool,
    **of_worker: float | None,
) -> None:
    """Submit STAGE and the stages after it to Slurm, or to a Ray cluster.

    One job array for the extraction of each source, one for its alignment that starts when it is
    extracted, and a training job that starts when all are aligned. Finished work is left out.
    """
    from launch.config import LaunchSection
    from launch.pending import find_pending
    from launch.slurm.jobs import Request, needed_jobs, unaligned
    from launch.slurm.processes import require_segments
    from launch.slurm.submit import (
        array_limits,
        require_free,
        scripts_folder,
        write_scripts,
    )

    section, command_line = run.section("launch", LaunchSection), parse_options(slurm)
    stages, sources = stages_from(stage, only=only), chosen_sources(run, names)
    counts = {**section.workers, **parse_workers(workers)}
    given = {name: value for name, value in of_worker.items() if value is not None}
    if ray is not None:
        from launch.ray.driver import RayRequest, run_on_ray

        require_one_scheduler(
            bool(slurm or dry_run or force), "--slurm, --dry-run and --force", "Slurm"
        )
        run_on_ray(run, stages, sources, RayRequest(ray, counts, section.python, **given))
        if as_json:
            echo_json(
                {"ray": ray, "stages": [s for s in stages if s != "train"], "sources": sources}
            )
        else:
            echo_next("status")
        return
    require_one_scheduler(
        bool(given), "--gpus-per-worker, --cpus-per-worker, --node-timeout", "Ray"
    )
    request = Request(
        stages=stages,
        sources=sources,
        options={name: options_of(name, section.slurm, command_line) for name in STAGES},
        workers=counts,
        limits=array_limits(needs_slurm=not dry_run),
        processes_per_node=section.processes_per_node.get("train"),
    )
    pending = find_pending(run)
    jobs = needed_jobs(request, pending)
    for job in jobs:
        require_segments(run, job.processes)
    waiting, folder = unaligned(request, pending), scripts_folder(run)
    if jobs and not (dry_run or force):
        require_free(folder, jobs)
    if jobs:
        place = write_scripts(run.name, run.resolved(), section, folder, jobs)
    if as_json:
        content = jobs_object(jobs, place, submits=not dry_run) if jobs else {"jobs": []}
        echo_json(content | {"not_aligned": waiting})
        return
    if jobs:
        echo_jobs(jobs, place, submits=not dry_run)
    else:
        click.echo("nothing to do, nothing submitted")
    if waiting:
        click.echo(f"no training job: these would still not be aligned: {', '.join(waiting)}")
    if jobs and not dry_run:
        echo_next("status")


def require_one_scheduler(has_others: bool, options: str, scheduler: str) -> None:
    """Refuse options that are another scheduler's.

    Raises:
        ConfigError: Some are given.
    """
    if has_others:
        raise ConfigError(
            f"options of {scheduler} given to another scheduler",
            where="submit",
            got=f"one of {options}",
            hint="--ray ADDRESS takes Ray, without it Slurm is taken",
        )


def scripts_shown(jobs: Sequence[Job], place: Place) -> str:
    """All scripts as text, each below the sbatch call that submits it."""
    parts = []
    for job in jobs:
        waits = dependency_options([f"<{stem}>" for stem in job.after])
        parts.append(f"### {' '.join(['sbatch', *waits, str(place.script(job))])}\n")
        parts.append(script_text(job, place))
    return "\n".join(parts)


def _tasks(job: Job) -> str:
    """Numbers of an array's workers, and how many there are; "" for one job."""
    if job.part is None:
        return ""
    numbers = range_text(shard_ranges(job.part.offset + task for task in job.part.tasks))
    return f"{numbers} of {job.workers}"


def echo_jobs(jobs: Sequence[Job], place: Place, *, submits: bool) -> None:
    """Submit jobs and print a table of their ids and tasks, what each waits for, and where their output
    goes; without `submits` print the scripts instead.

    Raises:
        ConfigError: Slurm refused one; none is left in the queue.
    """
    if not submits:
        echo_pages(scripts_shown(jobs, place))
        return
    from launch.slurm.submit import submit_jobs

    ids = {each.job.stem: each.job_id for each in submit_jobs(jobs, place)}
    rows = [
        (ids[job.stem], job.stem, ",".join(ids[s] for s in job.after) or "-", _tasks(job))
        for job in jobs
    ]
    click.echo("\n".join(table(("id", "job", "waits for", "tasks"), rows, left=range(4))))
    click.echo(f"scripts and their output: {place.folder}")


def jobs_object(jobs: Sequence[Job], place: Place, *, submits: bool) -> dict[str, Any]:
    """Submit jobs; their ids, tasks and scripts for JSON. Without `submits` they have no id.

    Raises:
        ConfigError: Slurm refused one; none is left in the queue.
    """
    from launch.slurm.submit import submit_jobs

    ids = {each.job.stem: each.job_id for each in submit_jobs(jobs, place)} if submits else {}
    rows = [
        {
            "id": ids.get(job.stem),
            "job": job.stem,
            "after": list(job.after),
            "tasks": _tasks(job) or None,
            "script": place.script(job),
        }
        for job in jobs
    ]
    return {"folder": place.folder, "jobs": rows}


@click.group("preset", cls=StageGroup)
def preset() -> None:
    """Recipes of published papers: `preset: NAME` in a run file makes one its defaults."""


@preset.command("list")
@json_option
def list_presets(as_json: bool) -> None:
    """List every preset with its paper."""
    from store_schema.papers import preset_names, preset_title

    titles = {name: preset_title(name) for name in preset_names()}
    if as_json:
        echo_json({"presets": titles})
        return
    width = max(map(len, titles))
    for name, title in titles.items():
        click.echo(f"{name:{width}}  {title}")


@preset.command("show")
@click.argument("name")
@json_option
def show_preset(name: str, as_json: bool) -> None:
    """Print a preset in the form of a run file, with a comment at each value.

    A comment says where the value comes from: the paper, its public code, or our own choice and why.
    Page by page on a terminal.
    """
    import yaml

    from store_schema.papers import preset_text, preset_title

    text = preset_text(name)
    if as_json:
        content = {"name": name, "title": preset_title(name), "values": yaml.safe_load(text)}
        echo_json(content)
    else:
        echo_pages(text)
