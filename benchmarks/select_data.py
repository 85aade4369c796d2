"""Aligned stores of one seed of `make bench-select`, read once, under any set of sources.

Shape suffixes: B segments, T rows, M sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fuse_eval.intervals import DomainUnits, units_by_domain
from fuse_train.data.batch import Batch, sources_of, whole_spans
from fuse_train.data.domain_prior import domains_of
from fuse_train.data.samples import AlignedSamples, DecodedShard
from fuse_train.data.stream import SampleStream, StreamOptions
from fuse_train.selector_fit.selector_training import split_batches
from fuse_train.selectors.features import shard_features
from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from fuse_train.selectors.pools import pool_nats, span_sums
from fuse_train.selectors.selectors import Selector
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import SegmentTokenizer

SPLITS = ("train", "valid", "test")


class SomeSources(AlignedSamples):
    """Samples of some of the sources; features are of these alone.

    Args:
        whole: Samples of all sources.
        shards: Decoded shards of `whole`, by position.
        kept: Positions of the sources that are there.
    """

    def __init__(
        self, whole: AlignedSamples, shards: Sequence[DecodedShard], kept: Sequence[int]
    ) -> None:
        self.__dict__.update(whole.__dict__)
        self.stores = {whole.sources[m]: whole.stores[whole.sources[m]] for m in kept}
        self._decoded, self._kept = shards, kept

    def load(self, position: int, *, with_sources: bool) -> DecodedShard:
        """A shard with these sources."""
        shard = self._decoded[position]
        sources = tuple(shard.sources[m] for m in self._kept)
        texts = [segment.text.encode() for segment in shard.segments]
        prior_DM = self.prior.of(shard.segments)[:, self._kept]
        prior_DM /= prior_DM.sum(1, keepdims=True)
        offsets, ends = shard.token_offsets, shard.byte_ends
        features = shard_features(sources, offsets, ends, texts, prior_DM)
        return replace(shard, sources=sources, features_NMF=features)


@dataclass(frozen=True, slots=True)
class Part:
    """A split under some set of sources.

    Args:
        samples: Of the split.
        batches: Every segment once, in plan order: the same segments under any set of sources.
    """

    samples: AlignedSamples
    batches: tuple[Batch, ...]


class SeedData:
    """Everything that is measured on for one seed.

    Args:
        run_file: With all sources.
    """

    def __init__(self, run_file: Path) -> None:
        run = load_run(str(run_file), ())
        self.seed, self.names = run.seed, tuple(run.sources)
        plan = open_plan(run)
        tokenizer = SegmentTokenizer.load(run.target, name="target")
        stores = {n: StoreReader.open(open_location(run.aligned_url(n))) for n in self.names}
        self.domains = domains_of(plan)
        self._whole = {s: AlignedSamples(plan, stores, tokenizer, split=s) for s in SPLITS}
        self._shards = {
            split: [samples.load(i, with_sources=True) for i in range(len(samples.shards))]
            for split, samples in self._whole.items()
        }
        self.part = cache(self._part)
        self.spans = cache(self._spans)

    def _part(self, split: str, names: tuple[str, ...]) -> Part:
        kept = [self.names.index(name) for name in names]
        samples = SomeSources(self._whole[split], self._shards[split], kept)
        return Part(samples, tuple(split_batches(samples, self.domains)))

    def _spans(self, split: str) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Of each batch: rows where a span of ALL sources begins; those of spans all of them know."""
        batches = self.part(split, self.names).batches
        return tuple((sources_of(b).begins_BT, whole_spans(b)) for b in batches)

    def stream(self, names: tuple[str, ...], batch_segments: int) -> SampleStream:
        """Training batches of a set of sources."""
        options = StreamOptions(
            seed=self.seed,
            batch_segments=batch_segments,
            micro_batch_segments=batch_segments,
            shuffle_shards=16,
            cache_gib=8.0,
        )
        samples = self.part("train", names).samples
        return SampleStream(samples, options, self.domains, with_entries=False)

    def segments(self, split: str) -> Iterator[tuple[str, str]]:
        """Domain and document of each segment, in plan order."""
        for shard in self._shards[split]:
            for segment in shard.segments:
                yield segment.domain, segment.document_id

    @torch.no_grad()
    def nats(
        self, selector: Selector, split: str, names: tuple[str, ...]
    ) -> npt.NDArray[np.float64]:
        """NLL of each segment under the selector's pool, on the spans that all sources know."""
        found = []
        pairs = zip(self.part(split, names).batches, self.spans(split), strict=True)
        for batch, (begins_BT, whole_BT) in pairs:
            sources = sources_of(batch)
            view = replace(sources.view, begins_BT=begins_BT)
            logs_BTM = sources.label_logprobs_BTM.clamp(min=PROBABILITY_FLOOR)
            nats_BT = pool_nats(selector(view).double(), logs_BTM.double(), begins_BT)
            found.append((nats_BT * whole_BT).sum(1).numpy())
        return np.concatenate(found)

    def num_bytes(self, split: str) -> npt.NDArray[np.float64]:
        """Bytes of these spans."""
        sums = []
        pairs = zip(self.part(split, self.names).batches, self.spans(split), strict=True)
        for batch, (begins_BT, whole_BT) in pairs:
            size_BT = span_sums(batch.label_bytes_BT, begins_BT)
            sums.append((size_BT * whole_BT).sum(1).double())
        return torch.cat(sums).numpy()

    def units(
        self,
        nats: Mapping[str, npt.NDArray[np.float64]],
        split: str,
        domains: Sequence[str] | None = None,
    ) -> dict[str, DomainUnits]:
        """Sums by document, of all domains or of some."""
        domain, document = zip(*self.segments(split), strict=True)
        units = units_by_domain(nats, self.num_bytes(split), domain, document)
        return {d: u for d, u in units.items() if domains is None or d in domains}

    @torch.no_grad()
    def mean_weight(self, selector: Selector, split: str, names: tuple[str, ...], of: str) -> float:
        """Mean weight of one source over all rows of a split that anybody covers."""
        weight, rows, at = 0.0, 0, names.index(of)
        for batch in self.part(split, names).batches:
            sources = sources_of(batch)
            weight += float(selector(sources.view)[..., at].sum())
            rows += int(sources.covered_BTM.any(-1).sum())
        return weight / rows


def mean_bpb(units: Mapping[str, DomainUnits], name: str) -> float:
    """Mean of the domains' bits per byte, each with equal weight."""
    return float(np.mean([unit.bpb(name) for unit in units.values()]))
