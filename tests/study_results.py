"""Made-up results of studies: each row's NLL is the same text's, times a factor for each document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fuse_eval.interference.blocks import Blocks
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.records import TrainingRecord, ValidScore
from fuse_eval.study.results import SeedResult

NUM_BLOCKS, BLOCK_BYTES = 12, 100
DOMAINS = ("a", "a", "a", "b", "b", "b")
"""Of the documents."""
EVEN = [1.0] * 6


def study_of(*rows: str, **changed: Any) -> StudyConfig:
    """A study of some rows, of which `control` and `ours` have their parts."""
    content: dict[str, Any] = {
        "name": "s",
        "settings": {"demo": {"run": "run.yaml"}},
        "rows": {row: {} for row in rows},
        "control": "control",
        "ours": "ours" if "ours" in rows else None,
        "bootstrap_samples": 400,
    }
    return StudyConfig.model_validate(content | changed)


def training(row: str = "x", valid: Sequence[tuple[int, float]] = ((0, 2.0), (10, 1.0))) -> Any:
    """A record with these (step, bits per byte), of 100 tokens a step."""
    scores = tuple(ValidScore(step=step, bpb={"a": bpb, "b": bpb}) for step, bpb in valid)
    steps = valid[-1][0]
    return TrainingRecord(
        row=row, tuning={}, valid=scores, num_steps=steps, num_tokens=100 * steps, seconds=60.0
    )


def seen(
    factors: Mapping[str, Sequence[float]],
    pool: Mapping[str, Any] | None = None,
    seed: int = 0,
    trainings: Mapping[str, TrainingRecord] | None = None,
) -> SeedResult:
    """One seed: rows by the factors of their six documents."""
    rng = np.random.default_rng(3)
    base = rng.uniform(50, 90, (len(DOMAINS), NUM_BLOCKS))
    blocks = Blocks(
        document_ids=tuple(f"d{i}" for i in range(len(DOMAINS)) for _ in range(NUM_BLOCKS)),
        segment_ids=tuple(f"d{i}#0" for i in range(len(DOMAINS)) for _ in range(NUM_BLOCKS)),
        domains=tuple(domain for domain in DOMAINS for _ in range(NUM_BLOCKS)),
        numbers=np.tile(np.arange(NUM_BLOCKS, dtype=np.int32), len(DOMAINS)),
        num_bytes=np.full(base.size, BLOCK_BYTES, np.int64),
        nats={row: (base * np.asarray(f)[:, None]).ravel() for row, f in factors.items()},
    )
    records = trainings or {row: training(row) for row in factors}
    return SeedResult(seed, blocks, records, pool or {})


def document_nats(found: SeedResult, row: str) -> Any:
    """NLL of each of the six documents."""
    return found.blocks.nats[row].reshape(len(DOMAINS), -1).sum(1)
