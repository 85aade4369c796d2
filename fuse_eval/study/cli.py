"""`logitfuse study`: plan, make, train and show a grid of trainings."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.cli import ray_options, require_one_scheduler
from launch.command import StageGroup, cost_options, echo_json, json_option, set_up_logging
from launch.quantities import duration_text
from launch.signals import stop_on_signals, stop_when_closed
from launch.visible import table
from launch.work import parse_worker
from store_schema.errors import ConfigError

if TYPE_CHECKING:  # the command line is answered before torch is loaded
    from fuse_eval.study.config import StudyConfig

RECORD_FILE, MARKDOWN_FILE, PAGE_FILE = "study.json", "study.md", "index.html"


@click.group(cls=StageGroup)
def study() -> None:
    """Compare many trainings over shared stores: selectors, losses, baselines, seeds."""


def study_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: add the study file, --setting and --seed."""
    for option in (
        click.option(
            "--seed",
            "seeds",
            multiple=True,
            type=click.IntRange(min=0),
            help="Only this seed (may be repeated). Default: all of a setting.",
        ),
        click.option(
            "--setting",
            "settings",
            multiple=True,
            metavar="NAME",
            help="Only this setting (may be repeated). Default: all.",
        ),
        click.argument("file", metavar="STUDY", type=click.Path(dir_okay=False)),
    ):
        function = option(function)
    return function


