"""Aligned stores as samples: opened and checked together, decoded shard by shard.

Shape suffixes: N positions of a shard, M sources, F features, D segments.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fuse_train.data.domain_prior import DomainPrior
from fuse_train.data.partial import missing_shards, missing_shards_error, uncovered_arrays
from store_schema.errors import ConfigError, InputError, MismatchError
from store_schema.layout import Arrays
from store_schema.plan.columns import segment_columns
from store_schema.plan.plan import Plan, Segment, ShardRecord
from store_schema.store.reader import StoreReader
from store_schema.text.context_reader import ReadContext
from store_schema.text.tokenizer import SegmentTokenizer

TOKEN_ARRAYS = ("segment_ids", "token_offsets", "token_ids", "byte_ends")
"""Arrays that ground truth alone needs; the same in every aligned store."""

SPAN_ARRAYS = ("span_offsets", "span_index", "span_byte_ends", "span_logprobs")
"""Arrays that the likelihood of spans needs too."""


@dataclass(frozen=True, slots=True)
class DecodedShard:
    """One shard of the plan in the target's tokens, with each source's distributions.

    Args:
        segments: Its segments, in the plan's order.
        context_ids: Target tokens before each segment's text.
        token_offsets: [D+1] rows of each segment.
        token_ids: [N] int64.
        byte_ends: [N] end of each token in its segment's bytes.
        sources: Arrays of each source's store, in the run file's order; empty for ground truth.
        features_NMF: Selector features, None without sources or where the selector needs none.
        eos_id: Token to train after segments that end their document, or None.
        ends_turn: Indices of segments that end with a chat template's end of turn, and get no `eos_id`.
        names: Names of the sources.
    """

    segments: Sequence[Segment]
    context_ids: Sequence[tuple[int, ...]]
    token_offsets: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    byte_ends: npt.NDArray[np.uint32]
    sources: tuple[Arrays, ...]
    features_NMF: npt.NDArray[np.float32] | None
    eos_id: int | None = None
    ends_turn: frozenset[int] = frozenset()
    names: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Memory of the arrays."""
        own = self.token_offsets.nbytes + self.token_ids.nbytes + self.byte_ends.nbytes
        theirs = sum(int(array.nbytes) for source in self.sources for array in source.values())
        return own + theirs + (0 if self.features_NMF is None else self.features_NMF.nbytes)

    def sample(self, segment: int) -> Sample:
        """One segment as a sample (a view; nothing is copied)."""
        rows = slice(int(self.token_offsets[segment]), int(self.token_offsets[segment + 1]))
        return Sample(self, segment, rows)


@dataclass(frozen=True, slots=True)
class Sample:
    """One segment of a decoded shard.

    Args:
        shard: Shard with its arrays.
        index: Number of the segment within the shard.
        rows: Its rows in the shard's position arrays.
    """

    shard: DecodedShard
    index: int
    rows: slice

    @property
    def segment(self) -> Segment:
        """The plan's record."""
        return self.shard.segments[self.index]

    @property
    def author(self) -> int:
        """Index of the source that wrote the segment as an answer, -1 for none."""
        author, names = self.segment.author, self.shard.names
        return names.index(author) if author in names else -1

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Tokens before the text: context, not rows."""
        return self.shard.context_ids[self.index]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Tokens of the text, then the end-of-sequence token if it is trained here."""
        tokens = self.shard.token_ids[self.rows]
        ends = self.segment.ends_document and self.index not in self.shard.ends_turn
        if self.shard.eos_id is not None and ends:
            return np.append(tokens, self.shard.eos_id)
        return tokens

    @property
    def num_tokens(self) -> int:
        """Rows of the text."""
        return int(self.rows.stop) - int(self.rows.start)


