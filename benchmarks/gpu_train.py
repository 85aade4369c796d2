"""A training on several processes: step time, memory and MFU, fused beside plain CLM.

Both are the product's own training loop (objective, optimizer, clipping, figures) under the same
parallelism, the control with ground truth alone, as `train.control`: on Llamas of random weights, with
made-up sources. Each way is a torchrun of its own, so that its peak of memory is its own; every process
has `--segments` segments of `--tokens` tokens a step.

MFU: 6 FLOPs for each token and parameter, without the embedding, whose rows are only looked up, and the
products of causal attention, 6 * layers * hidden * tokens for each token; over the device's peak in
dense bfloat16. What is computed twice (--gradient-checkpointing) counts once.

    python -m benchmarks.gpu_train --shape 8b --parallel fsdp2 --processes 8
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bench_train import _resident
from benchmarks.real_train import LEARNING_RATE, NUM_SOURCES, Turns
from benchmarks.train_steps import GPU, Size, llama_config, make_batch, make_model
from fuse_train.config import TrainSection
from fuse_train.loop.checkpoint import TrainState
from fuse_train.loop.layout import Layout, WholeLayout
from fuse_train.loop.loop_inputs import LoopInputs
from fuse_train.loop.sharded_layout import ShardedLayout
from fuse_train.loop.step_log import StepLog
from fuse_train.loop.trainer import TrainingLoop
from fuse_train.machine.precision import choose_precision
from fuse_train.model.target import Target
from fuse_train.selector_fit.selector_training import new_selector
from fuse_train.selectors.by_name import learner
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.sharding.part_files import part_of
from fuse_train.sharding.root import fill, spread
from launch.signals import StopFlag

SHAPES = {
    "1b": GPU,
    "8b": replace(GPU, hidden_size=4_096, intermediate_size=14_336, num_layers=32),
    "tiny": Size(512, 64, 128, 2, 4, 2, 2, 32, num_entries=8),
}
"""The shapes of Llama 3.2 1B and of Llama 3.1 8B, with a head of its own, and one for tests."""
WAYS = ("control", "fused")
PEAK_TFLOPS = {
    "B200": 2_250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "MI300X": 1_307.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}
"""Dense bfloat16, from the makers' data sheets, by part of a device's name; the first that fits."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, and how.

    Args:
        size: Shape of the model, and of what one process has of a step.
        parallel: ddp or fsdp2.
        processes: Of the training.
        steps: Steps that are timed; one before them is not.
        device: cuda or cpu.
        gradient_checkpointing: As `train.gradient_checkpointing`.
    """

    size: Size
    parallel: str
    processes: int
    steps: int
    device: str
    gradient_checkpointing: bool

    @property
    def tokens(self) -> int:
        """Of a step, over all processes."""
        return self.size.num_rows * self.processes


@dataclass(frozen=True, slots=True)
class Measured:
    """What one way takes.

    Args:
        step_s: Median seconds of a step.
        peak_bytes: Most memory of one process.
        held_parameters: Parameters of the model that one process has, at most, between steps.
        tokens_per_s: Over all processes.
        precision: dtype of matrix products.
        device_name: As torch calls it.
    """

    step_s: float
    peak_bytes: int
    held_parameters: int
    tokens_per_s: float
    precision: str
    device_name: str


def num_parameters(size: Size) -> int:
    """Parameters that a token is multiplied with: all but the embedding."""
    head_size = size.hidden_size // size.num_heads
    attention = 2 * size.hidden_size * (size.hidden_size + head_size * size.num_kv_heads)
    mlp = 3 * size.hidden_size * size.intermediate_size
    norms = 2 * size.hidden_size
    head = size.vocab_size * size.hidden_size
    return size.num_layers * (attention + mlp + norms) + size.hidden_size + head


def step_flops(setting: Setting) -> float:
    """FLOPs of a step over all processes, forward and backward."""
    size = setting.size
    attention = 6.0 * size.num_layers * size.hidden_size * size.num_tokens
    return setting.tokens * (6.0 * num_parameters(size) + attention)


def peak_of(device_name: str) -> float | None:
    """A device's peak by its name, None if the table does not have it."""
    found = (peak for part, peak in PEAK_TFLOPS.items() if part.lower() in device_name.lower())
    return next(found, None)


