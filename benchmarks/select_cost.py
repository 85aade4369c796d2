"""What the ASN costs in a training step: parameters, FLOPs, share of the time.

The step is a fused one as the trainer takes it (forward, backward, AdamW) of the target that
`make bench-train` has (32,000 ids, hidden size 512, 4 layers), 2,048 positions, all sources of the
benchmark; both parts are timed in turn, medians are divided. Features are made once per shard beside
the loop, and told apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.select_data import SeedData
from fuse_train.config import TrainSection
from fuse_train.data.batch import Batch, collate, sources_of
from fuse_train.loop.objective import FusionObjective, StepTotals, importance
from fuse_train.losses.losses import importance_cv2
from fuse_train.selectors.asn import AdaptiveSelector
from fuse_train.selectors.features import shard_features
from fuse_train.selectors.pools import pool_nats
from fuse_train.selectors.prior import uniform_prior

POSITIONS, ROUNDS = 2_048, 5
VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS = 32_000, 512, 4


def asn_cost(data: SeedData, asn: AdaptiveSelector, names: tuple[str, ...]) -> dict[str, Any]:
    """Parameters, FLOPs of a step, share of its time, and what features cost.

    Args:
        data: Of any seed.
        asn: Trained or not.
        names: Sources.
    """
    batch = _batch(data, names)
    parameters = sum(p.numel() for p in asn.parameters())
    rows = batch.num_labels
    step = _step(batch, asn)
    alone = _alone(batch, asn)
    seconds: dict[str, list[float]] = {"step": [], "asn": []}
    for number in range(ROUNDS + 1):
        for name, run in (("step", step), ("asn", alone)):
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "parameters": parameters,
        # Two FLOPs for each weight forward and four backward, at each row for each source.
        "flops": 6 * parameters * rows * len(names),
        "rows": rows,
        "step_seconds": medians["step"],
        "asn_seconds": medians["asn"],
        "step_share": medians["asn"] / medians["step"],
        "features_rows_per_second": _features_speed(data, names),
    }


def _batch(data: SeedData, names: tuple[str, ...]) -> Batch:
    shard = data.part("train", names).samples.load(0, with_sources=True)
    chosen, rows = [], 0
    for index in range(len(shard.segments)):
        sample = shard.sample(index)
        if rows + sample.num_tokens > POSITIONS:
            break
        chosen.append(sample)
        rows += sample.num_tokens
    return collate(chosen, data.domains)


def _step(batch: Batch, asn: AdaptiveSelector) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=HIDDEN_SIZE * 8 // 3 // 32 * 32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HIDDEN_SIZE // 64,
    )
    section = TrainSection(selector="asn")
    objective = FusionObjective(LlamaForCausalLM(config), asn, section)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        totals = StepTotals(batch.num_labels, batch.num_labels, importance(asn, batch))
        loss, _ = objective(batch, totals)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _alone(batch: Batch, asn: AdaptiveSelector) -> Callable[[], None]:
    """All that a step does for the ASN: importance, gates, losses, backward, optimizer."""
    sources = sources_of(batch)
    at = batch.label_rows()
    optimizer = torch.optim.AdamW(asn.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        importance(asn, batch)
        gates_BTM = asn.gates(sources.view)
        weights_RM = asn.keep(gates_BTM)[at]
        logs_BTM = sources.label_logprobs_BTM.clamp(min=-1000.0)
        pool_R = pool_nats(gates_BTM, logs_BTM, sources.begins_BT)[at]
        (pool_R.mean() + 0.01 * importance_cv2(weights_RM.sum(0))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _features_speed(data: SeedData, names: tuple[str, ...]) -> float:
    shard = data.part("train", names).samples.load(0, with_sources=True)
    texts = [segment.text.encode() for segment in shard.segments]
    started = time.perf_counter()
    prior_DM = uniform_prior(len(texts), len(shard.sources))
    shard_features(shard.sources, shard.token_offsets, shard.byte_ends, texts, prior_DM)
    return len(shard.token_ids) / (time.perf_counter() - started)
