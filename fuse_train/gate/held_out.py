"""How much the sources' pool still adds to the target on held-out text, domain by domain.

Training text cannot show it: in a second pass the target has memorised it. So each evaluation looks for
the mixture of target and pool with the lowest NLL on the valid split. The pool's weight in it is the
share of its weight that the fusion loss keeps in that domain until the next evaluation: 0 where the
target has overtaken its sources, 1 where the target adds nothing to them.

Shape suffixes: B segments, T rows, S spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fuse_train.data.batch import Batch, sources_of, to_device, whole_spans
from fuse_train.gate.mixture import mixture_weight
from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from fuse_train.selectors.pools import pool_nats, span_sums
from fuse_train.selectors.selectors import Selector

Floats = npt.NDArray[np.float64]


@torch.no_grad()
def span_nats(
    batches: Iterable[Batch],
    selector: Selector,
    rows: Mapping[str, Floats],
    device: torch.device,
) -> dict[str, Floats]:
    """NLL of every span that target and pool both have a probability for.

    Args:
        batches: With labels and features, as from `split_batches`.
        selector: Gives the pool's weights.
        rows: The target's nats of each row by segment id, NaN where nothing predicts a row; segments
            without an entry are left out.
        device: Device of the selector.

    Returns:
        {domain: [2, S] nats under the target and under the pool}.
    """
    pairs: dict[str, list[Floats]] = {}
    for batch in batches:
        batch = to_device(batch, device)
        sources = sources_of(batch)
        logprobs_BTM = sources.label_logprobs_BTM.clamp(min=PROBABILITY_FLOOR)
        pool_BT = pool_nats(selector(sources.view), logprobs_BTM, sources.begins_BT)
        target_BT = torch.full(pool_BT.shape, torch.nan, dtype=torch.float64)
        for row_T, name in zip(target_BT.numpy(), batch.segment_ids, strict=True):
            own = rows.get(name)
            if own is not None:
                row_T[: len(own)] = own
        begins_BT = None if sources.begins_BT is None else sources.begins_BT.cpu()
        # Rows without a label are in no whole span, so their NaN reaches none.
        target_BT = span_sums(target_BT, begins_BT)
        first_BT = whole_spans(batch).cpu() & ~target_BT.isnan()
        pair = torch.stack([target_BT, pool_BT.double().cpu()])
        for b, at_T in enumerate(first_BT):
            domain = batch.domains[int(batch.domains_B[b])]
            pairs.setdefault(domain, []).append(pair[:, b, at_T].numpy())
    return {domain: np.concatenate(parts, axis=1) for domain, parts in pairs.items()}


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """The evaluated segments with what the pool needs of the sources.

    Args:
        batches: With labels and features, without entries.
    """

    batches: tuple[Batch, ...]

    @classmethod
    def of(cls, batches: Iterable[Batch], segment_ids: Sequence[str]) -> HeldOutText:
        """Keep the batches that hold one of these segments."""
        wanted = set(segment_ids)
        return cls(tuple(b for b in batches if not wanted.isdisjoint(b.segment_ids)))

    def shares(
        self, selector: Selector, rows: Mapping[str, Floats], accelerator: Any
    ) -> dict[str, float]:
        """Weight of the pool by domain, the same in all processes.

        Args:
            selector: As in `span_nats`.
            rows: As in `span_nats`, of this process's segments.
            accelerator: Of accelerate.
        """
        was_training = selector.training
        parts = [span_nats(self.batches, selector.eval(), rows, accelerator.device)]
        selector.train(was_training)
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            parts = gather_object(parts)
        names = sorted({name for part in parts for name in part})
        pairs = {n: np.concatenate([p[n] for p in parts if n in p], axis=1) for n in names}
        return {name: mixture_weight(*pair) for name, pair in pairs.items()}
