"""`make bench-train`: the fused step beside a plain CLM step and the dense way; gradients; stream.

Times: all ways take turns in one process, in rounds of changing order; ratios of medians. Memory: each
way in a process of its own, the peak of two calls above what stood there before them (weights and
optimizer state for whole steps; weights, hidden states or logits for parts). Gradients: against dense
float64 lines on the same rounded inputs; at bfloat16 beside the error of the plain version (bfloat16
logits, loss in float32, by autograd). Stream: batches from stores on disk, every shard decoded once.

`speedup_dense` and `memory_saving_dense` are of collator and loss, from stored entries and logits to
the gradient of the logits: all that the dense way does otherwise. `head_` figures add the head's
products of matrices, which every way needs, and `step_` figures the rest of the step.

With a CUDA device the sizes are those of a 1B Llama with 128k ids, in bfloat16.

    python -m benchmarks.bench_train --rounds 2     # quicker, coarser
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import dense_fusion
from benchmarks.train_steps import (
    CPU,
    GPU,
    Size,
    Way,
    head_ways,
    loss_ways,
    make_batch,
    source_rows,
    step_ways,
)
from benchmarks.train_stream import make_samples, read, wait_share
from fuse_train.losses.losses import SourceRows, head_loss
from fuse_train.model.heads import Head

ERROR_ROWS = 256
BF16_SIZE = {"vocab_size": 8_192, "num_segments": 1, "num_tokens": 128}
"""Small: products of bfloat16 matrices are slow on most CPUs."""
WAIT_STEPS = 3
MEMORY_CALLS = 2
WAYS = ("plain", "fused", "dense")
PARTS = {"step": step_ways, "head": head_ways, "loss": loss_ways}


def timed(ways: dict[str, Way], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way, `rounds` times after one call that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _finish(device)
            started = time.perf_counter()
            ways[name]()
            _finish(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """Of medians."""
    return statistics.median(seconds[over]) / statistics.median(seconds[under])


def gradient_error_fp32(size: Size) -> float:
    """Relative error of our float32 gradients, the worse of hidden states and head."""
    return max(_errors(replace(size, num_segments=1, num_tokens=ERROR_ROWS), torch.float32)["ours"])


def gradient_error_bf16_ratio(size: Size) -> float:
    """Our error in bfloat16 over the plain version's, the worse of hidden states and head."""
    errors = _errors(replace(size, **BF16_SIZE), torch.bfloat16)  # type: ignore[arg-type]
    return max(a / b for a, b in zip(errors["ours"], errors["plain"], strict=True))


def _errors(size: Size, dtype: torch.dtype) -> dict[str, list[float]]:
    torch.manual_seed(2)
    hidden_RH = torch.randn(size.num_rows, size.hidden_size).to(dtype).requires_grad_()
    weight_VH = (torch.randn(size.vocab_size, size.hidden_size) / size.hidden_size**0.5).to(dtype)
    weight_VH.requires_grad_()
    batch = make_batch(size)
    rows, labels_R = source_rows(batch), batch.labels_BT.flatten()
    clm_R = torch.full((size.num_rows,), 0.3)
    fusion_RM = torch.full((size.num_rows, size.num_sources), 0.7 / size.num_sources)
    exact = _exact(hidden_RH, weight_VH, labels_R, clm_R, rows, fusion_RM)
    wrt = (hidden_RH, weight_VH)
    ours = head_loss(hidden_RH, Head(weight_VH), labels_R, clm_R, rows, fusion_RM).total
    found = {"ours": torch.autograd.grad(ours, wrt)}
    if dtype != torch.float32:
        logits_RV = (hidden_RH @ weight_VH.T).float()
        plain = dense_fusion.dense_total(logits_RV, labels_R, clm_R, rows, fusion_RM)
        found["plain"] = torch.autograd.grad(plain, wrt)
    return {
        name: [
            float((got.double() - want).norm() / want.norm())
            for got, want in zip(grads, exact, strict=True)
        ]
        for name, grads in found.items()
    }


