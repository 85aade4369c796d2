"""Priors of domains from the aligned stores of the training split.

Shape suffixes: S segments, M sources, G domains, D segments that are asked for, N rows of a shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fuse_train.data.partial import missing_shards
from fuse_train.selectors.prior import domain_priors, uniform_prior
from store_schema.layout import row_sums
from store_schema.plan.columns import segment_columns
from store_schema.plan.plan import Plan, Segment, ShardRecord
from store_schema.store.reader import StoreReader

Floats = npt.NDArray[np.float64]

MOST_SHARDS = 64
"""Shards that are read, spread over the split; labels alone, without entries."""
FLOOR = -1000.0
"""Nats. Lower log-probabilities of a label (such as -inf) are raised to this."""


def domains_of(plan: Plan) -> tuple[str, ...]:
    """Every domain of the plan, in alphabetical order."""
    return tuple(sorted(segment_columns(plan, ["domain"])["domain"].unique().to_pylist()))


class DomainPrior:
    """Weights of the sources before a segment begins, by its domain; read when first asked for.

    The same for the same plan and stores. Equal weights if no shard of the split is in all stores.

    Args:
        plan: The plan.
        stores: Aligned stores, by source.
        split: The training split.
    """

    def __init__(self, plan: Plan, stores: Mapping[str, StoreReader], split: str) -> None:
        self._plan, self._stores, self._split = plan, stores, split

    def of(self, segments: Sequence[Segment]) -> Floats:
        """The prior [D, M] of segments of the plan.

        Raises:
            CorruptionError: Damaged data.
        """
        domains, priors_GM = self._by_domain
        return priors_GM[[domains[segment.domain] for segment in segments]]

    @cached_property
    def _by_domain(self) -> tuple[dict[str, int], Floats]:
        """Rows of the domains, and the weights [G, M]."""
        domains = {name: row for row, name in enumerate(domains_of(self._plan))}
        of_split = self._plan.splits().get(self._split, ())
        lacking = set().union(*missing_shards(self._stores, of_split).values())
        shards = [shard for shard in of_split if shard.index not in lacking]
        if not shards or len(self._stores) < 2:
            return domains, uniform_prior(len(domains), len(self._stores))
        at = np.unique(np.linspace(0, len(shards) - 1, MOST_SHARDS).round().astype(int))
        chosen = [shards[i] for i in at]
        nats_SM = np.concatenate([_segment_nats(shard, self._stores) for shard in chosen])
        rows_S = [domains[s.domain] for shard in chosen for s in self._plan.segments(shard)]
        return domains, domain_priors(nats_SM, np.array(rows_S, np.int64), len(domains))


def _segment_nats(shard: ShardRecord, stores: Mapping[str, StoreReader]) -> npt.NDArray[np.float64]:
    """NLL of each segment of a shard [S, M], over rows whose label every source knows."""
    read = [r.read(shard.index, ("token_offsets", "label_logprobs")) for r in stores.values()]
    logprobs_NM = np.stack([arrays["label_logprobs"].astype(np.float64) for arrays in read], 1)
    known_N1 = ~np.isnan(logprobs_NM).any(1, keepdims=True)
    nats_NM = -np.where(known_N1, logprobs_NM, 0.0).clip(min=FLOOR)
    offsets = read[0]["token_offsets"]
    return np.stack([row_sums(nats_N, offsets) for nats_N in nats_NM.T], 1)
