"""Small stores of random content that keep every invariant of the layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from store_schema.disk.location import Location
from store_schema.layout import Arrays, Finish, Form
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.plan.plan import Plan, Segment, ShardRecord, write_plan
from store_schema.presets import PRESETS, Encoding
from store_schema.text.vocabulary import Vocabulary

BIG_VOCAB = 262_145
"""Past 2^17 and 2^18: ids that 17-bit formats lose."""

TOKENIZER = "t" * 32


def arrays(
    kind: Form = "source",
    rows: Sequence[int] = (3, 0, 5),
    *,
    top_k: int = 4,
    vocab_size: int = BIG_VOCAB,
    seed: int = 0,
) -> Arrays:
    """Arrays of one shard.

    Args:
        kind: Which arrays.
        rows: Positions of each segment, the first of which has no distribution; in a generated store
            of each answer, two to a prompt.
        top_k: Entries of a row, at most; rows differ.
        vocab_size: Ids lie below it, some close to it.
        seed: Of the content.
    """
    rng = np.random.default_rng(seed)
    top_k = 0 if kind == "generated" else top_k
    token_offsets = np.concatenate([[0], np.cumsum(rows)]).astype("<i8")
    total = int(token_offsets[-1])
    first = np.zeros(total, bool)
    first[[int(o) for o, n in zip(token_offsets, rows, strict=False) if n]] = True
    counts = np.where(first, 0, rng.integers(0, top_k + 1, total))
    entry_offsets = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
    ids, logprobs, tails = [], [], []
    for count in counts:
        mass = np.sort(rng.dirichlet(np.ones(count + 1)))[::-1].astype(np.float32)
        ids.append(rng.choice(vocab_size, count, replace=False))
        logprobs.append(np.log(np.maximum(mass[:count], 1e-30)))
        tails.append(1.0 - float(np.exp(logprobs[-1].astype(np.float64)).sum()))
    tail = np.clip(np.asarray(tails, np.float64), 0, 1)
    labels = np.where(first, np.nan, -rng.exponential(2.0, total))
    sizes = rng.integers(0, 6, total)
    ends = [np.cumsum(part) for part in np.split(sizes, token_offsets[1:-1])] if rows else []
    made: Arrays = {
        "segment_ids": np.arange(len(rows)).astype("<i8"),
        "token_offsets": token_offsets,
        "token_ids": rng.integers(0, vocab_size, total).astype("<u4"),
        "byte_ends": np.concatenate([np.zeros(0), *ends]).astype("<u4"),
    }
    if kind == "generated":
        return made | answers(made)
    made |= {
        "entry_offsets": entry_offsets,
        "entry_ids": np.concatenate([np.zeros(0), *ids]).astype("<u4"),
        "entry_logprobs": np.minimum(np.concatenate([np.zeros(0), *logprobs]), 0).astype("<f4"),
        "tail_mass": tail.astype("<f4"),
        "label_logprobs": labels.astype("<f4"),
    }
    if kind == "branched":
        made |= branches(made, top_k, vocab_size, rng)
    if kind == "aligned":
        spans = [min(n, 2) for n in rows]
        made |= {
            "origin": np.where(counts > 0, rng.integers(1, 3, total), 0).astype("|u1"),
            "span_offsets": np.concatenate([[0], np.cumsum(spans)]).astype("<i8"),
            "span_index": np.zeros(total, "<u4"),
            "span_byte_ends": np.ones(sum(spans), "<u4"),
            "span_logprobs": -np.ones(sum(spans), "<f4"),
            "source_nats": rng.exponential(5.0, len(rows)).astype("<f8"),
            "source_bytes": rng.integers(0, 50, len(rows)).astype("<i8"),
        }
    return made


def branches(made: Arrays, top_k: int, vocab_size: int, rng: np.random.Generator) -> Arrays:
    """Arrays of branches after every second entry that is not the text's own token."""
    rows = np.repeat(np.arange(len(made["token_ids"])), np.diff(made["entry_offsets"]))
    other = np.flatnonzero(made["entry_ids"] != made["token_ids"][rows])[::2]
    places = sorted(zip(rows[other].tolist(), made["entry_ids"][other].tolist(), strict=True))
    counts = rng.integers(0, top_k + 1, len(places))
    parts = [np.sort(rng.dirichlet(np.ones(count + 1)))[::-1] for count in counts]
    masses = np.concatenate([np.zeros(0), *(part[:-1] for part in parts)])
    ids = [rng.choice(vocab_size, count, replace=False) for count in counts]
    return {
        "branch_positions": np.array([row for row, _ in places], "<u4"),
        "branch_tokens": np.array([token for _, token in places], "<u4"),
        "branch_entry_offsets": np.concatenate([[0], np.cumsum(counts)]).astype("<i8"),
        "branch_entry_ids": np.concatenate([np.zeros(0), *ids]).astype("<u4"),
        "branch_entry_logprobs": np.log(np.maximum(masses, 1e-30)).astype("<f4"),
        "branch_tail_mass": np.array([part[-1] for part in parts], "<f4"),
    }


