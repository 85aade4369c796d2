"""What an aligned source scores on text in the target's tokens, and how much mass it keeps.

Rows are a real model's. The score is set against the source's own on the same bytes. A position where a
method gives its label nothing is charged the row's tail, at least `LEAST_TAIL`, spread evenly over the
ids that are no entries; the share of such positions stands beside the score. Where a method gives
no distribution, that is the uniform one, since a method must not gain by giving none; how much of a
score comes from there stands in a table of its own.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unicodedata import is_normalized

import numpy as np
import numpy.typing as npt

from align.methods.method import Aligner
from benchmarks.align_pairs import (
    COUNTED_BYTES,
    QUICK_COUNTED_BYTES,
    Pair,
    as_segments,
    family_tokenizer,
    library_texts,
    real_shards,
)
from benchmarks.store_model import make_model
from fuse_eval.common_bytes import common_boundaries, counted_from
from store_schema.layout import Arrays, Origin
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer

MODEL_TARGETS = {
    "gpt2": 8_192, "llama3": 6_000, "qwen": 3_000, "llama2": 8_192, "mistral": 4_096,
    "gemma": 6_000, "unigram": 5_000, "tiktoken": 2_048, "neox": 4_096,
}  # fmt: skip
QUICK_TARGETS = ("llama3", "llama2", "unigram")
TOP_K = 32
REAL_TEXT_BYTES, QUICK_REAL_BYTES = 210_000, 40_000
LEAST_TAIL = 1e-4


@dataclass
class Pool:
    """Sums of one method over one target.

    Args:
        nats: Of the aligned labels.
        own_nats: The source's own of the same bytes.
        num_bytes: Those.
        positions: The target's.
        unlabelled: Of them, with nothing on the label.
        uncovered_nats: Charged where there is not even an entry.
        covered: With information.
        mass: Entries of the covered, summed.
        mass_here: Entries where a source's row begins at the same byte, summed,
        held_here: and what those rows held.
    """

    nats: float = 0.0
    own_nats: float = 0.0
    num_bytes: int = 0
    positions: int = 0
    unlabelled: int = 0
    uncovered_nats: float = 0.0
    covered: int = 0
    mass: float = 0.0
    mass_here: float = 0.0
    held_here: float = 0.0

    @property
    def excess(self) -> float:
        """Relative."""
        return self.nats / self.own_nats - 1

    @property
    def uncovered_part(self) -> float:
        """The part of `excess + 1` that is charged where the method gives no distribution."""
        return self.uncovered_nats / self.own_nats

    @property
    def mean_mass(self) -> float:
        """Of covered positions."""
        return self.mass / max(self.covered, 1)

    @property
    def kept_here(self) -> float:
        """Mass kept where both sides begin a token: like for like, however long tokens are."""
        return self.mass_here / max(self.held_here, 1e-12)

    def add(self, other: Pool) -> None:
        """Sum."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def charged_nats(arrays: Arrays, vocab_size: int) -> npt.NDArray[np.float64]:
    """[N] nats of each label; where it has no mass, of the tail spread evenly over what is no entry."""
    labels = arrays["label_logprobs"].astype(np.float64)
    tail = np.maximum(arrays["tail_mass"].astype(np.float64), LEAST_TAIL)
    others = np.maximum(vocab_size - np.diff(arrays["entry_offsets"]), 1)
    return -np.where(np.isnan(labels), np.log(tail / others), labels)


