"""How fast batches come from aligned stores, and whether a training step ever waits for them.

The stores are made on the spot through the writer: real text in a 32k vocabulary, four made-up
sources of 32 entries a position. Their content is random, so that they compress badly and read slowly.

Shape suffixes: N positions, K entries.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store_model import make_model as make_store_model
from fuse_train.data.samples import AlignedSamples
from fuse_train.data.stream import SampleStream, StreamOptions
from store_schema.config import ModelRef
from store_schema.disk.location import open_location
from store_schema.layout import Arrays, Origin
from store_schema.plan.plan import Plan, Segment, write_plan
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import SegmentTokenizer
from tests.aligned_factory import aligned_manifest

SEGMENT_BYTES = 1_600
"""About 500 tokens of code in this vocabulary."""
SEGMENTS_A_SHARD = 16
NUM_SHARDS = 6
BATCH_SEGMENTS = 4
TOKENIZER_STEPS = 1
"""Only the tokenizer is wanted of the model that comes with it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a stream does.

    Args:
        positions_per_s: Labels ready for the trainer, decoding included, on this thread.
        num_positions: Read.
        mbytes: Of the stores.
    """

    positions_per_s: float
    num_positions: int
    mbytes: float


def make_samples(folder: Path, cache: Path, num_sources: int, num_entries: int) -> AlignedSamples:
    """Aligned stores of made-up sources over real text.

    Args:
        folder: They are written below it.
        cache: Where the tokenizer is kept between runs.
        num_sources: How many.
        num_entries: Of each position.
    """
    made = make_store_model(cache, num_steps=TOKENIZER_STEPS)
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(made.folder)), name="target")
    texts = _pieces(d.text for d in made.other_documents)
    wanted = [next(texts) for _ in range(NUM_SHARDS * SEGMENTS_A_SHARD)]
    plan = _plan(folder / "plan", tokenizer, wanted)
    stores = {}
    for number in range(num_sources):
        name = f"s{number}"
        location = open_location(str(folder / name))
        manifest = aligned_manifest(name, plan, tokenizer, top_k=num_entries)
        writer = StoreWriter.open(location, manifest, tokenizer.vocabulary)
        for shard in plan.shards:
            segments = plan.segments(shard)
            rng = np.random.default_rng([number, shard.index])
            writer.write(shard, _arrays(segments, tokenizer, num_entries, rng))
        stores[name] = StoreReader.open(location)
    return AlignedSamples(plan, stores, tokenizer, split="train")


def read(samples: AlignedSamples, folder: Path) -> Reading:
    """One pass over all batches, every shard decoded once."""
    stream = _stream(samples, prefetch=0)
    started = time.perf_counter()
    steps = stream.num_samples // BATCH_SEGMENTS
    positions = sum(b.num_labels for step in stream.batches(0, steps) for b in step)
    seconds = time.perf_counter() - started
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return Reading(positions / seconds, positions, size / 1e6)


def wait_share(samples: AlignedSamples, step: Any, num_steps: int) -> tuple[float, float]:
    """Share of the time that steps wait for batches prepared in the background, and positions/s.

    The first batch is not counted: nothing can be done before it.

    Args:
        samples: The stores.
        step: Called with each batch.
        num_steps: How many.
    """
    waited, positions = 0.0, 0
    with closing(_stream(samples, prefetch=2).batches(0, num_steps + 1)) as batches:
        first = next(batches)
        started = time.perf_counter()
        for _ in range(num_steps):
            for batch in first:
                step(batch)
                positions += batch.num_labels
            asked = time.perf_counter()
            first = next(batches)
            waited += time.perf_counter() - asked
        seconds = time.perf_counter() - started
    return waited / seconds, positions / seconds


def _stream(samples: AlignedSamples, prefetch: int) -> SampleStream:
    options = StreamOptions(
        seed=0,
        batch_segments=BATCH_SEGMENTS,
        micro_batch_segments=BATCH_SEGMENTS,
        shuffle_shards=2,
        cache_gib=0.0,
        prefetch_batches=prefetch,
    )
    return SampleStream(samples, options, ("code",))


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Pieces of ASCII text of the same length, so that each cut is a cut between characters."""
    for text in texts:
        plain = text.encode("ascii", "ignore").decode()
        for start in range(0, len(plain) - SEGMENT_BYTES, SEGMENT_BYTES):
            yield plain[start : start + SEGMENT_BYTES]


def _plan(folder: Path, tokenizer: SegmentTokenizer, texts: list[str]) -> Plan:
    shards = []
    for start in range(0, len(texts), SEGMENTS_A_SHARD):
        segments = [
            Segment(
                start + i, f"d{start + i}#0", f"d{start + i}", "code", "train", 0,
                len(text), True, None, text,
            )
            for i, text in enumerate(texts[start : start + SEGMENTS_A_SHARD])
        ]  # fmt: skip
        counted = sum(len(e.token_ids) for e in tokenizer.encode(segments))
        shards.append((segments, {"target": counted}))
    return write_plan(
        open_location(str(folder)),
        shards,
        corpus_fingerprint="c" * 32,
        request_fingerprint="r" * 32,
        tokenizers={"target": tokenizer.fingerprint},
        settings={},
    )


def _arrays(
    segments: Any, tokenizer: SegmentTokenizer, num_entries: int, rng: np.random.Generator
) -> Arrays:
    """Distinct random entries of falling probability at every row; the label is the first of them."""
    encoded = tokenizer.encode(segments)
    labels = np.concatenate([e.token_ids for e in encoded]).astype(np.int64)
    rows = [len(e.token_ids) for e in encoded]
    total = len(labels)
    # Steps above 0 that sum to less than the vocabulary: distinct, and none is the label again.
    most = (tokenizer.vocab_size - 1) // num_entries
    steps = rng.integers(1, most + 1, (total, num_entries - 1)).cumsum(1)
    others = (labels[:, None] + steps) % tokenizer.vocab_size
    mass = np.sort(rng.dirichlet(np.full(num_entries, 0.3), total), axis=1)[:, ::-1]
    mass = (mass * rng.uniform(0.8, 0.99, (total, 1))).clip(1e-9).astype(np.float32)
    logprobs = np.log(mass)
    nats = [float(part.sum()) for part in np.split(-logprobs[:, 0], np.cumsum(rows)[:-1])]
    ones = np.arange(len(segments) + 1)
    ends = np.array([e.byte_ends[-1] for e in encoded])
    return {
        "segment_ids": np.array([s.index for s in segments], "<i8"),
        "token_offsets": np.concatenate([[0], np.cumsum(rows)]).astype("<i8"),
        "token_ids": labels.astype("<u4"),
        "byte_ends": np.concatenate([e.byte_ends for e in encoded]).astype("<u4"),
        "entry_offsets": (np.arange(total + 1) * num_entries).astype("<i8"),
        "entry_ids": np.concatenate([labels[:, None], others], 1).flatten().astype("<u4"),
        "entry_logprobs": logprobs.flatten().astype("<f4"),
        "tail_mass": (1 - mass.astype(np.float64).sum(1)).clip(0, 1).astype("<f4"),
        "label_logprobs": logprobs[:, 0].astype("<f4"),
        "origin": np.full(total, Origin.BOUNDARY, "|u1"),
        "span_offsets": ones.astype("<i8"),
        "span_index": np.zeros(total, "<u4"),
        "span_byte_ends": ends.astype("<u4"),
        "span_logprobs": -np.asarray(nats, "<f4"),
        "source_nats": np.asarray(nats, "<f8"),
        "source_bytes": ends.astype("<i8"),
    }
