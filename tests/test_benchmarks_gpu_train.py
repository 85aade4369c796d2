"""The measurement of trainings on several processes, at a size for a CPU; its sums by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu_train
from benchmarks.gpu_train import SHAPES, Measured, Setting
from benchmarks.train_steps import make_model

TINY = Setting(SHAPES["tiny"], "ddp", 2, 3, "cpu", False)


def test_parameters_are_those_of_the_model_without_its_embedding() -> None:
    size = SHAPES["tiny"]
    model = make_model(size, torch.device("cpu"))
    counted = sum(p.numel() for p in model.parameters())
    assert gpu_train.num_parameters(size) == counted - size.vocab_size * size.hidden_size


@pytest.mark.parametrize(("shape", "billions"), [("1b", 1.24), ("8b", 7.50)])
def test_shapes_have_the_size_of_their_name(shape: str, billions: float) -> None:
    assert gpu_train.num_parameters(SHAPES[shape]) / 1e9 == pytest.approx(billions, abs=0.01)


def test_flops_of_a_step() -> None:
    """Forward and backward are three passes, each a multiplication and an addition."""
    size = TINY.size
    tokens = 2 * size.num_segments * size.num_tokens
    matrices = 6 * gpu_train.num_parameters(size) * tokens
    # Scores and values: two products of hidden_size for each pair of tokens, half of them masked.
    pairs = 2 * size.num_segments * size.num_tokens**2 / 2
    attention = 6 * size.num_layers * 2 * size.hidden_size * pairs
    assert gpu_train.step_flops(TINY) == pytest.approx(matrices + attention)
    flops = gpu_train.step_flops(TINY)
    assert gpu_train.mfu(TINY, 2.0, 1.0) == pytest.approx(flops / 2 / 2e12)
    assert gpu_train.mfu(TINY, 2.0, None) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("cpu", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert gpu_train.peak_of(name) == peak


def test_ratios_are_fused_over_control() -> None:
    found = {
        "control": Measured(2.0, 100, 50, 10.0, "bfloat16", "NVIDIA H200"),
        "fused": Measured(2.5, 110, 50, 8.0, "bfloat16", "NVIDIA H200"),
    }
    figures = gpu_train.summary(TINY, found, 989.0)
    assert (figures["step_ratio_clm"], figures["memory_ratio_clm"]) == (1.25, 1.1)
    assert figures["control"]["mfu"] == pytest.approx(1.25 * figures["fused"]["mfu"])
    assert json.loads(json.dumps(figures)) == figures


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = ["--shape", "1b", "--parallel", "ddp", "--processes", "2"]
    done = CliRunner().invoke(gpu_train.main, words)
    assert done.exit_code == 2
    assert "2 processes, but 1 GPUs" in done.output


def test_the_processes_get_the_command_line_again() -> None:
    given = {"shape": "8b", "segments": None, "gradient_checkpointing": True, "steps": 4}
    words = ["--shape", "8b", "--gradient-checkpointing", "--steps", "4"]
    assert gpu_train._options(given) == words
    assert gpu_train._options(given | {"gradient_checkpointing": False})[2:] == words[3:]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.usefixtures("quick_processes")
def test_two_processes_on_a_cpu(tmp_path: Path, parallel: str) -> None:
    words = ["--shape", "tiny", "--processes", "2", "--steps", "2", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_train", "--parallel", parallel, *words],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    size = replace(TINY.size, num_sources=2)
    assert figures["tokens_per_step"] == 2 * size.num_rows
    for way in ("fused", "control"):
        assert figures[way]["step_s"] > 0
        assert figures[way]["peak_bytes"] > 100e6
        share = figures[way]["held_parameters"] / figures["parameters"]
        assert share == pytest.approx(0.5 if parallel == "fsdp2" else 1.0, abs=0.01)
    ratio = figures["fused"]["step_s"] / figures["control"]["step_s"]
    assert figures["step_ratio_clm"] == pytest.approx(ratio)
