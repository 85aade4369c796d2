"""`train.precision: auto`: the dtype of matrix products, measured once for a run and kept.

Some CPUs multiply bfloat16 several times faster than float32, others only emulate it and are slower.
The choice is written beside the checkpoints, so that a resumed training and the control use the same
precision, on any machine.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.location import open_location
from store_schema.disk.sealed import seal, unseal

Precision = Literal["float32", "bfloat16"]

PRECISION_FILE = "precision.json"
LEAST_HIDDEN = 512
"""Products of narrower models are too small for their precision to matter: float32, not measured."""
LEAST_GAIN = 1.2
"""bfloat16 must be this many times faster to be worth its rounding."""
_MOST_HIDDEN, _MOST_INNER, _ROWS, _ROUNDS = 1024, 4096, 512, 3


class PrecisionRecord(StrictModel):
    """precision.json: what was chosen, and why."""

    schema_version: int = SCHEMA_VERSION
    precision: Precision
    reason: str
    """Figures of the measurement, or why none was needed."""


def resolve_precision(
    folder: Path, config: Any, device: torch.device, *, writes: bool
) -> PrecisionRecord:
    """The precision of a run's trainings, from its record, else measured now.

    Args:
        folder: Folder of the run, which holds the record.
        config: transformers config of the target.
        device: Device to train on.
        writes: Whether this process writes the record (one does).

    Raises:
        CorruptionError: The record is damaged.
        StorageError: It cannot be written.
    """
    location = open_location(str(folder))
    if location.exists(PRECISION_FILE):
        where = str(folder / PRECISION_FILE)
        return unseal(PrecisionRecord, location.read_bytes(PRECISION_FILE), where=where)
    record = choose_precision(config, device)
    if writes:
        location.write_atomic(PRECISION_FILE, seal(record))
        print(f"train.precision: {record.precision} ({record.reason})", file=sys.stderr)
    return record


def choose_precision(config: Any, device: torch.device) -> PrecisionRecord:
    """bfloat16 where the device is much faster in it, else float32."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "the GPU has units for bfloat16" if has else "the GPU has no units for bfloat16"
        return PrecisionRecord(precision="bfloat16" if has else "float32", reason=reason)
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", None) or 0)
    if device.type != "cpu" or hidden < LEAST_HIDDEN:
        reason = f"hidden size {hidden} is small" if device.type == "cpu" else str(device)
        return PrecisionRecord(precision="float32", reason=reason)
    inner = getattr(text, "intermediate_size", None)
    shape = (hidden, inner if isinstance(inner, int) else 4 * hidden)
    wide, narrow = product_seconds(*shape)
    return PrecisionRecord(
        precision="bfloat16" if wide >= LEAST_GAIN * narrow else "float32",
        reason=f"a layer of {shape[0]} x {shape[1]} took {1e3 * wide:.0f} ms in float32, "
        f"{1e3 * narrow:.0f} ms in bfloat16, forward and backward",
    )


def product_seconds(hidden: int, inner: int) -> tuple[float, float]:
    """Seconds of a layer's forward and backward pass on the CPU, in float32 and in bfloat16.

    The minimum of some alternating rounds, in CPU time of one thread, so that another job on the
    machine does not decide. Layers beyond a size are measured at that size.
    """
    g = torch.Generator().manual_seed(0)
    width, inner = min(hidden, _MOST_HIDDEN), min(inner, _MOST_INNER)
    x_RH = torch.randn(_ROWS, width, generator=g).requires_grad_()
    weight_IH = torch.randn(inner, width, generator=g).requires_grad_()

    def once(narrow: bool) -> float:
        started = time.thread_time()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            y_RI = torch.nn.functional.linear(x_RH, weight_IH)
        torch.autograd.grad(y_RI, (x_RH, weight_IH), torch.ones_like(y_RI))
        return time.thread_time() - started

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [(once(False), once(True)) for _ in range(_ROUNDS + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    return min(wide for wide, _ in rounds), min(narrow for _, narrow in rounds)