class AlignedSamples:
    """The aligned stores of a run, opened together for one split.

    Args:
        plan: Plan that all stores were made from.
        stores: Reader by source name, in the run file's order.
        tokenizer: The target's.
        split: Split whose shards are read.
        append_eos: Whether the end of a document is a label.
        max_positions: Most tokens the target takes, None when its config does not say.
        allow_partial: Instead of an error, a source covers nothing in shards that it lacks, and a shard
            that no source has is left out.
        with_spans: Whether the spans that source and target share are kept too.
        with_features: Whether to compute features of the sources, for selectors that need them.
        prior_split: Split whose labels the features' priors of domains are from: that of the training.

    Raises:
        MismatchError: A store of another plan, or of another target tokenizer.
        MissingError: Shards that are not there yet; names them.
        InputError: A segment longer than the target's positions.
        ConfigError: No such split, no source, or a tokenizer without end-of-sequence token.
    """

    def __init__(
        self,
        plan: Plan,
        stores: Mapping[str, StoreReader],
        tokenizer: SegmentTokenizer,
        *,
        split: str,
        append_eos: bool = False,
        max_positions: int | None = None,
        allow_partial: bool = False,
        with_spans: bool = False,
        with_features: bool = True,
        prior_split: str = "train",
    ) -> None:
        shards = plan.splits().get(split)
        if not shards:
            raise ConfigError(
                "no shard of the split",
                where=plan.location.url,
                expected=f"split {split}",
                got=", ".join(plan.splits()),
                hint="set train_split and valid_split, or add documents of that split",
            )
        if not stores:
            raise ConfigError("no aligned store to train from", where="sources")
        if append_eos and tokenizer.eos_id is None:
            raise ConfigError(
                "tokenizer has no end-of-sequence token",
                where=tokenizer.name,
                hint="set train.append_eos to false",
            )
        for reader in stores.values():
            check_store(reader, plan, tokenizer)
        self.plan, self.stores, self.tokenizer, self.split = plan, dict(stores), tokenizer, split
        self.missing = missing_shards(stores, shards)
        if self.missing and not allow_partial:
            raise missing_shards_error(self.missing, shards)
        lacking_shards = [set(self.missing.get(name, ())) for name in stores]
        absent = set.intersection(*lacking_shards)
        if len(absent) == len(shards):
            raise missing_shards_error(self.missing, shards)
        self.shards: tuple[ShardRecord, ...] = tuple(s for s in shards if s.index not in absent)
        for name, reader in stores.items():
            lacking = self.missing.get(name, ())
            reader.require_shards(s for s in self.shards if s.index not in lacking)
        self._eos_id = tokenizer.eos_id if append_eos else None
        self.append_eos = append_eos
        self._max_positions = max_positions
        self._with_features = with_features
        self.prior = DomainPrior(plan, stores, prior_split)
        self._unused = {*TOKEN_ARRAYS, *(() if with_spans else SPAN_ARRAYS)}
        self._check_plan_lengths()

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(self.stores)

    @property
    def shard_sizes(self) -> list[int]:
        """Segments of each shard of the split."""
        return [shard.stop - shard.start for shard in self.shards]

    def chats(self, position: int) -> npt.NDArray[np.int64]:
        """Number of each segment's chat within its shard [D]; a segment that is no turn of a chat has a
        number of its own."""
        names = [s.chat_id or s.segment_id for s in self.plan.segments(self.shards[position])]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return np.array([numbers[name] for name in names], np.int64)

    def corpora(self, position: int) -> list[str | None]:
        """Corpus name of each segment of a shard [D], None where its input has no name."""
        shard = self.shards[position]
        names: list[str | None] = self._corpora[shard.start : shard.stop].to_pylist()
        return names

    @cached_property
    def _corpora(self) -> pa.ChunkedArray:
        return segment_columns(self.plan, ["corpus"])["corpus"]

    def load(self, position: int, *, with_sources: bool) -> DecodedShard:
        """Read one shard of the split.

        Args:
            position: Index in `shards`, not in the plan.
            with_sources: False reads token arrays of one store only: no entries, no features.

        Raises:
            CorruptionError: Damaged data.
            MismatchError: Stores that do not agree about the tokens.
            InputError: A segment longer than the target's positions.
        """
        shard = self.shards[position]
        segments = self.plan.segments(shard)
        readers = [
            (name, reader)
            for name, reader in self.stores.items()
            if shard.index not in self.missing.get(name, ())
        ]
        names = None if with_sources else TOKEN_ARRAYS
        loaded = [
            reader.read(shard.index, names) for _, reader in readers[: None if with_sources else 1]
        ]
        first = loaded[0]
        expected = np.arange(shard.start, shard.stop)
        for (name, reader), arrays in zip(readers, loaded, strict=False):
            same = np.array_equal(arrays["segment_ids"], expected) and all(
                np.array_equal(arrays[key], first[key]) for key in TOKEN_ARRAYS
            )
            if not same:
                raise MismatchError(
                    f"source {name} has other segments or tokens than the plan or the first source",
                    where=f"{reader.location.url}, shard {shard.index}",
                    hint="run align again for all sources",
                )
        read = self._contexts(segments)
        context = [around.ids for around in read]
        self._check_lengths(segments, context, first["token_offsets"])
        sources: tuple[Arrays, ...] = ()
        if with_sources:
            by_name = {name: arrays for (name, _), arrays in zip(readers, loaded, strict=True)}
            uncovered = uncovered_arrays(first) if len(readers) < len(self.stores) else {}
            sources = tuple(self._own(by_name.get(name, uncovered)) for name in self.stores)
        features = None
        if with_sources and self._with_features:
            # With torch, which a run that is finished does not load.
            from fuse_train.selectors.features import shard_features

            texts = [segment.text.encode() for segment in segments]
            prior_DM = self.prior.of(segments)
            ends, offsets = first["byte_ends"], first["token_offsets"]
            features = shard_features(sources, offsets, ends, texts, prior_DM)
        return DecodedShard(
            segments,
            context,
            first["token_offsets"],
            first["token_ids"].astype(np.int64),
            first["byte_ends"],
            sources,
            features,
            self._eos_id,
            frozenset(d for d, around in enumerate(read) if around.turn_end is not None),
            self.sources,
        )

    def _check_plan_lengths(self) -> None:
        """Check that every segment fits, unless the plan's own limit says so already."""
        record, limit = self.plan.record, self._max_positions
        planned = record.settings.get("max_tokens")
        own = record.tokenizers.get("target") == self.tokenizer.fingerprint
        if limit is None or (own and isinstance(planned, int) and planned <= limit):
            return
        for position in range(len(self.shards)):
            self._check_shard_lengths(position)

    def _check_shard_lengths(self, position: int) -> None:
        shard = self.shards[position]
        reader = next(
            reader
            for name, reader in self.stores.items()
            if shard.index not in self.missing.get(name, ())
        )
        segments = self.plan.segments(shard)
        offsets = reader.read(shard.index, ("token_offsets",))["token_offsets"]
        context = [read.ids for read in self._contexts(segments)]
        self._check_lengths(segments, context, offsets)

    def _contexts(self, segments: Sequence[Segment]) -> list[ReadContext]:
        """What the target reads around each text."""
        return [
            self.tokenizer.contexts.read(s.context, where=f"segment {s.segment_id}")
            for s in segments
        ]

    def _own(self, arrays: Arrays) -> Arrays:
        """The source's own arrays; token arrays are kept once for all sources."""
        return {name: array for name, array in arrays.items() if name not in self._unused}

    def _check_lengths(
        self,
        segments: Sequence[Segment],
        context: Sequence[tuple[int, ...]],
        token_offsets: npt.NDArray[np.int64],
    ) -> None:
        if self._max_positions is None:
            return
        lengths = np.diff(token_offsets) + [len(ids) for ids in context]
        worst = int(lengths.argmax())
        if lengths[worst] > self._max_positions:
            raise InputError(
                "segment is longer than the target's positions",
                where=f"segment {segments[worst].segment_id}",
                expected=f"at most {self._max_positions} tokens with its context",
                got=int(lengths[worst]),
                hint="plan with a smaller max_tokens",
            )