def counted_rows(encoded: Sequence[EncodedSegment], starts: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[N] rows from each segment's common start on."""
    parts = []
    for one, start in zip(encoded, starts, strict=True):
        rows = len(one.token_ids)
        left = len(counted_from(one, int(start)).token_ids)
        parts.append(np.arange(rows) >= rows - left)
    return np.concatenate(parts)


def pool_of(
    aligner: Aligner,
    source: Arrays,
    own: Sequence[EncodedSegment],
    target: Sequence[EncodedSegment],
    texts: Sequence[bytes],
    vocab_size: int,
) -> Pool:
    """One shard by one method, on the bytes that both sides have distributions of."""
    arrays = aligner.align(source, texts, target)
    # The aligned rows are the source's: what the target itself puts before a text does not matter.
    readings = [replace(e, context_ids=e.context_ids or (0,)) for e in target]
    starts = [int(offsets[0]) for offsets in common_boundaries({"source": own, "target": readings})]
    rows, own_rows = counted_rows(readings, starts), counted_rows(own, starts)
    labels = source["label_logprobs"].astype(np.float64)[own_rows]
    if np.isnan(labels).any():
        raise ValueError("the source does not know its own labels")
    covered = arrays["origin"] != Origin.NONE
    mass, held = (1 - side["tail_mass"].astype(np.float64) for side in (arrays, source))
    here, there = same_starts(arrays, source)
    charged = charged_nats(arrays, vocab_size)
    return Pool(
        nats=float(charged[rows].sum()),
        own_nats=float(-labels.sum()),
        num_bytes=sum(len(t) for t in texts) - int(sum(starts)),
        positions=int(rows.sum()),
        unlabelled=int(np.isnan(arrays["label_logprobs"][rows]).sum()),
        uncovered_nats=float(charged[rows & ~covered].sum()),
        covered=int(covered.sum()),
        mass=float(mass[covered].sum()),
        mass_here=float(mass[here].sum()),
        held_here=float(held[there].sum()),
    )


def same_starts(target: Arrays, source: Arrays) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows of both sides that begin at the same byte; of rows without bytes the last."""
    keys, rows = [], []
    for arrays in (target, source):
        ends, offsets = arrays["byte_ends"].astype(np.int64), arrays["token_offsets"]
        starts = np.concatenate(([0], ends[:-1]))[: len(ends)]
        starts[offsets[:-1][np.diff(offsets) > 0]] = 0
        segment = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        found, last = np.unique((segment * (1 << 32) + starts)[::-1], return_index=True)
        keys.append(found)
        rows.append(len(ends) - 1 - last)
    _, first, second = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    return rows[0][first], rows[1][second]


@dataclass
class Pools:
    """All methods on all targets."""

    held: float = 0.0
    by_target: dict[str, dict[str, Pool]] = field(default_factory=dict)

    def total(self, method: str) -> Pool:
        """Over targets."""
        total = Pool()
        for pools in self.by_target.values():
            total.add(pools[method])
        return total

    @property
    def methods(self) -> list[str]:
        """Names."""
        return list(next(iter(self.by_target.values())))


def measure_pools(folder: Path, *, quick: bool) -> Pools:
    """Every method's distributions of a real model, judged in several targets' tokens."""
    made = make_model(folder.parent / "extract-4096", vocab_size=4_096, num_steps=200)
    print(f"model of 4,096 ids: {made.bpb:.3f} bpb on held-out text", flush=True)
    size_bytes = QUICK_REAL_BYTES if quick else REAL_TEXT_BYTES
    with tempfile.TemporaryDirectory() as name:
        shards = real_shards(made, Path(name), top_k=TOP_K, text_bytes=size_bytes)
    source = SegmentTokenizer(_tokenizer(made.folder), name="bench")
    counted: list[str] = []
    limit = QUICK_COUNTED_BYTES if quick else COUNTED_BYTES
    for document in made.other_documents:
        if sum(map(len, counted)) < limit and is_normalized("NFC", document.text):
            counted.append(document.text)
    found = Pools()
    held = [1 - arrays["tail_mass"].astype(np.float64) for arrays, _ in shards]
    known = [np.diff(arrays["entry_offsets"]) > 0 for arrays, _ in shards]
    found.held = float(np.concatenate(held)[np.concatenate(known)].mean())
    for family in QUICK_TARGETS if quick else MODEL_TARGETS:
        target = family_tokenizer(folder, family, MODEL_TARGETS[family], model_texts)
        pair = Pair(source, target, as_segments(counted))
        aligners = pair.aligners()
        found.by_target[family] = {name: Pool() for name in aligners}
        for arrays, segments in shards:
            own, read = source.encode(segments), target.encode(segments)
            texts = [s.text.encode() for s in segments]
            for name, aligner in aligners.items():
                pool = pool_of(aligner, arrays, own, read, texts, target.vocab_size)
                found.by_target[family][name].add(pool)
        print(f"  pools for {family} done", file=sys.stderr, flush=True)
    return found


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def model_texts() -> list[str]:
    """What the model's targets are trained on."""
    return [t for kind in ("code", "prose") for t in library_texts(kind, 1_500_000)]


def show_pools(pools: Pools) -> None:
    """For people."""
    print(
        f"\n{'excess of bpb (share without label mass)':<42}"
        + "".join(f"{name:>18}" for name in pools.by_target)
        + f"{'all':>18}"
    )
    for method in pools.methods:
        cells = [*(pools.by_target[t][method] for t in pools.by_target), pools.total(method)]
        print(
            f"{method:<42}"
            + "".join(f"{p.excess:>9.2%} ({p.unlabelled / p.positions:>5.2%})" for p in cells)
        )
    print("of it, charged where a method gives no distribution")
    for method in pools.methods:
        cells = [*(pools.by_target[t][method] for t in pools.by_target), pools.total(method)]
        print(f"{method:<42}" + "".join(f"{p.uncovered_part:>18.2%}" for p in cells))
    print("mass kept in entries (in brackets where a token of the source begins too)")
    for method in pools.methods:
        cells = [*(pools.by_target[t][method] for t in pools.by_target), pools.total(method)]
        print(
            f"{method:<42}"
            + "".join(f"{p.mean_mass / pools.held:>9.3f} ({p.kept_here:.3f})" for p in cells)
        )
    own = pools.total("bytes")
    bpb = own.own_nats / own.num_bytes / math.log(2)
    print(f"source's own {bpb:.4f} bpb; its store holds {pools.held:.4f} of the mass in entries")


def pools_summary(pools: Pools) -> dict[str, Any]:
    """For programs. `mass_kept` is of positions where a source token begins too, like for like: inside
    a source token a row holds nearly all of its mass, whatever its store held."""
    return {
        "mass_kept": pools.total("bytes").kept_here,
        "mass_per_position": pools.total("bytes").mean_mass / pools.held,
        "mass_per_position_by_target": {
            name: p["bytes"].mean_mass / pools.held for name, p in pools.by_target.items()
        },
        "mass_held": pools.held,
        "mass_per_position_by_method": {
            m: pools.total(m).mean_mass / pools.held for m in pools.methods
        },
        "mass_kept_by_method": {m: pools.total(m).kept_here for m in pools.methods},
        "mass_kept_by_target": {name: p["bytes"].kept_here for name, p in pools.by_target.items()},
        "pool_bpb_excess": {m: pools.total(m).excess for m in pools.methods},
        "pool_bpb_excess_by_target": {
            name: {m: p.excess for m, p in found.items()} for name, found in pools.by_target.items()
        },
        "pool_bpb_silence": {m: pools.total(m).uncovered_part for m in pools.methods},
        "unlabelled": {
            m: pools.total(m).unlabelled / pools.total(m).positions for m in pools.methods
        },
    }
