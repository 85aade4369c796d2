"""The step log: one JSON line per optimizer step, truncated on resume to the step resumed from.

Lines of `<run>/logs/train_steps.jsonl` (fused) and `control_steps.jsonl` (the CLM control):

    {"step": 12, "num_steps": of the whole run, "stage": 1, "loss": ..., "clm": ..., "fusion": ...,
     "feedback": ..., "pool": ..., "uncovered": share of rows no source covers, "lr": ...,
     "tokens_per_s": ..., "seconds": of this step without evaluation, "wait_seconds": of these,
     waiting for the batch, "grad_norm": ...,
     "weights": {source: mean weight}, "weights_by_domain": {domain: {source: mean weight}},
     "weight_spread": {source: standard deviation of its weight over rows},
     "weight_spread_by_domain": {domain: {source: the same within the domain}},
     "load_by_domain": {domain: {source: share of rows where it has weight}},
     "entropy_by_domain": {domain: mean entropy of the weights, nats},
     "fusion_weights": {domain: mean weight of the fusion loss over covered rows},
     "valid_bpb": {domain: bits per byte},
     "fusion_shares": {domain: weight of the pool in its best mixture with the target}}

Steps count from 1. `valid_bpb` is present when that step was evaluated, `fusion_shares` too if the
fusion gate measures them (fuse_train/gate/held_out.py); the line of step 0 (before training) has
nothing else. clm, fusion and pool are nats per row; `fusion` is a mean over covered rows, `pool` over
rows where a source knows the label. `stage` is there with train.stages, `spans` with
train.loss.span_weight. The control has no fusion, feedback, pool, uncovered and weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import StorageError


class StepLog:
    """Appends to one log file.

    Args:
        path: The file; None writes nothing (for processes other than the first).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def start(self, step: int) -> None:
        """Delete lines after `step` and incomplete lines; 0 empties the log."""
        if self._path is None:
            return
        with storage_errors(str(self._path)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if step == 0 or not self._path.exists():
                self._path.write_bytes(b"")
                return
            kept = [line for line in self._path.read_bytes().splitlines() if _step(line) <= step]
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
            temporary.replace(self._path)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            StorageError: The file cannot be written.
        """
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError("step log refused", where=self._path, got=error.strerror) from error


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
