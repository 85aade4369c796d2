"""Train a selector on stores alone, in seconds, and score its pool.

No model is needed: the stores have the sources' log-probabilities of the labels. A pool's NLL is a
proper score of its weights, span by span (pools.py), so it can train them.

Shape suffixes: B segments, T rows, M sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fuse_train.data.batch import Batch, SourceBatch, collate, sources_of, to_device, whole_spans
from fuse_train.data.samples import AlignedSamples
from fuse_train.data.stream import SampleStream
from fuse_train.loop.schedule import rate_factor
from fuse_train.losses.losses import importance_cv2
from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from fuse_train.selectors.kind import LearnedKind, LearnedOptions
from fuse_train.selectors.pools import hold_over_spans, pool_nats
from fuse_train.selectors.selectors import Selector
from store_schema.errors import InputError, ModelError


@dataclass(frozen=True, slots=True)
class PoolSums:
    """A pool's score on the spans where every source knows the labels' probabilities.

    Args:
        nats: NLL of the labels under the pool.
        num_bytes: Bytes of those labels.
        num_rows: Rows of these spans.
        all_bytes: Bytes of all labels, known or not.
        all_rows: Rows of all labels.
    """

    nats: float = 0.0
    num_bytes: int = 0
    num_rows: int = 0
    all_bytes: int = 0
    all_rows: int = 0

    def __add__(self, other: PoolSums) -> PoolSums:
        return PoolSums(
            self.nats + other.nats,
            self.num_bytes + other.num_bytes,
            self.num_rows + other.num_rows,
            self.all_bytes + other.all_bytes,
            self.all_rows + other.all_rows,
        )


def split_batches(
    samples: AlignedSamples, domains: tuple[str, ...], *, batch_segments: int = 64
) -> Iterator[Batch]:
    """Batches of every segment of a split once, in plan order, without entries, for `pool_nll`.

    Args:
        samples: Stores opened for the split.
        domains: Names of all domains of the run.
        batch_segments: Segments of one batch; shards are never mixed.
    """
    for position in range(len(samples.shards)):
        shard = samples.load(position, with_sources=True)
        for start in range(0, len(shard.segments), batch_segments):
            stop = min(start + batch_segments, len(shard.segments))
            chosen = [shard.sample(i) for i in range(start, stop)]
            yield collate(chosen, domains, with_entries=False)


@torch.no_grad()
def pool_nll(selector: Selector, batches: Iterable[Batch]) -> dict[str, PoolSums]:
    """NLL of a selector's pool, by domain, over spans whose labels EVERY source knows.

    Args:
        selector: Any selector, on the batches' device.
        batches: From `split_batches`.

    Returns:
        Sums by domain name, for domains that occur.
    """
    sums: dict[str, PoolSums] = {}
    for batch in batches:
        sources = sources_of(batch)
        real_BT = batch.label_bytes_BT > 0
        first_BT = whole_spans(batch)
        logprobs_BTM = sources.label_logprobs_BTM.clamp(min=PROBABILITY_FLOOR)
        nats_BT = pool_nats(selector(sources.view), logprobs_BTM, sources.begins_BT)
        nats_R = nats_BT[first_BT].double()
        known_BT = hold_over_spans(first_BT[..., None], sources.begins_BT)[..., 0] & real_BT
        domain_BT = batch.domains_B[:, None].expand(known_BT.shape)
        count = len(batch.domains)

        def by_domain(at_BT: torch.Tensor, values: torch.Tensor) -> list[float]:
            index = domain_BT[at_BT]  # noqa: B023 - used within the iteration only
            total = torch.zeros(count, dtype=torch.float64)  # noqa: B023
            return total.index_add_(0, index.cpu(), values.double().cpu()).tolist()

        ones_BT = torch.ones_like(batch.label_bytes_BT)
        columns = zip(
            batch.domains,
            by_domain(first_BT, nats_R),
            by_domain(known_BT, batch.label_bytes_BT[known_BT]),
            by_domain(known_BT, ones_BT[known_BT]),
            by_domain(real_BT, batch.label_bytes_BT[real_BT]),
            by_domain(real_BT, ones_BT[real_BT]),
            strict=True,
        )
        for name, nats, num_bytes, num_rows, all_bytes, all_rows in columns:
            if all_rows:
                figures = (int(num_bytes), int(num_rows), int(all_bytes), int(all_rows))
                sums[name] = sums.get(name, PoolSums()) + PoolSums(nats, *figures)
    return sums


def train_selector(
    stream: SampleStream,
    options: LearnedOptions,
    kind: LearnedKind,
    *,
    seed: int,
    feedback_weight: float = 0.0,
    start: Selector | None = None,
    on_step: Callable[[int, float], None] | None = None,
    device: torch.device | None = None,
) -> Selector:
    """Train a selector on the pool's NLL, alone, on the split of `stream`.

    The loss uses the gates before the threshold, so that a dropped source still gets a gradient.

    Args:
        stream: With sources; entries are not needed (`with_entries=False`).
        options: Options of the selector: widths, steps, learning rate.
        kind: Which selector.
        seed: Seed of the initial weights.
        feedback_weight: alpha, weight of CV^2 of importance.
        start: Selector to start from; None makes an untrained one.
        on_step: Called with the step and its pool NLL, nats per row.
        device: Device to train on; None is the CPU.

    Returns:
        The trained network, in evaluation mode.

    Raises:
        ModelError: A loss that is not finite.
    """
    selector = start or new_selector(options, kind, seed, len(stream.samples.sources))
    device = device or torch.device("cpu")
    selector.to(device).train()
    optimizer = torch.optim.AdamW(selector.parameters(), lr=options.lr, weight_decay=0.0)
    steps = options.pretrain_steps
    for step, batches in enumerate(stream.batches(0, steps)):
        optimizer.zero_grad(set_to_none=True)
        loss_sum, num_rows = 0.0, sum(known_rows(sources_of(batch)) for batch in batches)
        for batch in batches:
            sources = sources_of(to_device(batch, device))
            gates_BTM = selector.gates(sources.view)
            logprobs_BTM = sources.label_logprobs_BTM.clamp(min=PROBABILITY_FLOOR)
            nll = pool_nats(gates_BTM, logprobs_BTM, sources.begins_BT).sum()
            loss = nll / max(num_rows, 1)
            if feedback_weight:
                balance = importance_cv2(selector.keep(gates_BTM).sum((0, 1)))
                loss = loss + feedback_weight * balance / len(batches)
            torch.autograd.backward(loss)
            loss_sum += float(nll.detach())
        if loss_sum != loss_sum:
            names = ", ".join(name for batch in batches for name in batch.segment_ids[:4])
            raise ModelError("selector's loss is not a number", where=f"step {step}, {names} ...")
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate_factor(step, steps, warmup_ratio=0.02, floor=0.1)
        optimizer.step()
        if on_step is not None:
            on_step(step, loss_sum / max(num_rows, 1))
    optimizer.zero_grad(set_to_none=True)  # else the joint training would add to these gradients
    return selector.eval()


def new_selector(
    options: LearnedOptions, kind: LearnedKind, seed: int, num_sources: int = 0
) -> Selector:
    """An untrained selector; its weights depend on the seed alone, not on torch's global random state.

    Args:
        options: Options of the selector.
        kind: Which selector.
        seed: Seed of the initial weights.
        num_sources: Number of sources, for selectors that are bound to them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.network(options, num_sources)


def known_logprobs(batches: Iterable[Batch], *, where: str) -> npt.NDArray[np.float64]:
    """Log-probabilities [R, M] of the labels on rows where every source knows them.

    Raises:
        InputError: There is no such row; `where` goes into the message.
    """
    parts = []
    for batch in batches:
        logs_BTM = sources_of(batch).label_logprobs_BTM.double().numpy()
        known_BT = ~np.isnan(logs_BTM).any(-1) & (batch.label_bytes_BT.numpy() > 0)
        parts.append(logs_BTM[known_BT].clip(min=PROBABILITY_FLOOR))
    if not parts or not sum(map(len, parts)):
        raise InputError("no row where every source knows the label", where=where)
    return np.concatenate(parts)


def known_rows(sources: SourceBatch) -> int:
    """Number of rows where a source that covers the row knows the label: the pool loss's rows."""
    known_BTM = ~sources.label_logprobs_BTM.isnan() & sources.covered_BTM
    return int(known_BTM.any(-1).sum())
