"""The train stage: the fused run, then the CLM control, each resumed, or skipped if finished.

Nothing here imports torch at the top, so a run that is finished needs no time to load it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fuse_train.config import TrainSection
from fuse_train.disk.folders import sweep
from fuse_train.inputs import (
    Inputs,
    check_domains,
    final_fingerprint,
    final_folder,
    job_fingerprint,
    open_inputs,
    output_folder,
    stream_options,
    warn_of_authors,
)
from fuse_train.loop.trackers import tracker_names
from fuse_train.machine.allocator import keep_freed_memory
from fuse_train.machine.launchers import as_launched, check_launcher, check_parallel
from fuse_train.machine.processes import is_main, process_count, quiet_unless_main
from fuse_train.pairs import merge_pairs, pair_runs
from fuse_train.publish.done import DoneRecord, read_done
from fuse_train.publish.hub import push_final
from launch.signals import StopFlag, stop_on_signals
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, MismatchError

__all__ = [
    "Inputs",
    "Outcome",
    "final_folder",
    "job_fingerprint",
    "open_inputs",
    "output_folder",
    "stream_options",
    "train_run",
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished training.

    Args:
        record: Record of its final folder.
        folder: The final folder.
        fresh: False when it had been finished before.
        name: "fused", "control", or "with SOURCE" of a pair.
    """

    record: DoneRecord
    folder: Path
    fresh: bool
    name: str


def train_run(run: RunConfig, *, only: str | None = None) -> list[Outcome]:
    """Train what is not finished.

    Args:
        run: The run file.
        only: With pairwise fusion, train only this source's pair, and merge nothing.

    Returns:
        The fused outcome (with pairwise fusion after those of its pairs), then the control's where the
        config asks for it.

    Raises:
        ConfigError: Options or a launcher that cannot work.
        InputError: Text that cannot be trained on.
        MissingError: Plan, stores or shards are not there yet.
        MismatchError: Things that do not belong together.
        ModelError: The target cannot be trained, or a step was not finite.
        StorageError: A file cannot be written, or the hub refused.
        Stopped: A signal asked to stop.
    """
    section = run.section("train", TrainSection)
    if only is not None and section.pairwise is None:
        raise ConfigError(
            "the run has no pairs", where="--pair", expected="train.pairwise", got=only
        )
    quiet_unless_main()
    keep_freed_memory()
    check_launcher()
    launched = as_launched(section)
    if launched is not section:
        section, run = launched, _with_section(run, launched)
    check_parallel(section)
    tracker_names(section)
    if section.lora is not None:
        from fuse_train.model.adapters import check_lora

        check_lora(section.lora)
    inputs = open_inputs(run, section)
    check_domains(inputs, section)
    warn_of_authors(inputs, section)
    with stop_on_signals() as stop:
        if section.pairwise is None:
            outcomes = [_train_one(inputs, "fused", section, stop)]
        else:
            outcomes = _train_pairs(run, section, stop, only)
        stop.check()
        if section.control and only is None:
            outcomes.append(_train_one(inputs, "control", section.control_section(), stop))
    return outcomes


def _with_section(run: RunConfig, section: TrainSection) -> RunConfig:
    return run.model_copy(update={"sections": run.sections | {"train": section}})


def _train_pairs(
    run: RunConfig, section: TrainSection, stop: StopFlag, only: str | None
) -> list[Outcome]:
    """Train every pair, or one alone; where all are trained, merge them."""
    runs = pair_runs(run, section)
    if only is not None and only not in runs:
        raise ConfigError("no such pair", where="--pair", expected=", ".join(runs), got=only)
    others = output_folder(run) / "checkpoints"
    if any(others.glob("step-*")):
        raise MismatchError(
            "checkpoints of a training without pairs are in the run's folder",
            where=others,
            hint="take another run_dir, or delete them",
        )
    outcomes = {}
    for name, pair in runs.items():
        if only in (None, name):
            recipe = pair.section("train", TrainSection)
            trained = _train_one(open_inputs(pair, recipe), "fused", recipe, stop)
            outcomes[name] = replace(trained, name=f"with {name}")
            stop.check()
    if only is not None:
        return list(outcomes.values())
    folders = {name: outcome.folder for name, outcome in outcomes.items()}
    with _main_process_first():
        folder, fresh = merge_pairs(run, section, folders)
    record = read_done(folder)
    if record is None:
        raise MismatchError("final folder vanished", where=folder)
    return [*outcomes.values(), Outcome(record, folder, fresh, "fused")]


@contextmanager
def _main_process_first() -> Iterator[None]:
    if process_count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def _train_one(inputs: Inputs, label: str, section: TrainSection, stop: StopFlag) -> Outcome:
    final = final_folder(inputs.run, label)
    job = job_fingerprint(inputs, label, section)
    expected = final_fingerprint(inputs.run, job)
    # Several processes look together, behind a barrier: see `train`.
    record = _finished(final, expected) if process_count() == 1 else None
    fresh = record is None
    if record is None:
        from fuse_train.training import train

        record, fresh = train(inputs, label, section, stop, job)
    if section.push_to_hub is not None and is_main():
        push_final(final, section.push_to_hub, private=section.hub_private, fingerprint=expected)
    return Outcome(record, final, fresh, label)


def _finished(final: Path, expected: str) -> DoneRecord | None:
    sweep(final.parent)
    sweep(final.parent / "checkpoints")
    return read_done(final, expected)