def check_store(reader: StoreReader, plan: Plan, tokenizer: SegmentTokenizer) -> None:
    """Refuse a store that does not belong to plan and target.

    Raises:
        MismatchError: Shows both sides.
    """
    reader.require_plan(plan)
    target = reader.manifest.target
    if reader.manifest.kind != "aligned" or target is None:
        raise MismatchError(
            "not an aligned store",
            where=reader.location.url,
            expected="aligned",
            got=reader.manifest.kind,
        )
    if target.tokenizer_fingerprint != tokenizer.fingerprint:
        raise MismatchError(
            "store was aligned to another tokenizer than the target's",
            where=reader.location.url,
            expected=f"tokenizer {tokenizer.fingerprint}",
            got=f"tokenizer {target.tokenizer_fingerprint}",
            hint="run `logitfuse align run` for this target (another target goes under another run "
            "name, with data_dir the folder of the run that has the sources' stores)",
        )


class ShardCache:
    """Decoded shards by position, least recently used dropped first.

    Args:
        samples: Stores to load them from.
        with_sources: As in `AlignedSamples.load`.
        max_bytes: Most bytes kept, except that `min_shards` are always kept.
        min_shards: One window of the order, and the first shard of the next.
    """

    def __init__(
        self, samples: AlignedSamples, *, with_sources: bool, max_bytes: int, min_shards: int
    ) -> None:
        self._samples, self._with_sources = samples, with_sources
        self._max_bytes, self._min_shards = max_bytes, min_shards
        self._held: OrderedDict[int, DecodedShard] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()

    def get(self, position: int) -> DecodedShard:
        """The shard, from memory or from its stores."""
        with self._lock:
            if position not in self._held:
                shard = self._samples.load(position, with_sources=self._with_sources)
                self._held[position] = shard
                self._held_bytes += shard.size_bytes
            self._held.move_to_end(position)
            while self._held_bytes > self._max_bytes and len(self._held) > self._min_shards:
                self._held_bytes -= self._held.popitem(last=False)[1].size_bytes
            return self._held[position]
