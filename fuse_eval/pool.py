"""Scores of pools of the sources, from the aligned stores alone, before any training.

All figures of an estimate are of the same rows: spans (fuse_train/selectors/pools.py) in which every
source and the target itself know every label, and some source covers every row. They show whether
fusing can help, which selector to use and which source to drop, but not how much of the pool a target
of its size can learn.

Shape suffixes: B segments, T rows, M sources, N positions of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fuse_eval.config import EvaluateSection
from fuse_eval.findings import mean_of
from fuse_eval.forecast import Forecast
from fuse_train.config import TrainSection
from fuse_train.data.batch import collate
from fuse_train.data.samples import AlignedSamples, DecodedShard
from fuse_train.data.stream import SampleStream
from fuse_train.gate.mixture import mixture_nats, mixture_weight
from fuse_train.selector_fit.selector_start import SelectorStart
from fuse_train.selector_fit.selector_training import PoolSums, pool_nll
from fuse_train.selectors import SELECTORS
from fuse_train.selectors.features import shard_features
from fuse_train.selectors.selectors import Selector, SourceView
from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.layout import Origin

DEFAULT_STEPS = 300
"""Training steps of the estimate's selectors if the run itself does not pretrain."""

_BATCH_SEGMENTS = 64


class OneSource(Selector):
    """All weight on one source."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, view: SourceView) -> torch.Tensor:
        shape = view.covered_BTM.shape
        one_M = nn.functional.one_hot(torch.tensor(self.index), shape[-1]).float()
        return one_M.to(view.covered_BTM.device).expand(shape)


class WithoutSource(Selector):
    """A selector without one of its sources.

    The other sources' features are not computed again, so those that compare a source with the rest
    still contain a little of the missing one.
    """

    def __init__(self, selector: Selector, index: int) -> None:
        super().__init__()
        self.selector, self.index = selector, index

    def forward(self, view: SourceView) -> torch.Tensor:
        kept = [m for m in range(view.covered_BTM.shape[-1]) if m != self.index]
        seen = view.of_sources(kept)
        weights_BTM = torch.zeros(view.covered_BTM.shape, device=view.covered_BTM.device)
        weights_BTM[..., kept] = self.selector(seen)
        return weights_BTM


@dataclass
class PoolEstimate:
    """Sums over the shards of a split.

    Args:
        pools: {selector name: {domain: sums}}.
        target: {domain: NLL of the target on the same rows, nats}.
        own: {source: {domain: (nats, bytes)}} of whole segments in the source's own tokens.
    """

    pools: dict[str, dict[str, PoolSums]]
    target: dict[str, float]
    own: dict[str, dict[str, tuple[float, float]]]


def pool_names(section: EvaluateSection, train: TrainSection) -> tuple[str, ...]:
    """Names of the selectors that are estimated: those asked for, and the run's own."""
    return tuple(dict.fromkeys((*section.pool_selectors, train.selector)))


def pool_selectors(
    section: EvaluateSection,
    train: TrainSection,
    sources: Sequence[str],
    made: Mapping[str, Selector],
) -> dict[str, Selector]:
    """Selectors of the estimate by name; those that need options only if the run has them.

    Args:
        section: Has the names of the selectors.
        train: Has their options.
        sources: Names in the run file's order.
        made: From `learned_selectors`.
    """
    kinds = [SELECTORS[name] for name in pool_names(section, train)]
    rules = {
        kind.name: kind.make(options, sources)
        for kind in kinds
        for options in [train.options_of(kind)]
        if kind.by_rule and (options or not kind.needs_options)
    }
    return rules | dict(made)


def learned_selectors(
    section: EvaluateSection,
    train: TrainSection,
    stream: SampleStream,
    valid: Callable[[], AlignedSamples],
    *,
    seed: int,
    device: torch.device,
    kept_in: Path | None,
    stop: StopFlag,
) -> dict[str, Selector]:
    """Those of `pool_names` that learn or are searched for, by the run's own recipe.

    Args:
        section: Has the names of the selectors.
        train: The recipe.
        stream: Stream of the training split.
        valid: Opens the stores of the split that weights are searched for on.
        seed: Seed of the run.
        device: Device to train on.
        kept_in: As in `SelectorStart`.
        stop: Checked between steps.
    """
    made: dict[str, Selector] = {}
    for name in pool_names(section, train):
        kind = SELECTORS[name]
        if kind.by_rule:
            continue
        changed: dict[str, Any] = {"selector": name}
        options = train.options_of(kind)
        trained = kind.learns
        if trained:
            if name not in (train.selector, kind.field):  # `start_from` is of another selector
                options = options.model_copy(update={"start_from": None, "frozen": False})
            steps = options.pretrain_steps or DEFAULT_STEPS
            options = options.model_copy(update={"pretrain_steps": steps})
            changed[kind.field] = options
            trained = options.start_from is None
        recipe = train.model_copy(update=changed)
        start = SelectorStart(recipe, seed, stream, valid, device, stop.check, kept_in)
        made[name] = (start.trained() if trained else start.make()).eval().cpu()
    return made