def _exact(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_R: torch.Tensor,
    clm_R: torch.Tensor,
    rows: SourceRows,
    fusion_RM: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by dense float64 lines, a few rows at a time to fit in memory."""
    hidden = hidden_RH.detach().double().requires_grad_()
    weight = weight_VH.detach().double().requires_grad_()
    for start in range(0, len(hidden_RH), 64):
        at = slice(start, start + 64)
        part = SourceRows(rows.entry_ids_RMK[at], rows.entry_probs_RMK[at], rows.tail_RM[at])
        logits_RV = hidden[at] @ weight.T
        total = dense_fusion.dense_total(logits_RV, labels_R[at], clm_R[at], part, fusion_RM[at])
        total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def peak_bytes(what: str, way: str, device: torch.device) -> int:
    """Peak of a way above what stands there, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_train", "--child", what, way, device.type]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def measure_child(what: str, way: str, kind: str) -> None:
    """Measure this process; the last line says what was found."""
    device = torch.device(kind)
    size = GPU if kind == "cuda" else CPU
    ways = PARTS[what](size, device)
    if what == "step":
        ways["prepare"]()  # AdamW's state stands there before every step but the first
    _finish(device)
    before = _resident(device, peak=False)
    for _ in range(MEMORY_CALLS):
        ways[way]()
        _finish(device)
    print(json.dumps({"peak_bytes": _resident(device, peak=True) - before}))


def _resident(device: torch.device, *, peak: bool) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    name = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def stream_figures(size: Size, device: torch.device, step_positions_per_s: float) -> dict[str, Any]:
    """Reading speed against the fused step's, and how long that waits."""
    with tempfile.TemporaryDirectory() as name:
        samples = make_samples(
            Path(name), Path("runs/bench/store-model-stream"), size.num_sources, size.num_entries
        )
        readings = [read(samples, Path(name)) for _ in range(3)]
        speed = statistics.median(r.positions_per_s for r in readings)
        vocab = samples.tokenizer.vocab_size
        ways = step_ways(replace(size, vocab_size=vocab), device)
        share, consumed = wait_share(samples, ways["on"], WAIT_STEPS)
    print(
        f"stream: {speed:,.0f} positions/s ready ({readings[0].mbytes:.1f} MB for "
        f"{readings[0].num_positions:,} positions), the step takes {step_positions_per_s:,.0f}; "
        f"with both at work {consumed:,.0f}, of that time {share:.2%} spent waiting"
    )
    return {
        "stream_positions_per_s": speed,
        "stream_ratio": speed / step_positions_per_s,
        "wait_share": share,
    }


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Of the timings.")
@click.option("--skip-stream", is_flag=True, help="Without stores.")
@click.option("--child", nargs=3, hidden=True)
def main(rounds: int, skip_stream: bool, child: tuple[str, str, str] | None) -> None:
    """Measure and print a table, then one JSON object."""
    if child is not None:
        measure_child(*child)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = GPU if device.type == "cuda" else CPU
    print(
        f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}: {size.vocab_size:,} ids, hidden {size.hidden_size}, "
        f"{size.num_layers} layers, {size.num_rows:,} positions, {size.num_sources} sources of "
        f"{size.num_entries} entries, {size.dtype}"
    )
    found: dict[str, Any] = {}
    for what, make in PARTS.items():
        ways = make(size, device)
        seconds = timed({name: ways[name] for name in WAYS}, rounds, device)
        del ways
        peaks = {name: peak_bytes(what, name, device) for name in seconds}
        found[what] = (seconds, peaks)
        for name, times in seconds.items():
            print(
                f"{what} {name:>5}: {statistics.median(times):8.3f} s "
                f"({min(times):.3f} to {max(times):.3f}), peak {peaks[name] / 1e6:8,.0f} MB"
            )
    summary = _summary(found)
    summary["grad_error_fp32"] = gradient_error_fp32(size)
    summary["grad_error_bf16_ratio"] = gradient_error_bf16_ratio(size)
    print(
        f"gradients: relative error {summary['grad_error_fp32']:.2g} at float32; at bfloat16 "
        f"{summary['grad_error_bf16_ratio']:.3f} of the plain version's"
    )
    if not skip_stream:
        per_s = size.num_rows / statistics.median(found["step"][0]["fused"])
        summary |= stream_figures(size, device, per_s)
    print(json.dumps(summary))


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    (step, step_peak), (head, head_peak), (loss, loss_peak) = (found[part] for part in PARTS)
    return {
        "step_ratio_clm": ratio(step, "fused", "plain"),
        "memory_ratio_clm": step_peak["fused"] / step_peak["plain"],
        "speedup_dense": ratio(loss, "dense", "fused"),
        "memory_saving_dense": loss_peak["dense"] / loss_peak["fused"],
        "head_speedup_dense": ratio(head, "dense", "fused"),
        "head_memory_saving_dense": head_peak["dense"] / head_peak["fused"],
        "step_speedup_dense": ratio(step, "dense", "fused"),
        "step_memory_saving_dense": step_peak["dense"] / step_peak["fused"],
        "head_ratio_clm": ratio(head, "fused", "plain"),
        "head_memory_ratio_clm": head_peak["fused"] / head_peak["plain"],
    }


if __name__ == "__main__":
    main()
