"""A fused step of a published model beside a plain CLM step: time and memory.

The fused side is the product's own training loop (objective, optimizer, clipping, figures), given
batches of two made-up sources; the plain side is the loop a user would write: forward with all logits,
cross-entropy, backward, clipping, AdamW, zero_grad. Same model, tokens, precision. Times: both take
turns in one process, in rounds; CPU time of all threads, since other jobs do not change it, and wall
time beside it; ratios of medians. Memory: each in a process of its own, peak of two steps above what
stood there before the model was loaded.

    python -m benchmarks.real_train MODEL_FOLDER --rounds 3
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch.nn.functional import cross_entropy

from benchmarks.bench_train import _resident
from benchmarks.train_steps import SOURCES, Size, make_batch
from fuse_train.config import TrainSection
from fuse_train.data.batch import Batch
from fuse_train.loop.checkpoint import TrainState
from fuse_train.loop.layout import WholeLayout
from fuse_train.loop.loop_inputs import LoopInputs
from fuse_train.loop.step_log import StepLog
from fuse_train.loop.trainer import TrainingLoop
from fuse_train.machine.precision import choose_precision
from fuse_train.model.models import load_model
from fuse_train.model.target import Target
from fuse_train.selector_fit.selector_training import new_selector
from fuse_train.selectors.by_name import learner
from fuse_train.selectors.kinds.asn import AsnSection
from launch.signals import StopFlag
from store_schema.config import ModelRef
from store_schema.model.class_config import transformers_config

LEARNING_RATE = 1e-5
"""Small: what is measured should not depend on what was learned."""
NUM_SOURCES, NUM_ENTRIES = 2, 32
MEMORY_STEPS = 2


@dataclass
class Turns:
    """Stands in for the stream: the same batch each step, and what happens between steps.

    Args:
        batch: Of every step.
        rounds: Steps after one that is not counted.
        between: Called before each step; None does nothing.
        seconds: CPU and wall seconds of the steps, filled in.
    """

    batch: Batch
    rounds: int
    between: Callable[[], None] | None = None
    seconds: list[tuple[float, float]] = field(default_factory=list)

    samples = SimpleNamespace(sources=tuple(SOURCES[:NUM_SOURCES]))
    domains = ("text",)
    num_samples = 1 << 20
    order = SimpleNamespace(num_steps=None, stage_at=lambda step: None, number_at=lambda step: None)

    def batches(self, first: int, stop: int) -> Generator[list[Batch], None, None]:
        """The stream's method; ends after the rounds."""
        for number in range(self.rounds + 1):
            if self.between is not None:
                self.between()
            started = time.process_time(), time.perf_counter()
            yield [self.batch]
            if number:
                self.seconds.append(_since(started))


