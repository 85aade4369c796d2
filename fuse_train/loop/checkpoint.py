"""Checkpoints, written under a temporary name and renamed when complete.

    checkpoints/step-000200/            loads with AutoModelForCausalLM as it is
        config.json, model.safetensors  (with LoRA adapter_config.json, adapter_model.safetensors)
        tokenizer files
        trainer/state.json              sealed: step, stream position, best so far, fingerprint
        trainer/optimizer.safetensors   state by parameter number
        parts/                          instead of weights and optimizer, where they are spread over
                                        processes (fuse_train/sharding/part_files.py)
        trainer/selector.safetensors    where the selector has weights
        trainer/first_readings.parquet  where the posterior gate will need them in a later pass
        files.json                      sealed: size and CRC-32C of every file above
    checkpoints/best-000150/            weights of the best evaluation so far, with files.json

There is no pickle. Random states need no saving: each step seeds them from (seed, step, process).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from fuse_train.disk.checksums import check_files, with_checksums
from fuse_train.disk.folders import discard_folder, publish_folder
from fuse_train.gate.first_reading import FirstReadings
from fuse_train.selectors.selectors import Selector
from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import CorruptionError, MismatchError

STATE_FILE = "trainer/state.json"
PREVIOUS_CHECKPOINT_HINT = (
    "delete the folder to go on from the checkpoint before, or from the start"
)
_STEP_NAME = re.compile(r"^step-(\d+)$")
_BEST_NAME = re.compile(r"^best-(\d+)$")


class BestRecord(StrictModel):
    """The best evaluation so far."""

    step: int = Field(ge=0)
    bpb: dict[str, float]
    """Bits per byte by domain."""

    @property
    def mean(self) -> float:
        """Mean over domains: what 'best' means."""
        return sum(self.bpb.values()) / len(self.bpb)


class TrainState(StrictModel):
    """trainer/state.json: all that a resumed run needs beside weights."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    """Of config, plan, stores and target; a run with another one does not resume from it."""
    step: int = Field(ge=0)
    """Optimizer steps done; the next one's generators are seeded from it."""
    next_sample: int = Field(ge=0)
    """Number of samples drawn so far, over all epochs."""
    before: dict[str, float] | None = None
    """Bits per byte by domain before training."""
    best: BestRecord | None = None
    """None while nothing was evaluated."""
    stale: int = Field(default=0, ge=0)
    """Evaluations since the best one."""
    fusion_shares: dict[str, float] = Field(default_factory=dict)
    """Share of its weight that the fusion loss keeps, by domain, from the last evaluation."""
    seconds: float = Field(default=0.0, ge=0)
    """Training time so far, over all starts."""


def numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Complete folders of one kind by step, lowest first."""
    if not folder.is_dir():
        return {}
    by_step = {int(match[1]): p for p in folder.iterdir() if (match := pattern.match(p.name))}
    return dict(sorted(by_step.items()))


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Checkpoints by step."""
    return numbered(checkpoints, _STEP_NAME)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return checkpoints / f"step-{step:06d}"


def best_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the weights of the best evaluation, at `step`."""
    return checkpoints / f"best-{step:06d}"


def latest_checkpoint(checkpoints: Path, fingerprint: str) -> tuple[Path, TrainState] | None:
    """The checkpoint to resume from, None when there is none.

    Raises:
        MismatchError: It was made from another config, plan, store or target.
        CorruptionError: One of its files is damaged.
    """
    folders = step_folders(checkpoints)
    if not folders:
        return None
    path = folders[max(folders)]
    if not (path / STATE_FILE).exists():
        raise CorruptionError("checkpoint without state", where=path, hint=PREVIOUS_CHECKPOINT_HINT)
    where = path / STATE_FILE
    state = unseal(TrainState, where.read_bytes(), where=str(where), hint=PREVIOUS_CHECKPOINT_HINT)
    if state.fingerprint != fingerprint:
        raise MismatchError(
            "checkpoint was made from another config, plan, store or target",
            where=path,
            expected=f"fingerprint {fingerprint}",
            got=f"fingerprint {state.fingerprint}",
            hint="undo the change, or give the run another name (or delete checkpoints) to start again",
        )
    check_files(path, hint=PREVIOUS_CHECKPOINT_HINT)
    return path, state


def save_checkpoint(
    checkpoints: Path,
    state: TrainState,
    save_tensors: Callable[[Path], object],
    tokenizer: Any,
    selector: Selector | None,
    readings: FirstReadings | None = None,
    *,
    limit: int,
) -> Path:
    """Publish a checkpoint, then delete the oldest beyond `limit` and their best weights.

    Args:
        checkpoints: Folder of the checkpoints.
        state: trainer/state.json.
        save_tensors: Writes weights and optimizer into a folder, which has a folder `trainer`.
        tokenizer: The target's.
        selector: None for ground truth alone.
        readings: None where each row is read once.
        limit: Checkpoints to keep.

    Raises:
        StorageError: A file cannot be written; earlier checkpoints are kept.
    """
    path = step_folder(checkpoints, state.step)

    def write(folder: Path) -> None:
        inner = folder / "trainer"
        inner.mkdir()
        save_tensors(folder)
        tokenizer.save_pretrained(folder)
        if selector is not None and selector.learns:
            selector.save(inner)
        if readings is not None:
            readings.save(inner)
        (folder / STATE_FILE).write_bytes(seal(state))

    publish_folder(path, with_checksums(write))
    folders = step_folders(checkpoints)
    for step in list(folders)[:-limit]:
        if step != state.step:
            discard_folder(folders.pop(step))
    _drop_unnamed_best(checkpoints, list(folders.values()))
    return path


def _drop_unnamed_best(checkpoints: Path, kept: list[Path]) -> None:
    """Delete best weights that no kept checkpoint has as its best."""
    named = set()
    for path in kept:
        where = path / STATE_FILE
        state = unseal(TrainState, where.read_bytes(), where=str(where))
        named.add(None if state.best is None else state.best.step)
    for step, path in numbered(checkpoints, _BEST_NAME).items():
        if step not in named:
            discard_folder(path)
