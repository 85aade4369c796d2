"""Selectors: who of the sources is heard at each position, and how loudly.

A selector sees figures of the sources (`SourceView`), never the label of the row it decides on, and
gives weights that sum to 1 over the sources that cover the row. Those marked `hindsight` judge by the
whole segment, as the papers do: fine for training on given text, but no prediction.

Shape suffixes: B segments, T rows, M sources, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fuse_train.config import TrainSection
from fuse_train.selectors.hedge import log_weights
from fuse_train.selectors.pools import held
from store_schema.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SourceView:
    """What a selector sees of a batch.

    Args:
        covered_BTM: bool, whether the source has a distribution of the row.
        features_BTMF: float32, columns as in `features.FEATURES`, scaled to about 1.
        source_bpb_BM: The source's bits per byte of the whole segment, inf where not known. Hindsight.
        past_logprobs_BTM: float32 nats of the label of the row BEFORE, NaN where not known.
        begins_BT: bool, rows where no source is inside one of its tokens (see pools.py); None is all.
    """

    covered_BTM: torch.Tensor
    features_BTMF: torch.Tensor
    source_bpb_BM: torch.Tensor
    past_logprobs_BTM: torch.Tensor
    begins_BT: torch.Tensor | None = None

    def of_sources(self, kept: Sequence[int]) -> SourceView:
        """The same without the other sources."""
        at = list(kept)
        return SourceView(
            self.covered_BTM[..., at],
            self.features_BTMF[:, :, at],
            self.source_bpb_BM[:, at],
            self.past_logprobs_BTM[..., at],
            self.begins_BT,
        )


class Selector(nn.Module):
    """Base of selectors: `forward(view)` gives weights.

    Weights [B, T, M] are 0 or more, sum to 1 over the covered sources of a row, are 0 for others,
    and all 0 where no source covers the row.
    """

    @property
    def hindsight(self) -> bool:
        """Whether weights of a row depend on its label or later ones."""
        return False

    @property
    def bound(self) -> bool:
        """Whether it was made for its sources in their order, and knows no others."""
        return False

    def forward(self, view: SourceView) -> torch.Tensor:
        """Weights [B, T, M] float32."""
        raise NotImplementedError


class UniformSelector(Selector):
    """The same weight for every covered source."""

    def forward(self, view: SourceView) -> torch.Tensor:
        return normalised(view.covered_BTM.float())


class StaticSelector(Selector):
    """Given weights, scaled to 1 over the covered sources.

    Where only sources of weight 0 cover a row, they share it equally: a row is not lost.
    """

    weights_M: torch.Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights_M", torch.tensor(list(weights), dtype=torch.float32))

    @property
    def bound(self) -> bool:
        return True

    def forward(self, view: SourceView) -> torch.Tensor:
        covered_BTM = view.covered_BTM.float()
        weights_BTM = covered_BTM * self.weights_M
        weightless_BT1 = weights_BTM.sum(-1, keepdim=True) <= 0
        return normalised(torch.where(weightless_BT1, covered_BTM, weights_BTM))


class MinCeSelector(Selector):
    """All weight on the covered source with the least NLL per byte of the segment.

    Source: FuseLLM (2401.10491) MinCE. Departures: per byte, not per token, because sources with
    longer tokens lose otherwise; per row the best of the covered ones. Equal sources: the first in
    the run file's order.
    """

    @property
    def hindsight(self) -> bool:
        return True

    def forward(self, view: SourceView) -> torch.Tensor:
        bpb_BTM = view.source_bpb_BM[:, None].expand(view.covered_BTM.shape)
        # Covered sources of unknown NLL come after known ones and before those not covered.
        bpb_BTM = torch.nan_to_num(bpb_BTM, nan=1e30, posinf=1e30)
        best_BT = bpb_BTM.masked_fill(~view.covered_BTM, float("inf")).argmin(-1)
        chosen_BTM = nn.functional.one_hot(best_BT, view.covered_BTM.shape[-1])
        return chosen_BTM.float() * view.covered_BTM


class AvgCeSelector(Selector):
    """Softmax of the sources' rewards exp(-CE) of the segment.

    Source: FuseLLM (2401.10491) AvgCE. Departures: CE is nats per byte, not per token, as in min_ce;
    the softmax is over the sources that cover the row. A source of unknown NLL has reward 0.
    """

    @property
    def hindsight(self) -> bool:
        return True

    def forward(self, view: SourceView) -> torch.Tensor:
        rewards_B1M = rewards(view.source_bpb_BM)[:, None]
        return covered_softmax(rewards_B1M.expand(view.covered_BTM.shape), view.covered_BTM)


class HedgeSelector(Selector):
    """Exponential weights on the log-loss of the segment's earlier tokens; see hedge.py.

    Weights are those of the span's first row (pools.py): inside a token losses are not settled.

    Args:
        rate: eta; 1 is the Bayes mixture.
        share: Probability that the best source changes before a row; 0 for one source per segment.
    """

    def __init__(self, rate: float = 1.0, share: float = 0.0) -> None:
        super().__init__()
        self.rate, self.share = rate, share

    def forward(self, view: SourceView) -> torch.Tensor:
        logs_SBTM = log_weights(view.past_logprobs_BTM, rate=self.rate, shares=(self.share,))
        return covered_softmax(held(logs_SBTM[0], view.begins_BT), view.covered_BTM)


def rewards(source_bpb_BM: torch.Tensor) -> torch.Tensor:
    """exp(-CE) with CE in nats per byte of the segment; 0 where it is not known."""
    nats_BM = torch.nan_to_num(source_bpb_BM, nan=math.inf, posinf=math.inf) * math.log(2)
    return torch.exp(-nats_BM)


def covered_softmax(scores_BTM: torch.Tensor, covered_BTM: torch.Tensor) -> torch.Tensor:
    """Softmax over the covered sources, float32; all 0 where there is none.

    A row without sources gets finite scores first: softmax of -inf alone is NaN, also in the
    gradient, however it is masked afterwards.
    """
    none_BT1 = ~covered_BTM.any(-1, keepdim=True)
    scores_BTM = scores_BTM.masked_fill(~(covered_BTM | none_BT1), float("-inf"))
    return scores_BTM.softmax(-1).float() * covered_BTM


def normalised(weights_BTM: torch.Tensor) -> torch.Tensor:
    """Weights scaled to sum 1 over the last axis; rows of zeros stay."""
    total_BT1 = weights_BTM.sum(-1, keepdim=True)
    return weights_BTM / torch.where(total_BT1 > 0, total_BT1, torch.ones_like(total_BT1))


FIXED = ("uniform", "static", "min_ce", "avg_ce", "hedge")
"""Selectors that need no search and no training."""


def build_selector(section: TrainSection, sources: Sequence[str]) -> Selector:
    """The selector that the section names, one of `FIXED`.

    Args:
        section: Of the run.
        sources: Names in the run file's order.

    Raises:
        ConfigError: Static weights of sources that do not exist.
        ValueError: A selector that is learned or searched for.
    """
    if section.selector == "uniform":
        return UniformSelector()
    if section.selector == "min_ce":
        return MinCeSelector()
    if section.selector == "avg_ce":
        return AvgCeSelector()
    if section.selector == "hedge":
        return HedgeSelector(section.hedge.rate, section.hedge.share)
    if section.selector == "static":
        given = section.static_weights or {}
        unknown = sorted(set(given) - set(sources))
        if unknown:
            raise ConfigError(
                "weights of unknown sources",
                where="train.static_weights",
                expected=", ".join(sources),
                got=", ".join(unknown),
            )
        return StaticSelector([given.get(name, 0.0) for name in sources])
    raise ValueError(f"selector {section.selector} is not a fixed one")
