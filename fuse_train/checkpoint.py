"""Checkpoints and final folders: written aside, renamed into place, never half there.

    checkpoints/step-000200/            loads with AutoModelForCausalLM as it is
        config.json, model.safetensors, tokenizer files
        trainer/state.json              sealed: step, stream position, best so far, fingerprint
        trainer/optimizer.safetensors   moments by parameter number
        trainer/selector.safetensors    where the selector has weights
    checkpoints/best-000150/            weights of the best evaluation so far

There is no pickle. Generators have no state to keep: each step seeds them from (seed, step, process).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fuse_train.asn import AdaptiveSelector
from fuse_train.selectors import Selector
from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.errors import CorruptionError, MismatchError
from store_schema.location import storage_errors
from store_schema.sealed import seal, unseal

STATE_FILE = "trainer/state.json"
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
    """Of config, plan, stores and target; another one is refused."""
    step: int = Field(ge=0)
    """Optimizer steps done; the next one's generators are seeded from it."""
    next_sample: int = Field(ge=0)
    """Position in the endless sequence of epochs."""
    before: dict[str, float] | None = None
    """Bits per byte by domain before training."""
    best: BestRecord | None = None
    """None while nothing was evaluated."""
    seconds: float = Field(default=0.0, ge=0)
    """Training time so far, over all starts."""


@contextmanager
def write_errors(where: Path) -> Iterator[None]:
    """StorageError for what disks raise, also through safetensors, which hides the errno."""
    with storage_errors(str(where)):
        try:
            yield
        except SafetensorError as error:
            full = "os error 28" in str(error) or "No space" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def publish_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder aside and rename it to `final`; one that stands there is replaced.

    Args:
        final: Where it is to be.
        write: Fills the folder it is given.

    Raises:
        StorageError: The disk refused; `final` is as it was.
    """
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    with write_errors(final):
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            _flush(temporary)
            if final.exists():
                old = final.with_name(f".{final.name}.{uuid.uuid4().hex}.old")
                final.rename(old)
                temporary.rename(final)
                shutil.rmtree(old)
            else:
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Force files to the disk, so that the rename cannot outrun them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what killed runs left half-written."""
    if folder.is_dir():
        with storage_errors(str(folder)):
            for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
                shutil.rmtree(path)


def numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Complete folders of one kind by step, lowest first."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): p for p in folder.iterdir() if (match := pattern.match(p.name))}
    return dict(sorted(found.items()))


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Checkpoints by step."""
    return numbered(checkpoints, _STEP_NAME)


def best_folder(checkpoints: Path, step: int) -> Path:
    """Where the weights of the best evaluation lie."""
    return checkpoints / f"best-{step:06d}"


def latest_checkpoint(checkpoints: Path, fingerprint: str) -> tuple[Path, TrainState] | None:
    """The checkpoint to resume from, None when there is none.

    Raises:
        MismatchError: It was made from another config, plan, store or target.
        CorruptionError: Its record is damaged.
    """
    folders = step_folders(checkpoints)
    if not folders:
        return None
    path = folders[max(folders)]
    if not (path / STATE_FILE).exists():
        raise CorruptionError(
            "checkpoint without state", where=path, hint="delete the folder to use the one before"
        )
    state = unseal(TrainState, (path / STATE_FILE).read_bytes(), where=str(path / STATE_FILE))
    if state.fingerprint != fingerprint:
        raise MismatchError(
            "checkpoint was made from another config, plan, store or target",
            where=path,
            expected=f"fingerprint {fingerprint}",
            got=f"fingerprint {state.fingerprint}",
            hint="undo the change, or give the run another name (or delete checkpoints) to start anew",
        )
    return path, state


def save_checkpoint(
    checkpoints: Path,
    state: TrainState,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    selector: Selector | None,
    *,
    limit: int,
) -> Path:
    """Publish a checkpoint, then drop the oldest beyond `limit` and best weights nobody names.

    Raises:
        StorageError: The disk refused; earlier checkpoints stand.
    """
    path = checkpoints / f"step-{state.step:06d}"

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        inner = folder / "trainer"
        inner.mkdir()
        save_file(_optimizer_tensors(optimizer), inner / "optimizer.safetensors")
        if isinstance(selector, AdaptiveSelector):
            selector.save(inner)
        (folder / STATE_FILE).write_bytes(seal(state))

    publish_folder(path, write)
    folders = step_folders(checkpoints)
    for step in list(folders)[:-limit]:
        if step != state.step:
            shutil.rmtree(folders.pop(step))
    _drop_unnamed_best(checkpoints, list(folders.values()))
    return path


def _drop_unnamed_best(checkpoints: Path, kept: list[Path]) -> None:
    """Best weights live as long as a kept checkpoint would go on from them."""
    named = set()
    for path in kept:
        where = path / STATE_FILE
        state = unseal(TrainState, where.read_bytes(), where=str(where))
        named.add(None if state.best is None else state.best.step)
    for step, path in numbered(checkpoints, _BEST_NAME).items():
        if step not in named:
            shutil.rmtree(path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put saved moments back into an optimizer over the same parameters.

    Raises:
        CorruptionError: The file is damaged, or speaks of other parameters.
    """
    where = path / "trainer" / "optimizer.safetensors"
    try:
        tensors = load_file(where)
    except (SafetensorError, OSError) as error:
        raise CorruptionError("optimizer unreadable", where=where, got=error) from error
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    saved = [state.get(i, {}).get("exp_avg") for i in range(len(shapes))]
    if len(state) != len(shapes) or any(
        moment is None or moment.shape != shape for moment, shape in zip(saved, shapes, strict=True)
    ):
        raise CorruptionError("optimizer of other parameters", where=where)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
