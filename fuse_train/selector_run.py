"""`logitfuse train selector`: trains and saves a selector on the stores alone, and scores its pool."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fuse_train.config import TrainSection
from fuse_train.data.stream import SampleStream
from fuse_train.disk.folders import publish_folder, sweep
from fuse_train.inputs import open_inputs, output_folder, stream_options
from fuse_train.selector_fit.selector_start import (
    SelectorStart,
    learned_options,
    selector_fingerprint,
)
from fuse_train.selector_fit.selector_training import PoolSums, pool_nll, split_batches
from fuse_train.selectors import SELECTORS
from fuse_train.selectors.selectors import Selector, StaticSelector
from launch.signals import stop_on_signals
from launch.visible import table
from store_schema import SCHEMA_VERSION
from store_schema.config import RunConfig, StrictModel
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import ConfigError, MismatchError

TRAINED_FILE = "trained.json"


class TrainedRecord(StrictModel):
    """trained.json: what a saved selector was made from, and what pools score on the valid split."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    """Of recipe, stores and seed."""
    sources: tuple[str, ...]
    """Names of the sources it was trained with."""
    split: str
    """Split that the pools are scored on."""
    bpb: dict[str, dict[str, float]]
    """Bits per byte of each pool by domain, on the rows where every source knows the label."""
    hindsight: tuple[str, ...]
    """Pools whose weights saw the labels."""


@dataclass(frozen=True, slots=True)
class TrainedSelector:
    """A saved selector.

    Args:
        folder: Where it is; may be given as `start_from`.
        record: Its trained.json.
        fresh: False when it had been finished before.
        field: Name of its options in the train section.
    """

    folder: Path
    record: TrainedRecord
    fresh: bool
    field: str


def selector_folder(run: RunConfig, name: str) -> Path:
    """Output folder of the selector that is trained alone."""
    return output_folder(run) / "selectors" / name


def train_alone(run: RunConfig) -> TrainedSelector:
    """Train the section's selector on the training split's stores and score pools on the valid split.

    The target's tokenizer is needed, its weights are not.

    Raises:
        ConfigError: The section's selector does not learn, or would start from its own output, or a
            split is missing.
        MismatchError: The output folder holds another selector.
        MissingError: Plan, stores or shards are not there yet.
        ModelError: A loss that is not finite.
        Stopped: A signal asked to stop; nothing is written.
    """
    section = run.section("train", TrainSection)
    options = learned_options(section)
    folder = selector_folder(run, section.selector)
    inputs = open_inputs(run, section)
    sweep(folder.parent)
    _check_start(folder, section, options.start_from)
    expected = selector_fingerprint(section, run.seed, inputs.samples)
    done = _read(folder)
    if done is not None and done.fingerprint == expected:
        return TrainedSelector(folder, done, False, section.selector_kind.field)
    if done is not None:
        raise MismatchError(
            "a selector trained by another recipe, or on other stores, is there",
            where=folder,
            hint="undo the change, or give the run another name, or move or delete the folder",
        )
    valid = open_inputs(run, section, section.valid_split)
    stream = SampleStream(
        inputs.samples, stream_options(run, section), inputs.domains, with_entries=False
    )
    with stop_on_signals() as stop:
        start = SelectorStart(
            section, run.seed, stream, lambda: valid.samples, best_device(), stop.check
        )
        selector = start.trained().cpu()
    named = baselines(section, inputs.samples.sources) | {section.selector: selector}
    batches = list(split_batches(valid.samples, valid.domains))
    record = TrainedRecord(
        fingerprint=expected,
        sources=inputs.samples.sources,
        split=section.valid_split,
        bpb={name: bits_per_byte(pool_nll(other, batches)) for name, other in named.items()},
        hindsight=tuple(name for name, other in named.items() if other.hindsight),
    )
    publish_folder(folder, lambda path: _write(path, selector, record))
    return TrainedSelector(folder, record, True, section.selector_kind.field)


def baselines(section: TrainSection, sources: tuple[str, ...]) -> dict[str, Selector]:
    """Selectors to compare with, by name: each source alone, and rules that need no training."""
    alone: dict[str, Selector] = {
        f"{source} alone": StaticSelector([float(name == source) for name in sources])
        for source in sources
    }
    rules = [kind for kind in SELECTORS if kind.by_rule and not kind.needs_options]
    rules.sort(key=lambda kind: kind.hindsight)
    return alone | {kind.name: kind.make(section.options_of(kind), sources) for kind in rules}


def bits_per_byte(sums: Mapping[str, PoolSums]) -> dict[str, float]:
    """Bits per byte by domain, without domains that have no scored row."""
    return {
        domain: one.nats / math.log(2) / one.num_bytes
        for domain, one in sorted(sums.items())
        if one.num_bytes
    }


def pool_table(trained: TrainedSelector) -> str:
    """Table of pools by domain; the last column is the mean of the domains."""
    record = trained.record
    domains = sorted({domain for values in record.bpb.values() for domain in values})
    rows = []
    for name, values in record.bpb.items():
        cells = [values.get(domain) for domain in domains]
        known = [value for value in cells if value is not None]
        cells.append(sum(known) / len(known) if known else None)
        shown = ("-" if value is None else f"{value:.4f}" for value in cells)
        rows.append([f"{name} (hindsight)" if name in record.hindsight else name, *shown])
    head = [f"pools, bits per byte, split {record.split}", *(d[:12] for d in domains), "mean"]
    saved = f"saved in {trained.folder}; reuse it with train.{trained.field}.start_from"
    return "\n".join([*table(head, rows), saved])


def best_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_start(folder: Path, section: TrainSection, start: str | None) -> None:
    """Refuse to start from the selector that would be overwritten."""
    if start is not None and Path(start).resolve() == folder.resolve():
        raise ConfigError(
            "selector would be trained from what it replaces",
            where=f"train.{section.selector_kind.field}.start_from",
            got=start,
            hint="move that folder and name its new place, or give the run another name",
        )


def _read(folder: Path) -> TrainedRecord | None:
    path = folder / TRAINED_FILE
    if not path.exists():
        return None
    return unseal(TrainedRecord, path.read_bytes(), where=str(path))


def _write(folder: Path, selector: Selector, record: TrainedRecord) -> None:
    selector.save(folder)
    (folder / TRAINED_FILE).write_bytes(seal(record))
