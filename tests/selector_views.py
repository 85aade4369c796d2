"""Views for selectors from made-up aligned arrays, by the same path that batches take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fuse_train.config import TrainSection
from fuse_train.selectors.features import shard_features
from fuse_train.selectors.hedge import past_of
from fuse_train.selectors.kind import RuleKind
from fuse_train.selectors.prior import uniform_prior
from fuse_train.selectors.selectors import Selector, SourceView
from store_schema.layout import Arrays
from tests import store_factory

VOCAB_SIZE = 40


def build_selector(section: TrainSection, sources: Sequence[str]) -> Selector:
    """The selector of a recipe, one by rule."""
    kind = section.selector_kind
    assert isinstance(kind, RuleKind)
    return kind.make(section.options_of(kind), sources)


def made_sources(rows: int, num_sources: int, seed: int, top_k: int = 4) -> list[Arrays]:
    """Aligned arrays of one segment by several sources over the same tokens."""
    made = [
        store_factory.arrays(
            "aligned", (rows,), vocab_size=VOCAB_SIZE, seed=seed * 31 + m, top_k=top_k
        )
        for m in range(num_sources)
    ]
    for arrays in made:
        arrays["source_bytes"] = np.array([40], "<i8")
    return made


def view_of(sources: Sequence[Arrays], prior: Sequence[float] | None = None) -> SourceView:
    """What a selector sees of that segment: [1, T, M, ...], with equal weights before it by default."""
    offsets = sources[0]["token_offsets"]
    ends = np.arange(1, int(offsets[-1]) + 1).astype("<u4") * 2
    prior_DM = uniform_prior(1, len(sources)) if prior is None else np.array([prior])
    features_NMF = shard_features(sources, offsets, ends, [b"x = [1] +\n" * len(ends)], prior_DM)
    labels_NM = np.stack([arrays["label_logprobs"] for arrays in sources], 1)
    covered_NM = np.stack([np.diff(arrays["entry_offsets"]) > 0 for arrays in sources], 1)
    bpb = [float(a["source_nats"][0] / a["source_bytes"][0] / np.log(2)) for a in sources]
    return SourceView(
        torch.from_numpy(covered_NM)[None],
        torch.from_numpy(features_NMF)[None],
        torch.tensor([bpb]),
        past_of(torch.from_numpy(labels_NM)[None]),
    )


def changed_from(arrays: Arrays, row: int, seed: int, *, row_known: bool) -> Arrays:
    """The same arrays with another label at `row` and anything after it.

    Args:
        arrays: Of one segment.
        row: The first row that changes.
        seed: Of the new content.
        row_known: Whether the distribution of `row` itself stays; its label changes either way.
    """
    other = {name: array.copy() for name, array in arrays.items()}
    rng = np.random.default_rng(seed)
    later = row + 1 if row_known else row
    first = int(arrays["entry_offsets"][later])
    count = len(other["entry_ids"]) - first
    other["entry_ids"][first:] = rng.integers(0, VOCAB_SIZE, count)
    other["entry_logprobs"][first:] = -rng.exponential(2.0, count).astype("<f4")
    other["tail_mass"][later:] = rng.random(len(other["tail_mass"]) - later)
    other["origin"][later:] = rng.integers(1, 3, len(other["origin"]) - later)
    labels = other["label_logprobs"][row:]
    labels[:] = -rng.exponential(3.0, len(labels))
    labels[rng.random(len(labels)) < 0.2] = np.nan
    return other
