"""The sealed record in a final folder, which makes a rerun do nothing."""

from __future__ import annotations

from pathlib import Path

from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.sealed import unseal
from store_schema.errors import MismatchError

DONE_FILE = "done.json"
CONFIG_FILE = "run.yaml"
"""The resolved run file that the folder was made with."""


class DoneRecord(StrictModel):
    """done.json: says that the folder is complete, and what it was made from."""

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
    """Valid bits per byte by domain of the saved weights."""
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
            hint="undo the change, or give the run another name (or delete the folder) to train again",
        )
    return record
