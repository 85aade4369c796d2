"""The stream of training batches: resumable at any step, the same for any number of processes.

Step g takes the samples at positions [g * batch, (g + 1) * batch) of the order's endless sequence;
process r of w takes its slice of them, sorted by length (whole chats are not) and cut into
micro-batches (a batch is one sum, so the order inside it changes nothing but padding). The state is the
step number alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from fuse_train.data.batch import Batch, collate
from fuse_train.data.order import SampleOrder, SampleRef, Units, process_slice
from fuse_train.data.samples import AlignedSamples, Sample, ShardCache
from fuse_train.data.shares import used_segments
from fuse_train.data.stages import StagedOrder
from fuse_train.stages_config import StageSection

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Order, batch sizes and memory of a stream (see TrainSection for each)."""

    seed: int
    batch_segments: int
    micro_batch_segments: int
    shuffle_shards: int
    cache_gib: float
    prefetch_batches: int = 0
    pack_tokens: int | None = None
    whole_chats: bool = False
    stages: tuple[StageSection, ...] = ()
    text_share: float = 1.0


def training_order(samples: AlignedSamples, options: StreamOptions) -> StagedOrder:
    """The order of a split's samples, step by step."""

    def make_order(stage: int, sizes: Sequence[int], units: Units | None) -> SampleOrder:
        seed = options.seed + (stage << 32)  # the first stage's is the seed itself
        return SampleOrder(sizes, seed=seed, window_shards=options.shuffle_shards, units=units)

    return StagedOrder(
        options.stages,
        samples.corpora,
        samples.shard_sizes,
        batch_segments=options.batch_segments,
        make_order=make_order,
        units=samples.chats if options.whole_chats else None,
        used=None
        if options.text_share == 1
        else used_segments(samples.plan, samples.shards, options.text_share),
    )


class SampleStream:
    """Batches of one split for one process.

    Args:
        samples: The stores.
        options: Order, sizes and memory.
        domains: Names of all domains of the run.
        with_sources: False streams ground truth and reads no entries.
        with_entries: False leaves the distributions out and keeps labels and features.
        process: Index and count of this process.
        cache: Cache of another stream over the same samples, so that each shard is decoded once.
    """

    def __init__(
        self,
        samples: AlignedSamples,
        options: StreamOptions,
        domains: tuple[str, ...],
        *,
        with_sources: bool = True,
        with_entries: bool = True,
        process: tuple[int, int] = (0, 1),
        cache: ShardCache | None = None,
    ) -> None:
        self.samples, self.options, self.domains = samples, options, domains
        self.order = training_order(samples, options)
        self._process, self._with_entries = process, with_entries
        self.cache = cache or ShardCache(
            samples,
            with_sources=with_sources,
            max_bytes=int(options.cache_gib * _GIB),
            min_shards=options.shuffle_shards + 1,
        )

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self.order)

    def sample(self, ref: SampleRef) -> Sample:
        """One sample, from memory or from its stores."""
        return self.cache.get(ref.shard).sample(ref.segment)

    def step_refs(self, step: int) -> list[SampleRef]:
        """This process's samples of a step, in training order."""
        size = self.options.batch_segments
        return self.order.samples(step)[process_slice(size, *self._process)]

    def step_batches(self, step: int, *, micro_batch_segments: int | None = None) -> list[Batch]:
        """This process's micro-batches of a step, shortest segments first; whole chats in their order.

        Args:
            step: Number of the step, from 0.
            micro_batch_segments: None takes the options'.
        """
        samples = [self.sample(ref) for ref in self.step_refs(step)]
        if not self.options.whole_chats:
            samples.sort(key=lambda sample: sample.num_tokens)
        size = micro_batch_segments or self.options.micro_batch_segments
        groups = [samples[i : i + size] for i in range(0, len(samples), size)]
        stage = self.order.stage_at(step)
        return [
            collate(
                group,
                self.domains,
                with_entries=self._with_entries,
                pack_tokens=self.options.pack_tokens,
                weights=None if stage is None else _weights(group, stage),
            )
            for group in groups
        ]

    def batches(self, first: int, stop: int) -> Generator[list[Batch], None, None]:
        """Micro-batches of steps `first` to `stop` - 1, prepared ahead in a thread."""
        if self.options.prefetch_batches == 0:
            for step in range(first, stop):
                yield self.step_batches(step)
            return
        yield from self._prefetched(first, stop)

    def _prefetched(self, first: int, stop: int) -> Generator[list[Batch], None, None]:
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(self.options.prefetch_batches)
        closed = threading.Event()

        def put(item: list[Batch] | BaseException) -> None:
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for step in range(first, stop):
                    if closed.is_set():
                        return
                    put(self.step_batches(step))
            except BaseException as error:  # raised again in the thread that reads the queue
                put(error)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            for _ in range(first, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()


def _weights(samples: Sequence[Sample], stage: StageSection) -> list[float]:
    return [stage.weights.get(str(sample.segment.corpus), 0.0) for sample in samples]