def answers(made: Arrays) -> Arrays:
    """Arrays of a generated store beside its tokens: two answers to each prompt.

    Answers with text take turns in how they ended, those without tokens never began.
    """
    numbers = np.arange(len(made["segment_ids"]))
    rows = np.diff(made["token_offsets"])
    stops = made["token_offsets"][1:].tolist()
    sizes = [made["byte_ends"][stop - 1] if n else 0 for n, stop in zip(rows, stops, strict=True)]
    without = np.where(rows == 0, Finish.PROMPT_TOO_LONG, Finish.EMPTY)
    return {
        "segment_ids": (numbers // 2).astype("<i8"),
        "answer_index": (numbers % 2).astype("<u4"),
        "finish": np.where(np.array(sizes) > 0, numbers % 3, without).astype("|u1"),
    }


def vocabulary() -> Vocabulary:
    """A table of three tokens; big enough for a digest."""
    return Vocabulary((b"", b"a", b"bc"), np.array([True, False, False]))


def manifest(
    kind: Form = "source",
    *,
    vocab_size: int = BIG_VOCAB,
    top_k: int = 4,
    encoding: Encoding = PRESETS["exact"],
) -> Manifest:
    """Manifest of a made-up store."""
    model = ModelIdentity(
        name="m", model_fingerprint="m" * 32, tokenizer_fingerprint=TOKENIZER, vocab_size=vocab_size
    )
    return Manifest(
        kind="source" if kind == "branched" else kind,
        settings={"branches": {"per_position": 0.3}} if kind == "branched" else {},
        source="s",
        model=model,
        target=model if kind == "aligned" else None,
        corpus_fingerprint="c" * 32,
        plan_fingerprint="p" * 32,
        top_k=None if kind == "generated" else top_k,
        encoding=Encoding() if kind == "generated" else encoding,
        vocabulary_fingerprint=vocabulary().fingerprint,
    )


def shard_record(index: int = 0) -> ShardRecord:
    """Shard `index` of a made-up plan."""
    return ShardRecord(
        index=index,
        split="train",
        start=3 * index,
        stop=3 * index + 3,
        num_bytes=30,
        num_tokens={"s": 8, "target": 8},
        fingerprint="f" * 32,
    )


def segments(texts: Sequence[str], *, start: int = 0, split: str = "train") -> list[Segment]:
    """One document and one segment for each text."""
    return [
        Segment(i, f"d{i}#0", f"d{i}", "odd", split, 0, len(text.encode()), True, None, text)
        for i, text in enumerate(texts, start)
    ]


def plan(location: Location, shards: Sequence[Sequence[str]]) -> Plan:
    """A plan of given texts."""
    start, assigned = 0, []
    for texts in shards:
        assigned.append((segments(texts, start=start), {"target": len(texts)}))
        start += len(texts)
    return write_plan(
        location,
        assigned,
        corpus_fingerprint="c" * 32,
        request_fingerprint="r" * 32,
        tokenizers={"target": TOKENIZER},
        settings={"max_tokens": 8},
    )