def need_features(section: EvaluateSection, train: TrainSection) -> bool:
    """Whether one of `pool_names` reads features of the sources."""
    kinds = [SELECTORS[name] for name in pool_names(section, train)]
    return any(kind.needs_features(train.options_of(kind)) for kind in kinds)


def estimate(
    samples: AlignedSamples,
    domains: tuple[str, ...],
    sources: Sequence[str],
    selectors: Mapping[str, Selector],
    target_nats: Sequence[npt.NDArray[np.float64]],
    stop: StopFlag,
    *,
    with_features: bool = True,
) -> PoolEstimate:
    """Score pools in one pass over the split's stores.

    Args:
        samples: Stores opened for the split, sources in the order of `sources`.
        domains: Names of all domains of the run.
        sources: Names.
        selectors: Selectors to score, from `asked_selectors`.
        target_nats: The target's NLL of each row, segment by segment in plan order.
        stop: Checked between shards.
        with_features: Whether a selector reads features.
    """
    totals = PoolEstimate({name: {} for name in selectors}, {}, {source: {} for source in sources})
    done = 0
    with Progress("estimate pools", len(samples.shards), unit="shard") as progress:
        for position in range(len(samples.shards)):
            stop.check()
            shard = samples.load(position, with_sources=True)
            own = target_nats[done : done + len(shard.segments)]
            done += len(shard.segments)
            target_N = np.concatenate(own)
            prior_DM = samples.prior.of(shard.segments) if with_features else None
            shard, common_N = common_rows(shard, target_N, prior_DM)
            _add_shard(totals, shard, common_N, target_N, domains, sources, selectors)
            progress.add(1)
    return totals


def common_rows(
    shard: DecodedShard,
    target_N: npt.NDArray[np.float64],
    prior_DM: npt.NDArray[np.float64] | None,
) -> tuple[DecodedShard, npt.NDArray[np.bool_]]:
    """The rows that all figures are of, and the shard with labels outside them made unknown.

    Features are computed again without these labels, so that no selector uses them.

    Args:
        shard: With sources.
        target_N: The target's NLL of each row, nats, NaN where it has no distribution.
        prior_DM: Weights of the sources before each segment, None to compute no features.

    Returns:
        The shard, and bool [N], whether a row is common.
    """
    known_N = ~np.isnan(target_N)
    covered_N = np.zeros(len(target_N), bool)
    for arrays in shard.sources:
        known_N &= ~np.isnan(arrays["label_logprobs"])
        covered_N |= np.diff(arrays["entry_offsets"]) > 0
    known_N &= covered_N
    known_N &= _whole_spans(shard, known_N)
    hidden = tuple(
        arrays | {"label_logprobs": np.where(known_N, arrays["label_logprobs"], np.float32("nan"))}
        for arrays in shard.sources
    )
    features_NMF = None
    if prior_DM is not None:
        texts = [segment.text.encode() for segment in shard.segments]
        features_NMF = shard_features(hidden, shard.token_offsets, shard.byte_ends, texts, prior_DM)
    return replace(shard, sources=hidden, features_NMF=features_NMF), known_N


