"""A study on a Ray cluster: each training, and each scoring of a model, is a task."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click

from fuse_eval.study.config import StudyConfig
from fuse_eval.study.grid import Place
from fuse_eval.study.results import units_of
from launch.ray.cluster import connect, failure, probe_file
from launch.ray.commands import Command, CommandDriver, CommandSpec, NodeShare
from launch.signals import stop_on_signals

ROUNDS = 2
"""Rows that are tuned as others are trained in the second one, when these are there."""


@dataclass(frozen=True, slots=True)
class StudyRequest:
    """What is asked of a Ray cluster.

    Args:
        address: "auto", or host:port of the head node.
        share: What each task takes of a node.
    """

    address: str
    share: NodeShare


def run_study_on_ray(
    study: StudyConfig, file: str, places: Sequence[Place], request: StudyRequest
) -> None:
    """Make the data of a study, then do what is left of its trainings and scorings, and wait for it.

    Args:
        study: The study.
        file: Its file, which nodes must see, as they must see its folder.
        places: The seeds of its settings, from `checked_places`.
        request: What is asked of the cluster.

    Raises:
        ConfigError: Ray is not there, does not answer, fails, or has no node for a task.
        ModelError: A task is lost again and again.
        Stopped: Asked to stop; what is scored stays.
        SystemExit: A task has failed and said why; with its exit code.
    """
    if all(unit.done for place in places for unit in units_of(study, place)):
        click.echo("nothing to do")
        return
    path = os.path.abspath(file)
    ray = connect(request.address)  # sets signal handlers of its own
    with stop_on_signals() as stop, probe_file(str(study.folder)) as probe:
        spec = CommandSpec(os.getcwd(), study.submit.python, probe)
        driver = CommandDriver(ray, request.share, spec, stop)
        try:
            driver.run(list(data_commands(path, places)), _told)
            for _ in range(ROUNDS):
                driver.run(list(unit_commands(study, path, places)), _told)
        except ray.exceptions.RayError as error:
            raise failure(error, request.address) from error


def _told(command: Command) -> None:
    click.echo(f"{command.title}: done", err=True)


def data_commands(file: str, places: Sequence[Place]) -> Iterator[Command]:
    """One for each data set, which makes it for all its settings and seeds."""
    by_folder: dict[str, list[Place]] = {}
    for place in places:
        by_folder.setdefault(str(place.data.folder), []).append(place)
    for folder, own in by_folder.items():
        words = ["study", "run", file, "--data-only"]
        for name in dict.fromkeys(place.setting for place in own):
            words += ["--setting", name]
        for seed in dict.fromkeys(place.seed for place in own):
            words += ["--seed", str(seed)]
        yield Command(f"data in {folder}", tuple(words))


def unit_commands(study: StudyConfig, file: str, places: Sequence[Place]) -> Iterator[Command]:
    """One for each training or scoring that is left and waits for no other, shared ones once."""
    given: set[str] = set()
    for place in places:
        units = list(units_of(study, place))
        for unit in units:
            results = unit.cell.model_results if unit.recipe is None else unit.recipe.results
            if unit.done or unit.waits or str(results) in given:
                continue
            given.add(str(results))
            title = f"{place.setting}, seed {place.seed}, {results.name}"
            words = ("study", "run", file, "--setting", place.setting, "--seed", str(place.seed))
            worker = ("--worker", f"{unit.number}/{len(units)}")
            yield Command(title, (*words, *worker))
