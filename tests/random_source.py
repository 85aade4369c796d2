"""Segments and random source distributions over them, as a source store holds them."""

from __future__ import annotations

import numpy as np

from store_schema.layout import Arrays
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import EncodedSegment


def segments(chosen: list[str]) -> list[Segment]:
    return [
        Segment(i, f"d#{i}", "d", "x", "train", 0, len(t.encode()), True, None, t)
        for i, t in enumerate(chosen)
    ]


def random_source(
    encoded: list[EncodedSegment], vocab_size: int, seed: int, k: int = 12, *, bos: bool = True,
    allowed: np.ndarray | None = None,
) -> Arrays:  # fmt: skip
    """Random distributions over a store's tokens; the label is an entry in most rows."""
    rng = np.random.default_rng(seed)
    ids, logprobs, offsets, tails, labels = [], [], [0], [], []
    for segment in encoded:
        for i, label in enumerate(segment.token_ids.tolist()):
            if i == 0 and not bos:
                offsets.append(offsets[-1])
                tails.append(1.0)
                labels.append(np.nan)
                continue
            others = rng.choice(vocab_size if allowed is None else allowed, k, replace=False)
            others = others[others != label][: k - 1]
            mass = rng.dirichlet(np.full(len(others) + 2, 0.4)) + 1e-9
            mass /= mass.sum()
            row = dict(zip(others.tolist(), mass[1:-1], strict=True))
            if rng.random() < 0.85:
                row[label] = mass[0]
            order = sorted(row, key=lambda token: (-row[token], token))
            ids += order
            logprobs += [np.log(row[token]) for token in order]
            offsets.append(len(ids))
            tails.append(1 - sum(row.values()))
            labels.append(np.log(mass[0]))
    counts = np.cumsum([0] + [len(s.token_ids) for s in encoded])
    return {
        "segment_ids": np.arange(len(encoded), dtype="<i8"),
        "token_offsets": counts.astype("<i8"),
        "token_ids": np.concatenate([s.token_ids for s in encoded]).astype("<u4"),
        "byte_ends": np.concatenate([s.byte_ends for s in encoded]).astype("<u4"),
        "entry_offsets": np.asarray(offsets, "<i8"),
        "entry_ids": np.asarray(ids, "<u4"),
        "entry_logprobs": np.asarray(logprobs, "<f4"),
        "tail_mass": np.clip(np.asarray(tails, "<f4"), 0, 1),
        "label_logprobs": np.asarray(labels, "<f4"),
    }