def _whole_spans(shard: DecodedShard, known_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """bool [N], rows of the spans whose rows are all known: pools mix spans, not rows."""
    begins_N = np.ones(len(known_N), bool)
    for arrays in shard.sources:
        begins_N &= arrays["origin"] != Origin.INSIDE
    offsets = shard.token_offsets
    begins_N[offsets[:-1][np.diff(offsets) > 0]] = True
    span_N = np.cumsum(begins_N) - 1
    whole = np.bincount(span_N, ~known_N) == 0
    return np.asarray(whole[span_N], bool)


def _add_shard(
    totals: PoolEstimate,
    shard: DecodedShard,
    common_N: npt.NDArray[np.bool_],
    target_N: npt.NDArray[np.float64],
    domains: tuple[str, ...],
    sources: Sequence[str],
    selectors: Mapping[str, Selector],
) -> None:
    count = len(shard.segments)
    batches = [
        collate(
            [shard.sample(i) for i in range(start, min(start + _BATCH_SEGMENTS, count))],
            domains,
            with_entries=False,
        )
        for start in range(0, count, _BATCH_SEGMENTS)
    ]
    for name, selector in selectors.items():
        for domain, sums in pool_nll(selector, batches).items():
            pool = totals.pools[name]
            pool[domain] = pool.get(domain, PoolSums()) + sums
    for i, segment in enumerate(shard.segments):
        rows = slice(int(shard.token_offsets[i]), int(shard.token_offsets[i + 1]))
        nats = float(target_N[rows][common_N[rows]].sum())
        totals.target[segment.domain] = totals.target.get(segment.domain, 0.0) + nats
        for source, arrays in zip(sources, shard.sources, strict=True):
            before = totals.own[source].get(segment.domain, (0.0, 0.0))
            totals.own[source][segment.domain] = (
                before[0] + float(arrays["source_nats"][i]),
                before[1] + float(arrays["source_bytes"][i]),
            )


def asked_selectors(named: Mapping[str, Selector], sources: Sequence[str]) -> dict[str, Selector]:
    """Selectors that one pass scores: each pool, each source alone, each pool without a source."""
    asked: dict[str, Selector] = {f"pool {name}": s for name, s in named.items()}
    asked |= {f"alone {source}": OneSource(i) for i, source in enumerate(sources)}
    if len(sources) > 1:
        for name in (kind.name for kind in SELECTORS if kind.tried_without and kind.name in named):
            for i, source in enumerate(sources):
                if not named[name].bound:
                    asked[f"{name} without {source}"] = WithoutSource(named[name], i)
    return asked


def estimate_record(
    totals: PoolEstimate, named: Mapping[str, Selector], sources: Sequence[str]
) -> dict[str, Any]:
    """The estimate in bits per byte, JSON-like.

    Args:
        totals: Sums by the names of `asked_selectors`.
        named: Selectors by name.
        sources: Names.
    """
    first = totals.pools[f"alone {sources[0]}"]
    scored = {domain: sums for domain, sums in first.items() if sums.num_bytes}
    bpb = {
        name: {domain: _bpb(sums[domain].nats, sums[domain].num_bytes) for domain in scored}
        for name, sums in totals.pools.items()
    }
    without: dict[str, dict[str, dict[str, float]]] = {}
    for name in named:
        for source in sources:
            left = bpb.get(f"{name} without {source}")
            if left:
                mean = mean_of(left)
                change = mean / mean_of(bpb[f"pool {name}"]) - 1
                without.setdefault(name, {})[source] = {"mean_bpb": mean, "change": change}
    return {
        "domains": {
            domain: {
                "rows": sums.all_rows,
                "bytes": sums.all_bytes,
                "common_rows": sums.num_rows,
                "common_bytes": sums.num_bytes,
            }
            for domain, sums in first.items()
        },
        "pool_bpb": {name: bpb[f"pool {name}"] for name in named},
        "hindsight": [name for name, selector in named.items() if selector.hindsight],
        "alone_bpb": {source: bpb[f"alone {source}"] for source in sources},
        "target_bpb": {d: _bpb(totals.target[d], scored[d].num_bytes) for d in scored},
        "source_bpb": {
            source: {d: _bpb(nats, size) for d, (nats, size) in by_domain.items() if size}
            for source, by_domain in totals.own.items()
        },
        "without": without,
    }


def mixtures(
    spans: Mapping[str, npt.NDArray[np.float64]], num_bytes: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Best mixture of a pool with the target by domain: the pool's weight, bits per byte.

    Args:
        spans: {domain: [2, S] nats of target and pool}, from fuse_train's `span_nats`.
        num_bytes: Bytes of these spans by domain.
    """
    best = {}
    for domain, (target_S, pool_S) in spans.items():
        if num_bytes.get(domain):
            weight = mixture_weight(target_S, pool_S)
            nats = float(mixture_nats(target_S, pool_S, weight).sum())
            best[domain] = {"pool_weight": weight, "bpb": _bpb(nats, num_bytes[domain])}
    return best


def forecast_record(
    made: Mapping[str, Forecast], num_bytes: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """What plain training and fusing may come to by domain: bits per byte, and shares of the control's.

    Args:
        made: By domain.
        num_bytes: Of the spans it was made on.
    """
    return {
        domain: {
            "control_bpb": _bpb(found.control, num_bytes[domain]),
            "most": found.most,
            "gain": found.gain,
        }
        for domain, found in made.items()
        if num_bytes.get(domain)
    }


def _bpb(nats: float, num_bytes: float) -> float:
    return nats / math.log(2) / num_bytes
