"""What a run will take: bytes of its stores and checkpoints, GPU-hours, money. Pure functions.

Every figure is arithmetic on stated assumptions; what the stages measure later (`extract plan`,
`store tune`, `status`) is better.
"""

from __future__ import annotations

from dataclasses import dataclass

from store_schema.layout import ENTRY_BYTES, POSITION_BYTES
from store_schema.presets import Preset

TFLOPS = 125.0
"""TFLOP/s that a GPU sustains: 40 % of an A100's 312 in bfloat16."""
RATE = 2.0
"""Money for a GPU-hour."""
MOST_TOKENS_PER_S = 50_000.0
"""Tokens that one GPU scores in a second at most, however small the model."""
BYTES_PER_TOKEN = 4.0
"""Bytes of text in a token, where no tokenizer was used."""
ALIGNED_TOKENS_PER_S = 100_000.0
"""Target tokens that `align run` converts in a second on two cores (docs/alignment.md)."""
TRAIN_BYTES, GPU_BYTES = 16, 80e9
"""Bytes of a parameter that is trained (weight, gradient, two moments, float32); of a GPU."""
CHECKPOINT_BYTES, WEIGHT_BYTES = 12, 4
"""Bytes of a parameter in a checkpoint, and in weights alone."""
_PRESET_BYTES: dict[Preset, tuple[float, float]] = {"compact": (87, 4), "tiny": (31, 4)}
"""Measured bytes of a position's distribution, and of its token and label (docs/store.md)."""
_FINE_ENTRY_BYTES, _TOKEN_BYTES = 1.7, 4


@dataclass(frozen=True, slots=True)
class Assumed:
    """What the estimate goes by, besides models and data.

    Args:
        tflops: TFLOP/s that a GPU sustains.
        rate: Money for a GPU-hour.
    """

    tflops: float = TFLOPS
    rate: float = RATE


def at_most_bytes(positions: float, entries: int) -> float:
    """The bound that `extract plan` prints: every entry kept, nothing compressed."""
    return positions * (POSITION_BYTES + ENTRY_BYTES * entries)


def likely_bytes(positions: float, entries: int, preset: Preset) -> float:
    """Bytes of a store with a preset, from what presets were measured to take."""
    most = at_most_bytes(positions, entries)
    if preset == "exact":
        return most
    fine = _FINE_ENTRY_BYTES * entries + _TOKEN_BYTES
    measured = sum(_PRESET_BYTES[preset]) if preset in _PRESET_BYTES else fine
    return min(positions * min(fine, measured), most)


def tokens_per_s(active: int | None, tflops: float) -> float | None:
    """Tokens that one GPU scores in a second: a forward pass takes 2 FLOP for each parameter."""
    if not active:
        return None
    return min(tflops * 1e12 / (2 * active), MOST_TOKENS_PER_S)


@dataclass(frozen=True, slots=True)
class SourceCost:
    """Cost of a source.

    Args:
        name: The source.
        positions: Its tokens of text.
        tokens_read: With contexts.
        most_bytes: Its store at most.
        bytes: Its store with the run's preset.
        tokens_per_s: Assumed speed of one GPU; None where the model's size is not known.
        gpu_hours: None likewise.
    """

    name: str
    positions: float
    tokens_read: float
    most_bytes: float
    bytes: float
    tokens_per_s: float | None
    gpu_hours: float | None


def source_cost(
    name: str, tokens: tuple[float, float], active: int | None, *,
    entries: int, preset: Preset, tflops: float,
) -> SourceCost:  # fmt: skip
    """The cost of scoring a source.

    Args:
        name: The source.
        tokens: Its positions, and the tokens that it reads.
        active: Parameters that a token uses.
        entries: Entries at a position, at most.
        preset: Preset of its store.
        tflops: TFLOP/s that a GPU sustains.
    """
    positions, read = tokens
    speed = tokens_per_s(active, tflops)
    return SourceCost(
        name,
        positions,
        read,
        at_most_bytes(positions, entries),
        likely_bytes(positions, entries, preset),
        speed,
        None if speed is None else read / speed / 3600,
    )


@dataclass(frozen=True, slots=True)
class TrainCost:
    """Cost of training the target and its control.

    Args:
        tokens: Tokens of one pass over the training split, contexts included.
        trainings: Fused, and the control.
        gpu_hours: Of all trainings; None where the target's size is not known.
        gpus: GPUs of 80 GB whose memory weights, gradients and optimizer fill, at least.
        bytes: Checkpoints and final folders at most.
    """

    tokens: float
    trainings: int
    gpu_hours: float | None
    gpus: int | None
    bytes: float


def train_cost(
    parameters: int | None, active: int | None, tokens: float, *,
    epochs: float, recompute: bool, tflops: float, kept: int = 2,
) -> TrainCost:  # fmt: skip
    """The cost of a fused training and its control.

    Args:
        parameters: Of the target.
        active: Those that a token uses.
        tokens: Tokens of one pass.
        epochs: Passes.
        recompute: Whether activations are computed again (gradient checkpointing).
        tflops: TFLOP/s that a GPU sustains.
        kept: Checkpoints kept (`train.save_total_limit`), one more while it is written.
    """
    trainings = 2
    if not parameters or not active:
        return TrainCost(tokens, trainings, None, None, 0.0)
    hours = training_hours(active, tokens * epochs * trainings, tflops, recompute=recompute)
    disk = trainings * training_bytes(parameters, kept)
    gpus = max(1, -(-parameters * TRAIN_BYTES // int(GPU_BYTES * 0.75)))
    return TrainCost(tokens, trainings, hours, gpus, float(disk))


def training_hours(active: int, tokens: float, tflops: float, *, recompute: bool) -> float:
    """GPU-hours of a training: 6 FLOP for each parameter and token, 8 where activations are computed
    again.

    Args:
        active: Parameters that a token uses.
        tokens: Of all passes.
        tflops: TFLOP/s that a GPU sustains.
        recompute: Whether activations are computed again (gradient checkpointing).
    """
    return (8 if recompute else 6) * active * tokens / (tflops * 1e12) / 3600


def training_bytes(parameters: int, kept: int) -> int:
    """Bytes of a training on disk, at most: checkpoints, one more while it is written, and two sets of
    weights.

    Args:
        parameters: Of the target.
        kept: Checkpoints kept (`train.save_total_limit`).
    """
    return parameters * ((kept + 1) * CHECKPOINT_BYTES + 2 * WEIGHT_BYTES)
