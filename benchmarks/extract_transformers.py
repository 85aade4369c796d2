"""Speed of the transformers engine beside a bare forward pass of the same model: what scoring adds.

A model of the given size with random weights scores segments of random tokens. Three ways take
turns: the base model alone; with float32 logits of every row, thrown away; and the engine, from
segments to arrays on the CPU. Needs torch, transformers and a folder for the weights, no more.

    python -m benchmarks.extract_transformers
    python -m benchmarks.extract_transformers --hidden 2048 --layers 16 --intermediate 8192 \\
        --vocab 128256 --dtype bfloat16 --segments 64 --head-rows 1024 --batch-tokens 16384

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from extract.engines.protocol import EngineSpec
from extract.engines.transformers_engine import Input, TransformersEngine, longest_first

HEAD_SIZE = 64
CHECKED_ROWS = 64


@dataclass(frozen=True, slots=True)
class Tokens:
    """What an engine reads of a segment; the real class needs libraries that may be missing."""

    context_ids: tuple[int, ...]
    token_ids: np.ndarray


def options() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description="See the top of the file.")
    for name, default in (
        ("hidden", 256), ("layers", 8), ("intermediate", 1024), ("vocab", 32_768),
        ("tokens", 512), ("segments", 16), ("top-k", 64), ("batch-tokens", 4096),
        ("head-rows", 256), ("rounds", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return parser.parse_args()


def make_model(chosen: argparse.Namespace, folder: Path) -> int:
    """Save a Llama of random weights; gives the number of its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    heads = max(chosen.hidden // HEAD_SIZE, 1)
    config = LlamaConfig(
        vocab_size=chosen.vocab,
        hidden_size=chosen.hidden,
        intermediate_size=chosen.intermediate,
        num_hidden_layers=chosen.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        max_position_embeddings=max(chosen.tokens + 1, 2048),
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    on_gpu = chosen.device != "cpu" and torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlamaForCausalLM(config).to(getattr(torch, chosen.dtype))
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def open_engine(chosen: argparse.Namespace, folder: Path) -> TransformersEngine:
    """With the fields of `extract` that this engine reads: the section's class is a library's."""
    section: Any = SimpleNamespace(
        engine="transformers",
        top_k=chosen.top_k,
        max_entries=chosen.top_k,
        estimator="topk",
        fp32_head=True,
        device=chosen.device,
        logit_rows=lambda *, on_cpu: chosen.head_rows,
        scored_tokens=lambda *, on_cpu: chosen.batch_tokens,
        threads=None,
    )
    told = {"trust_remote_code": False, "revision": None}
    ref: Any = SimpleNamespace(model_copy=lambda update: SimpleNamespace(**told | update), **told)
    size = chosen.vocab
    spec = EngineSpec("bench", folder, ref, section, chosen.dtype, size, size, chosen.tokens)
    return TransformersEngine(spec)


@torch.inference_mode()
def forward(engine: TransformersEngine, inputs: list[Input], *, with_logits: bool) -> None:
    """The base model over the engine's batches; with the logits of all rows where asked for."""
    per_batch = max(engine._pieces.batch_tokens // len(inputs[0].ids), 1)
    order = longest_first([len(found.ids) for found in inputs])
    for start in range(0, len(order), per_batch):
        batch = [inputs[i] for i in order[start : start + per_batch]]
        fed = [found.ids for found in batch]
        states = engine._states(fed, max(map(len, fed)))
        if with_logits:
            assert engine._head is not None
            for rows in states.split(engine._pieces.head_rows):
                engine._head.logits(rows)


@torch.inference_mode()
def largest_error(engine: TransformersEngine, inputs: list[Input]) -> float:
    """Nats between some rows' entries and a float64 product and log-softmax of the same states."""
    few = Input(inputs[0].segment, inputs[0].ids[: CHECKED_ROWS + 1], 1)
    states = engine._states([few.ids], len(few.ids))
    ids_RK, logprobs_RK, _ = engine._kept_rows(states, [(0, few)], len(few.ids))
    weight = engine._model.get_output_embeddings().weight
    parts = [states[:-1].double() @ part.double().t() for part in weight.split(8192)]
    exact = torch.log_softmax(torch.cat(parts, dim=1), dim=-1)
    chosen = exact.gather(1, ids_RK.long())
    wrong = (chosen - logprobs_RK).abs().max()
    missed = (exact.topk(chosen.shape[1]).values - chosen).abs().max()
    return float(torch.maximum(wrong, missed))


def seconds(engine: TransformersEngine, work: Callable[[], object]) -> float:
    """Until the device is done."""
    start = time.perf_counter()
    work()
    if engine._device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    chosen = options()
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, chosen.vocab, (chosen.segments, chosen.tokens), np.uint32)
    segments: list[Any] = [Tokens((int(row[0]),), row[1:]) for row in tokens]
    inputs = [Input.of(segment) for segment in segments]
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = make_model(chosen, Path(folder))
        engine = open_engine(chosen, Path(folder))
    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(engine, inputs, with_logits=False),
        "forward_and_logits": lambda: forward(engine, inputs, with_logits=True),
        "engine": lambda: sum(len(rows.ids) for _, rows in engine.score(segments)),
    }
    for work in reversed(ways.values()):  # the engine first: its probe finds the head
        seconds(engine, work)
    if engine._device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(chosen.rounds):
        for name, work in ways.items():
            took[name].append(seconds(engine, work))
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if engine._device.type == "cuda" else "cpu",
        "parameters": num_parameters,
        **{k: vars(chosen)[k] for k in ("dtype", "vocab", "top_k", "head_rows", "batch_tokens")},
        "max_error_nats": largest_error(engine, inputs),
    }
    for name, times in took.items():
        found[f"tokens_per_s_{name}"] = round(tokens.size / statistics.median(times))
        pairs = zip(times, took["forward"], strict=True)
        found[f"ratio_{name}"] = round(statistics.median(a / b for a, b in pairs), 3)
        print(
            f"{name:<20}{found[f'tokens_per_s_{name}']:>12,} tokens/s"
            f"{found[f'ratio_{name}']:>9.2f} x the forward pass"
        )
    if engine._device.type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