def _chosen(settings: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The words that choose these settings and seeds."""
    words = [word for name in settings for word in ("--setting", name)]
    return [*words, *(word for seed in seeds for word in ("--seed", str(seed)))]


def _echo_next(command: str, file: str) -> None:
    click.echo(f"next: logitfuse study {command} {shlex.quote(file)}", err=True)


@study.command("plan")
@study_options
@cost_options
@json_option
def plan_command(
    file: str,
    settings: tuple[str, ...],
    seeds: tuple[int, ...],
    rate: float,
    tflops: float,
    as_json: bool,
) -> None:
    """Check the study and its rows, and show what is done and left, and what all of it costs.

    Models are neither loaded nor downloaded: of those on this machine the headers of weight files say
    their size, of others `expected` in the study file.
    """
    from extract.estimate.costs import Assumed
    from fuse_eval.study.config import load_study
    from fuse_eval.study.costs.estimate import study_costs
    from fuse_eval.study.costs.report import costs_record, costs_text
    from fuse_eval.study.grid import checked_places
    from fuse_eval.study.results import progress_of

    loaded, assumed = load_study(file), Assumed(tflops, rate)
    places = checked_places(loaded, settings, seeds)
    progress = [progress_of(loaded, place) for place in places]
    parts: list[dict[str, Any]] = [
        {"setting": place.setting, "seed": place.seed, "done": found.done, "total": found.total}
        | {"seconds_left": found.seconds_left}
        for place, found in zip(places, progress, strict=True)
    ]
    left = [found.seconds_left for found in progress]
    left_s = None if None in left else sum(filter(None, left))
    costs = study_costs(loaded, places, assumed)
    if as_json:
        echo_json(
            {
                **{"study": loaded.name, "parts": parts, "seconds_left": left_s},
                "costs": costs_record(loaded, costs, assumed),
            }
        )
        return
    rows = [
        (
            *(part["setting"], part["seed"], f"{part['done']} of {part['total']}"),
            "?" if part["seconds_left"] is None else duration_text(part["seconds_left"]),
        )
        for part in parts
    ]
    click.echo("\n".join(table(("setting", "seed", "done", "left"), rows)))
    if left_s is not None:
        click.echo(f"left: {duration_text(left_s)} of training, on one machine like the one so far")
    click.echo(f"\n{costs_text(loaded, costs, assumed)}")
    _echo_next("run" if any(part["done"] < part["total"] for part in parts) else "show", file)


@study.command("run")
@study_options
@click.option(
    "--worker",
    metavar="I/N",
    help="Every N-th training, beginning with the I-th (from 0). Default: Slurm's array task or an "
    "indexed job; else all.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Trainings at a time on this machine, each with its part of the CPU cores.",
)
@click.option("--data-only", is_flag=True, help="Only make inputs, corpus, plan and stores.")
@click.option("--stop-fd", type=int, hidden=True, help="Pipe; the command stops when it is closed.")
@json_option
def run_command(
    file: str,
    settings: tuple[str, ...],
    seeds: tuple[int, ...],
    worker: str | None,
    processes: int,
    data_only: bool,
    stop_fd: int | None,
    as_json: bool,
) -> None:
    """Make the stores, then do every training that is not done, and score it.

    A stopped study goes on where it was: scores of what is trained are kept, weights are not.
    """
    set_up_logging()
    part = parse_worker(worker)
    from fuse_eval.study.config import load_study
    from fuse_eval.study.grid import checked_places
    from fuse_eval.study.results import progress_of
    from fuse_eval.study.side_by_side import run_side_by_side
    from fuse_eval.study.work import make_data, run_place

    if processes > 1 and part.count > 1:
        raise ConfigError("goes without --worker", where="--processes", got=str(processes))
    loaded = load_study(file)
    places = checked_places(loaded, settings, seeds)
    with stop_on_signals() as stop:
        if stop_fd is not None:
            stop_when_closed(stop, stop_fd)
        if processes > 1:
            for place in places:
                click.echo(
                    f"{place.setting}, seed {place.seed}: data in {place.data.folder}", err=True
                )
                make_data(loaded, place, stop)
            if not data_only:
                run_side_by_side([file, *_chosen(settings, seeds)], processes, stop)
        for place in places:
            title = f"{place.setting}, seed {place.seed}"
            click.echo(f"{title}: data in {place.data.folder}", err=True)
            make_data(loaded, place, stop)
            for done in () if data_only else run_place(loaded, place, part, stop):
                score = "" if done.bpb is None else f": {done.bpb:.4f} bits per byte (valid)"
                spent = f", {duration_text(done.seconds)}" if done.seconds > 1 else ""
                click.echo(f"{title}, {done.title}{score}{spent}", err=True)
    progress = [progress_of(loaded, place) for place in places]
    left = sum(found.total - found.done for found in progress)
    if left and as_json:
        echo_json({"study": loaded.name, "left": left})
    elif data_only and not as_json:
        _echo_next("run" if left else "show", file)
    elif left:
        click.echo(f"{left} trainings are other workers'; run again when they have ended")
    else:
        _show(loaded, as_json=as_json)


@study.command("submit")
@study_options
@click.option(
    "--slurm",
    "slurm",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Long options of sbatch for all jobs, over those of the study file's `submit`.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Tasks of the arrays that train. Default: the study file's `submit.workers`; on Ray as many "
    "as there is room for.",
)
@click.option("--dry-run", is_flag=True, help="Write and print the scripts, submit nothing.")
@click.option(
    "--force", is_flag=True, help="Submit even if jobs of this study are queued or running."
)
@ray_options("data, trainings and scorings", "of them")
@json_option
def submit_command(
    file: str,
    settings: tuple[str, ...],
    seeds: tuple[int, ...],
    slurm: tuple[str, ...],
    workers: int | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    ray: str | None,
    **of_worker: Any,
) -> None:
    """Submit the study to Slurm: data, then an array of trainings, then the page. Or to a Ray cluster.

    A job that nears its time limit is started again, and goes on where it was.
    """
    from fuse_eval.study.config import load_study
    from fuse_eval.study.grid import cells_of, checked_places
    from fuse_eval.study.jobs import study_jobs
    from fuse_eval.study.results import progress_of
    from launch.cli import echo_jobs, jobs_object
    from launch.slurm.options import parse_options
    from launch.slurm.submit import array_limits, require_free, write_scripts

    loaded = load_study(file)
    given = {name: value for name, value in of_worker.items() if value is not None}
    if ray is not None:
        from fuse_eval.study.on_ray import StudyRequest, run_study_on_ray
        from launch.ray.commands import NodeShare

        require_one_scheduler(
            bool(slurm or dry_run or force), "--slurm, --dry-run and --force", "Slurm"
        )
        share = NodeShare(at_a_time=workers, **given)
        places = checked_places(loaded, settings, seeds)
        run_study_on_ray(loaded, file, places, StudyRequest(ray, share))
        _show(loaded, as_json=as_json)
        return
    require_one_scheduler(
        bool(given), "--gpus-per-worker, --cpus-per-worker, --node-timeout", "Ray"
    )
    # Options of one stage (`train:time=...`) are none of a study's.
    options = parse_options([f"all:{text}" for text in slurm]).get("all", {})
    places = checked_places(loaded, settings, seeds)
    progress = [progress_of(loaded, place) for place in places]
    left = sum(found.total - found.done for found in progress)
    if not left:
        if as_json:
            echo_json({"jobs": []})
        else:
            click.echo("nothing to do, nothing submitted")
        return
    jobs = study_jobs(
        loaded.submit,
        options,
        array_limits(needs_slurm=not dry_run),
        workers=min(workers or loaded.submit.workers, left),
        tuned=any(cell.row.tuned_as for place in places for cell in cells_of(loaded, place)),
        words=tuple(_chosen(settings, seeds)),
    )
    folder = Path(os.path.abspath(loaded.folder / "logs" / "slurm"))
    if not (dry_run or force):
        require_free(folder, jobs)
    content = Path(file).read_text(encoding="utf-8")
    place = write_scripts(loaded.name, content, loaded.submit, folder, jobs, "study.yaml")
    if as_json:
        echo_json(jobs_object(jobs, place, submits=not dry_run))
        return
    echo_jobs(jobs, place, submits=not dry_run)
    if not dry_run:
        _echo_next("plan", file)


@study.command("show")
@click.argument("file", metavar="STUDY", type=click.Path(dir_okay=False))
@json_option
def show_command(file: str, as_json: bool) -> None:
    """Write the study's page, Markdown table and JSON from what is done, and show the table."""
    from fuse_eval.study.config import load_study

    _show(load_study(file), as_json=as_json)


def _show(loaded: StudyConfig, *, as_json: bool) -> None:
    """Write the three files; print the JSON object, or the tables with the place of the page."""
    from fuse_eval.study.page import render_page
    from fuse_eval.study.report import markdown, study_record, text
    from store_schema.disk.location import open_location

    record: dict[str, Any] = study_record(loaded)
    location = open_location(str(loaded.results))
    content = json.dumps(record, ensure_ascii=False, allow_nan=False)
    location.write_atomic(RECORD_FILE, content.encode() + b"\n")
    location.write_atomic(MARKDOWN_FILE, markdown(loaded, record).encode())
    location.write_atomic(PAGE_FILE, render_page(loaded, record).encode())
    if as_json:
        echo_json(record)
    else:
        click.echo(f"{text(loaded, record)}\npage: {location.url}/{PAGE_FILE}")