def _since(started: tuple[float, float]) -> tuple[float, float]:
    return time.process_time() - started[0], time.perf_counter() - started[1]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, and how.

    Args:
        folder: Of the model.
        precision: float32 or bfloat16.
        size: Of the batch.
    """

    folder: Path
    precision: str
    size: Size

    @property
    def section(self) -> TrainSection:
        """The recipe of the fused side."""
        rows = self.size.num_segments
        return TrainSection(
            selector="asn", precision=self.precision, lr=LEARNING_RATE, batch_segments=rows,
            micro_batch_segments=rows, max_steps=1 << 16, log_every=1 << 20, eval_every=None,
            checkpoint_every=1 << 20, trackers=(),
        )  # fmt: skip


def setting_of(
    folder: Path, *, precision: str = "auto", segments: int = 4, tokens: int = 512
) -> Setting:
    """The setting for a model folder; `auto` measures, as a training would."""
    config = transformers_config(ModelRef(model=str(folder)), of="benchmark")
    if precision == "auto":
        precision = choose_precision(config, torch.device("cpu")).precision
    size = Size(
        vocab_size=config.get_text_config().vocab_size,
        num_segments=segments,
        num_tokens=tokens,
        num_sources=NUM_SOURCES,
        num_entries=NUM_ENTRIES,
    )
    return Setting(folder, precision, size)


def plain_step(model: Any, batch: Batch, precision: str) -> Callable[[], None]:
    """One step of a plain loop over the model."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    labels_R = batch.labels_BT.flatten()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits_BTV = model(input_ids=batch.input_ids_BL, use_cache=False).logits
        loss = cross_entropy(logits_BTV.flatten(0, 1).float(), labels_R)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run_fused(model: Any, setting: Setting, turns: Turns, place: Path) -> None:
    """The product's loop over the turns."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if setting.precision == "bfloat16" else "no"
    )
    selector = new_selector(AsnSection(), learner("asn"), 0, num_sources=NUM_SOURCES)
    inputs: Any = LoopInputs(
        "fused",
        setting.section,
        0,
        turns,
        None,
        None,
        place,
        StepLog(None),  # type: ignore[arg-type]
    )
    state = TrainState(fingerprint="-", step=0, next_sample=0)
    layout = WholeLayout(accelerator, setting.section)
    loop = TrainingLoop(inputs, Target(model), selector, state, layout, None)
    with suppress(StopIteration):  # the turns are over before the steps are
        loop.run(StopFlag())


def measure(
    folder: Path, *, rounds: int = 3, precision: str = "auto", segments: int = 4, tokens: int = 512
) -> dict[str, Any]:
    """Ratios of the fused step over the plain one.

    Args:
        folder: A model folder.
        rounds: Of the timings.
        precision: auto, float32 or bfloat16.
        segments: Of the micro-batch.
        tokens: Of a segment.

    Returns:
        `train_ratio`, `train_memory_ratio` and what they are made of.
    """
    setting = setting_of(folder, precision=precision, segments=segments, tokens=tokens)
    # Children first: this process would keep gigabytes of its steps beside them.
    peaks = {way: peak_bytes(setting, way) for way in ("plain", "fused")}
    fused, plain = timed(setting, rounds)
    return {
        "train_ratio": fused[0] / plain[0],
        "train_memory_ratio": peaks["fused"] / peaks["plain"],
        "train_wall_ratio": fused[1] / plain[1],
        "train_precision": setting.precision,
        "train_fused_cpu_s": fused[0],
        "train_plain_cpu_s": plain[0],
        "train_fused_peak_bytes": peaks["fused"],
        "train_plain_peak_bytes": peaks["plain"],
    }


def timed(setting: Setting, rounds: int) -> tuple[list[float], list[float]]:
    """Medians of a fused and of a plain step, each [CPU seconds, wall seconds]."""
    model, batch = _model(setting), make_batch(setting.size)
    step = plain_step(model, batch, setting.precision)
    seconds: list[tuple[float, float]] = []

    def other() -> None:
        started = time.process_time(), time.perf_counter()
        step()
        seconds.append(_since(started))

    turns = Turns(batch, rounds, other)
    with tempfile.TemporaryDirectory() as place:
        run_fused(model, setting, turns, Path(place))
    fused, plain = (
        [statistics.median(column) for column in zip(*rows, strict=True)]
        for rows in (turns.seconds, seconds[1:])
    )
    return fused, plain


def _model(setting: Setting) -> Any:
    return load_model(ModelRef(model=str(setting.folder)), where="benchmark").train()


def peak_bytes(setting: Setting, way: str) -> int:
    """Peak of two steps above what stood there before the model, in a process of its own."""
    size = setting.size
    options = [
        *("--precision", setting.precision, "--child", way),
        *("--segments", str(size.num_segments), "--tokens", str(size.num_tokens)),
    ]
    command = [sys.executable, "-m", "benchmarks.real_train", str(setting.folder), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def measure_child(setting: Setting, way: str) -> None:
    """Measure this process; the last line says what was found."""
    device = torch.device("cpu")
    batch = make_batch(setting.size)
    before = _resident(device, peak=False)
    model = _model(setting)
    if way == "plain":
        step = plain_step(model, batch, setting.precision)
        for _ in range(MEMORY_STEPS):
            step()
    else:
        with tempfile.TemporaryDirectory() as place:
            run_fused(model, setting, Turns(batch, MEMORY_STEPS - 1), Path(place))
    print(json.dumps({"peak_bytes": _resident(device, peak=True) - before}))


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Of the timings.")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--segments", type=click.IntRange(min=1), default=4, help="Of the micro-batch.")
@click.option("--tokens", type=click.IntRange(min=2), default=512, help="Of a segment.")
@click.option("--child", hidden=True)
def main(
    folder: Path, rounds: int, precision: str, segments: int, tokens: int, child: str | None
) -> None:
    """Measure and print a table, then one JSON object."""
    if child is not None:
        measure_child(
            setting_of(folder, precision=precision, segments=segments, tokens=tokens), child
        )
        return
    found = measure(folder, rounds=rounds, precision=precision, segments=segments, tokens=tokens)
    print(f"{folder.name}, {found['train_precision']}, {segments} segments of {tokens} tokens")
    for way in ("plain", "fused"):
        print(
            f"{way:>6}: {found[f'train_{way}_cpu_s']:8.2f} CPU s a step, "
            f"peak {found[f'train_{way}_peak_bytes'] / 1e6:8,.0f} MB"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