def mfu(setting: Setting, step_s: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, of a peak in TFLOP/s of one device."""
    if peak is None:
        return None
    return step_flops(setting) / step_s / (setting.processes * peak * 1e12)


# ---- in the processes --------------------------------------------------------------------------------


def measure_process(setting: Setting, way: str) -> Measured | None:
    """Train in this process and the others; what was found in the first, None in the others."""
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    device, size = torch.device(setting.device), setting.size
    precision = choose_precision(LlamaConfig(hidden_size=size.hidden_size), device).precision
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if precision == "bfloat16" else "no"
    )
    batch = make_batch(size, seed=accelerator.process_index)
    selector = None
    if way == "fused":
        selector = new_selector(AsnSection(), learner("asn"), 0, num_sources=NUM_SOURCES)
    else:
        batch = replace(batch, sources=None)
    turns = Turns(batch, setting.steps)
    with tempfile.TemporaryDirectory() as place:
        inputs: Any = LoopInputs(
            way,
            _section(setting, precision),
            0,
            turns,  # type: ignore[arg-type]
            None,
            None,
            Path(place),
            StepLog(None),
        )
        loop = _loop(inputs, selector, accelerator, setting)
        with suppress(StopIteration):  # the turns are over before the steps are
            loop.run(StopFlag())
    seconds = statistics.median(wall for _, wall in turns.seconds)
    held = sum(part_of(p).rows.numel() for p in loop.target.model.parameters())
    everywhere = gather_object([(seconds, _resident(accelerator.device, peak=True), held)])
    if not accelerator.is_main_process:
        return None
    step_s, peak, held = (max(values) for values in zip(*everywhere, strict=True))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return Measured(step_s, peak, held, setting.tokens / step_s, precision, name)


def _section(setting: Setting, precision: str) -> TrainSection:
    rows = setting.size.num_segments
    return TrainSection(
        selector="asn", precision=precision, lr=LEARNING_RATE, parallel=setting.parallel,
        batch_segments=rows * setting.processes, micro_batch_segments=rows, max_steps=1 << 16,
        log_every=1 << 20, eval_every=None, checkpoint_every=1 << 20, trackers=(),
    )  # fmt: skip


def _loop(inputs: Any, selector: Any, accelerator: Any, setting: Setting) -> TrainingLoop:
    """The product's loop over a model of random weights in the layout of `train.parallel`."""
    layout: Layout
    if setting.parallel == "ddp" or setting.processes == 1:  # as in a training
        layout = WholeLayout(accelerator, inputs.section)
        model = make_model(replace(setting.size, dtype="float32"), accelerator.device)
    else:
        layout = RandomShards(accelerator, inputs.section)
        model = layout.made(setting.size)
    model.train()
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    state = TrainState(fingerprint="-", step=0, next_sample=0)
    return TrainingLoop(inputs, Target(model), selector, state, layout, None)


class RandomShards(ShardedLayout):
    """The product's layout over a model of random weights, which no process ever has as a whole."""

    def made(self, size: Size) -> Any:
        """The model, spread over the processes."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model: Any = LlamaForCausalLM(llama_config(size)).float()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        device = self.accelerator.device

        def rows(names: list[str], start: int, stop: int) -> torch.Tensor:
            shape = (stop - start, *shapes[names[0]][1:])
            if len(shape) == 1:  # a norm's
                return torch.ones(shape, device=device)
            return model.config.initializer_range * torch.randn(shape, device=device)

        self._root = spread(model, self._mesh, narrow=self._section.precision == "bfloat16")
        fill(self._root, rows, device)
        return model


# ---- the command -------------------------------------------------------------------------------------


def measure(setting: Setting, way: str, options: list[str]) -> Measured:
    """Start torchrun for one way and read what its first process prints.

    Raises:
        ClickException: It failed; its own messages were printed.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
    torchrun.append(f"--nproc-per-node={setting.processes}")
    words = [sys.executable, *torchrun, "-m", "benchmarks.gpu_train", *options, "--child", way]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise click.ClickException(f"the {way} training failed: see above")
    return Measured(**json.loads(lines[-1]))


def summary(setting: Setting, found: dict[str, Measured], peak: float | None) -> dict[str, Any]:
    """Figures of both ways and their ratios.

    Args:
        setting: Of both.
        found: By way.
        peak: TFLOP/s of one device, None if not known.
    """
    fused, control = found["fused"], found["control"]
    return {
        "step_ratio_clm": fused.step_s / control.step_s,
        "memory_ratio_clm": fused.peak_bytes / control.peak_bytes,
        "parameters": num_parameters(setting.size)
        + setting.size.vocab_size * setting.size.hidden_size,
        "parallel": setting.parallel,
        "processes": setting.processes,
        "tokens_per_step": setting.tokens,
        "peak_tflops": peak,
        **{
            way: asdict(one) | {"mfu": mfu(setting, one.step_s, peak)} for way, one in found.items()
        },
    }


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), required=True, help="Of the model.")
@click.option("--parallel", type=click.Choice(["fsdp2", "ddp"]), required=True)
@click.option("--processes", type=click.IntRange(min=1), required=True, help="One for each GPU.")
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Timed steps.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--segments", type=click.IntRange(min=1), help="Of a process's step.")
@click.option("--tokens", type=click.IntRange(min=2), help="Of a segment.")
@click.option("--gradient-checkpointing", is_flag=True)
@click.option("--peak-tflops", type=float, help="Of one device. Default: by its name.")
@click.option("--child", type=click.Choice(WAYS), hidden=True)
def main(child: str | None, peak_tflops: float | None, **given: Any) -> None:
    """Measure and print a table, then one JSON object."""
    setting = _setting(**given)
    if child is not None:
        measured = measure_process(setting, child)
        if measured is not None:
            print(json.dumps(asdict(measured)), flush=True)
        return
    if setting.device == "cuda" and torch.cuda.device_count() < setting.processes:
        raise click.UsageError(
            f"{setting.processes} processes, but {torch.cuda.device_count()} GPUs (--device cpu?)"
        )
    options = _options(given)
    found = {way: measure(setting, way, options) for way in WAYS}
    peak = peak_tflops or peak_of(found["control"].device_name)
    figures = summary(setting, found, peak)
    _print_table(figures)
    print(json.dumps(figures))


