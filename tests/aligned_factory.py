"""Aligned stores of made-up sources over a real plan and a real tiny target: no model is run.

Source m is good in domain m and poor elsewhere, so a selector has something to learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuse_train.config import TrainSection
from store_schema.config import ModelRef, RunConfig
from store_schema.disk.location import open_location
from store_schema.layout import Arrays, Origin
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.plan.plan import Plan, Segment, write_plan
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.run_file import write_run_file
from tests.tiny import add_beyond_rows, tiny_model, tiny_tokenizer

WORDS = {
    "code": ["def", "return", "x", "=", "foo(a,", "b):", "if", "else:", "\n    ", "0", "12", "+"],
    "prose": ["the", "quick", "fox", "wasn't", "amused,", "naturally.", "Next", "day", "café", "—"],
    "facts": [
        "1,000",
        "metres",
        "is",
        "one",
        "kilometre;",
        "漢字",
        "means",
        "signs.",
        "π",
        "~3.14",
    ],
}


def make_text(domain: str, rng: np.random.Generator, num_words: int) -> str:
    """Words of a domain in an order that a small model can half learn."""
    words = WORDS.get(domain, WORDS["prose"])
    at = int(rng.integers(len(words)))
    chosen = []
    for _ in range(num_words):
        at = (at + (1 if rng.random() < 0.8 else int(rng.integers(len(words))))) % len(words)
        chosen.append(words[at])
    return " ".join(chosen)


def make_plan(
    folder: str | Path,
    tokenizer: SegmentTokenizer,
    *,
    domains: Sequence[str] = ("code", "prose", "facts"),
    shards: Mapping[str, int] | None = None,
    segments_per_shard: int = 12,
    seed: int = 0,
    inputs: Mapping[str, tuple[str | None, str | None]] | None = None,
) -> Plan:
    """A plan with shards of mixed domains for each split.

    Args:
        inputs: Author and corpus of the texts of a domain.
    """
    rng = np.random.default_rng(seed)
    made: list[tuple[list[Segment], dict[str, int]]] = []
    index = 0
    for split, count in (shards or {"train": 4, "valid": 1, "test": 1}).items():
        for _ in range(count):
            segments = []
            for _ in range(segments_per_shard):
                domain = str(domains[index % len(domains)])
                text = make_text(domain, rng, int(rng.integers(8, 24)))
                document = f"{domain}-{index}"
                size = len(text.encode())
                segments.append(
                    Segment(
                        index,
                        f"{document}#0",
                        document,
                        domain,
                        split,
                        0,
                        size,
                        True,
                        None,
                        text,
                        *(inputs or {}).get(domain, ()),
                    )
                )
                index += 1
            num_tokens = sum(len(e.token_ids) for e in tokenizer.encode(segments))
            made.append((segments, {"target": num_tokens}))
    return write_plan(
        open_location(folder),
        made,
        corpus_fingerprint="c" * 32,
        request_fingerprint="r" * 32,
        tokenizers={"target": tokenizer.fingerprint},
        settings={},
    )


def make_arrays(
    segments: Sequence[Segment],
    encoded: Sequence[EncodedSegment],
    vocab_size: int,
    *,
    good_at: str,
    top_k: int,
    seed: int,
    uncovered: float = 0.08,
) -> Arrays:
    """Aligned arrays of one shard by a source that is good at one domain.

    Args:
        segments: Of the shard.
        encoded: The same in the target's tokens.
        vocab_size: Of the target.
        good_at: Domain where labels get most of the mass.
        top_k: Entries of a covered row.
        seed: Of the content.
        uncovered: Share of rows that nothing is known about.
    """
    rng = np.random.default_rng(seed)
    rows = [len(e.token_ids) for e in encoded]
    total = sum(rows)
    token_offsets = np.concatenate([[0], np.cumsum(rows)]).astype("<i8")
    labels = np.concatenate([e.token_ids for e in encoded])
    without = rng.random(total) < uncovered
    for start, item in zip(token_offsets[:-1], encoded, strict=True):
        without[start] |= not item.context_ids
    skill = np.concatenate(
        [
            np.full(n, 6.0 if s.domain == good_at else 1.0)
            for n, s in zip(rows, segments, strict=True)
        ]
    )
    label_p = rng.beta(skill, 3.0 if top_k else 1.0).clip(1e-4, 0.98)
    counts = np.where(without, 0, top_k)
    ids, logprobs = [], []
    tail = np.ones(total)
    for i in np.flatnonzero(~without):
        others = rng.choice(vocab_size - 1, top_k - 1, replace=False)
        others = others + (others >= labels[i])  # every id but the label
        share = rng.dirichlet(np.full(top_k, 0.5)) * (1 - label_p[i])
        mass = np.concatenate([[label_p[i]], share[:-1]]).astype(np.float32)
        order = np.argsort(-mass, kind="stable")
        logs = np.log(np.maximum(mass[order], 1e-30)).astype(np.float32)
        ids.append(np.concatenate([[labels[i]], others])[order])
        logprobs.append(np.minimum(logs, 0))
        tail[i] = max(0.0, 1.0 - float(np.exp(logs.astype(np.float64)).sum()))
    known = np.where(without, np.nan, np.log(label_p)).astype("<f4")
    nats = [float(-np.nansum(part)) for part in np.split(known, token_offsets[1:-1])]
    ones = np.arange(len(segments) + 1)
    return {
        "segment_ids": np.array([s.index for s in segments], "<i8"),
        "token_offsets": token_offsets,
        "token_ids": labels.astype("<u4"),
        "byte_ends": np.concatenate([e.byte_ends for e in encoded]).astype("<u4"),
        "entry_offsets": np.concatenate([[0], np.cumsum(counts)]).astype("<i8"),
        "entry_ids": np.concatenate(ids).astype("<u4"),
        "entry_logprobs": np.concatenate(logprobs).astype("<f4"),
        "tail_mass": tail.clip(0, 1).astype("<f4"),
        "label_logprobs": known,
        "origin": np.where(without, Origin.NONE, Origin.BOUNDARY).astype("|u1"),
        "span_offsets": ones.astype("<i8"),
        "span_index": np.zeros(total, "<u4"),
        "span_byte_ends": np.array([e.byte_ends[-1] for e in encoded], "<u4"),
        "span_logprobs": -np.asarray(nats).astype("<f4"),
        "source_nats": np.asarray(nats, "<f8"),
        "source_bytes": np.array([e.byte_ends[-1] for e in encoded], "<i8"),
    }


def make_run(
    folder: Path,
    *,
    sources: Mapping[str, str] | None = None,
    train: Mapping[str, Any] | None = None,
    bos: bool = True,
    top_k: int = 6,
    segments_per_shard: int = 12,
    shards: Mapping[str, int] | None = None,
    seed: int = 0,
    added: Sequence[str] = (),
    inputs: Mapping[str, tuple[str | None, str | None]] | None = None,
) -> RunConfig:
    """A run folder with target, plan and aligned stores, and its run file `run.yaml`.

    Args:
        folder: Everything goes below it.
        sources: Domain that each source is good at, by name; None makes code, prose and facts.
        train: Fields of the train section.
        bos: Whether the target's tokenizer puts BOS before a text.
        top_k: Entries of a row.
        segments_per_shard: Of the plan.
        shards: Number by split.
        seed: Of the run.
        added: Tokens of the target's tokenizer that the model has no rows for.
        inputs: Author and corpus of the texts of a domain.
    """
    sources = sources or {name: name for name in ("code", "prose", "facts")}
    hf = tiny_tokenizer(
        "byte_level", [make_text(d, np.random.default_rng(1), 200) for d in WORDS], 330, bos=bos
    )
    target = tiny_model(folder / "target", "llama", hf, scale=0.05)
    tokenizer = SegmentTokenizer(hf, name="target")
    if added:
        add_beyond_rows(target, *added)
        tokenizer = SegmentTokenizer.load(ModelRef(model=str(target)), name="target")
    run_folder = folder / "run"
    plan = make_plan(
        run_folder / "plan",
        tokenizer,
        segments_per_shard=segments_per_shard,
        shards=shards,
        inputs=inputs,
    )
    models = {name: f"made/{name}" for name in sources} | {"target": str(target)}
    section = {
        "batch_segments": 8,
        "micro_batch_segments": 8,
        "max_steps": 6,
        "eval_every": 3,
        "asn": {"pretrain_steps": 4},
        "log_every": 2,
    } | dict(train or {})
    write_run_file(folder, models, name="made", seed=seed, train=section)
    run = RunConfig(
        name="made",
        run_dir=str(run_folder),
        seed=seed,
        sources={name: ModelRef(model=f"made/{name}") for name in sources},
        target=ModelRef(model=str(target)),
    )
    run = run.model_copy(update={"sections": {"train": TrainSection.model_validate(section)}})
    for number, (name, good_at) in enumerate(sources.items()):
        write_aligned(run, plan, tokenizer, name, good_at=good_at, top_k=top_k, seed=number)
    return run


def aligned_manifest(
    source: str,
    plan: Plan,
    tokenizer: SegmentTokenizer,
    *,
    top_k: int,
    settings: Mapping[str, Any] | None = None,
) -> Manifest:
    """Manifest of a made-up source's aligned store; benchmarks use it too."""
    return Manifest(
        kind="aligned",
        source=source,
        model=ModelIdentity(
            name=f"made/{source}",
            model_fingerprint="m" * 32,
            tokenizer_fingerprint="s" * 32,
            vocab_size=1000,
        ),
        target=ModelIdentity(
            name="target",
            model_fingerprint=None,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
        ),
        corpus_fingerprint=plan.record.corpus_fingerprint,
        plan_fingerprint=plan.fingerprint,
        top_k=top_k,
        settings=dict(settings or {}),
        vocabulary_fingerprint=tokenizer.vocabulary.fingerprint,
    )


def write_aligned(
    run: RunConfig,
    plan: Plan,
    tokenizer: SegmentTokenizer,
    source: str,
    *,
    good_at: str,
    top_k: int,
    seed: int,
) -> None:
    """One aligned store of all the plan's shards."""
    manifest = aligned_manifest(source, plan, tokenizer, top_k=top_k, settings={"good_at": good_at})
    location = open_location(run.aligned_url(source))
    writer = StoreWriter.open(location, manifest, tokenizer.vocabulary)
    for shard in plan.shards:
        segments = plan.segments(shard)
        arrays = make_arrays(
            segments,
            tokenizer.encode(segments),
            tokenizer.vocab_size,
            good_at=good_at,
            top_k=top_k,
            seed=seed * 1000 + shard.index,
        )
        writer.write(shard, arrays)
