"""The final folder: published once, with a sealed record that makes a rerun do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fuse_train.checkpoint import TrainState, best_folder, publish_folder
from fuse_train.model_card import CardFacts, model_card
from fuse_train.models import load_model
from store_schema import SCHEMA_VERSION
from store_schema.config import ModelRef, StrictModel
from store_schema.errors import MismatchError, MissingError
from store_schema.sealed import seal, unseal

DONE_FILE = "done.json"
CONFIG_FILE = "run.yaml"


class DoneRecord(StrictModel):
    """done.json: this folder is whole, and what it was made from."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    """Of config, plan, stores and target."""
    label: str
    """fused | control."""
    num_steps: int
    """Steps of the run."""
    step: int
    """Step that the weights are from; 0 when no step was better than the start."""
    before: dict[str, float] | None
    """Valid bits per byte by domain before training."""
    after: dict[str, float] | None
    """Of the saved weights."""
    seconds: float
    """Training time."""


def read_done(folder: Path, fingerprint: str | None = None) -> DoneRecord | None:
    """The record of a finished training, None when there is none.

    Args:
        folder: Final folder.
        fingerprint: What it must have been made from; None accepts anything.

    Raises:
        MismatchError: It was made from something else.
        CorruptionError: The record is damaged.
    """
    path = folder / DONE_FILE
    if not path.exists():
        return None
    record = unseal(DoneRecord, path.read_bytes(), where=str(path))
    if fingerprint is not None and record.fingerprint != fingerprint:
        raise MismatchError(
            "a model trained from another config, plan, store or target is there",
            where=folder,
            expected=f"fingerprint {fingerprint}",
            got=f"fingerprint {record.fingerprint}",
            hint="undo the change, or give the run another name (or delete the folder) to train anew",
        )
    return record


def final_weights(
    model: Any, state: TrainState, checkpoints: Path, target: ModelRef, *, keep_best: bool
) -> tuple[Any, int, dict[str, float] | None]:
    """The model that is published, the step its weights are from, and its valid bits per byte.

    Raises:
        MissingError: The best weights were deleted by hand.
    """
    if state.best is None or not keep_best or state.best.step == state.step:
        same = state.best is not None and state.best.step == state.step
        return model, state.step, state.best.bpb if same and state.best else None
    if state.best.step == 0:
        return load_model(target, where="target"), 0, state.best.bpb
    folder = best_folder(checkpoints, state.best.step)
    if not folder.is_dir():
        raise MissingError(
            "weights of the best evaluation are gone",
            where=folder,
            hint="delete the checkpoints to train anew, or set train.keep_best to false",
        )
    ref = ModelRef(model=str(folder))
    return load_model(ref, where="the best evaluation"), state.best.step, state.best.bpb


def publish_final(
    folder: Path,
    model: Any,
    tokenizer: Any,
    record: DoneRecord,
    facts: CardFacts,
    resolved_config: str,
    dtype: torch.dtype,
) -> None:
    """Write the final folder whole.

    Raises:
        StorageError: The disk refused; nothing is published.
    """

    def write(place: Path) -> None:
        model.to(dtype).save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / "README.md").write_text(model_card(facts), encoding="utf-8")
        (place / CONFIG_FILE).write_text(resolved_config, encoding="utf-8")
        (place / DONE_FILE).write_bytes(seal(record))

    publish_folder(folder, write)