def _setting(shape: str, segments: int | None, tokens: int | None, **given: Any) -> Setting:
    size = replace(SHAPES[shape], num_sources=NUM_SOURCES)
    size = replace(
        size,
        num_segments=segments or size.num_segments,
        num_tokens=tokens or size.num_tokens,
    )
    return Setting(size, **given)


def _options(given: dict[str, Any]) -> list[str]:
    """The command line again, for the processes."""
    words = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value not in (None, False):
            words += [option, str(value)]
    return words


def _print_table(figures: dict[str, Any]) -> None:
    control = figures["control"]
    print(
        f"{figures['parameters'] / 1e9:.2f} billion parameters, {figures['processes']} processes, "
        f"{figures['parallel']}, {control['device_name']}, {control['precision']}, "
        f"{figures['tokens_per_step']:,} tokens a step"
    )
    for way in WAYS:
        one = figures[way]
        used = "MFU unknown" if one["mfu"] is None else f"MFU {one['mfu']:.1%}"
        print(
            f"{way:>8}: {one['step_s']:8.3f} s a step, {one['tokens_per_s']:10,.0f} tokens/s, "
            f"peak {one['peak_bytes'] / 1e9:7.2f} GB a process, {used}"
        )
    print(
        f"fused / control: time {figures['step_ratio_clm']:.3f}, "
        f"memory {figures['memory_ratio_clm']:.3f}"
    )


if __name__ == "__main__":
    main()
