"""Selectors: who of the sources is heard at each position, and how loudly.

A selector sees figures of the sources (`SourceView`), never the label of the row it decides on, and
gives weights that sum to 1 over the sources that cover the row. `min_ce`, and `asn` with granularity
segment, judge by the whole segment, as the papers do: fine for training on given text, but hindsight
when read as a prediction.

Shape suffixes: B segments, T rows, M sources, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fuse_train.config import TrainSection
from store_schema.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SourceView:
    """What a selector sees of a batch.

    Args:
        covered_BTM: bool, whether the source has a distribution of the row.
        features_BTMF: float32, columns as in `features.FEATURES`, scaled to about 1.
        source_bpb_BM: The source's bits per byte of the whole segment, inf where not known.
    """

    covered_BTM: torch.Tensor
    features_BTMF: torch.Tensor
    source_bpb_BM: torch.Tensor


class Selector(nn.Module):
    """Base of selectors: `forward(view)` gives weights.

    Weights [B, T, M] are 0 or more, sum to 1 over the covered sources of a row, are 0 for others,
    and all 0 where no source covers the row.
    """

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

    def forward(self, view: SourceView) -> torch.Tensor:
        bpb_BTM = view.source_bpb_BM[:, None].expand(view.covered_BTM.shape)
        # Covered sources of unknown NLL come after known ones and before those not covered.
        bpb_BTM = torch.nan_to_num(bpb_BTM, nan=1e30, posinf=1e30)
        best_BT = bpb_BTM.masked_fill(~view.covered_BTM, float("inf")).argmin(-1)
        chosen_BTM = nn.functional.one_hot(best_BT, view.covered_BTM.shape[-1])
        return chosen_BTM.float() * view.covered_BTM


def normalised(weights_BTM: torch.Tensor) -> torch.Tensor:
    """Weights scaled to sum 1 over the last axis; rows of zeros stay."""
    total_BT1 = weights_BTM.sum(-1, keepdim=True)
    return weights_BTM / torch.where(total_BT1 > 0, total_BT1, torch.ones_like(total_BT1))


def build_selector(section: TrainSection, sources: Sequence[str]) -> Selector:
    """The selector that the section names, untrained.

    Args:
        section: Of the run.
        sources: Names in the run file's order.

    Raises:
        ConfigError: Static weights of sources that do not exist.
    """
    if section.selector == "uniform":
        return UniformSelector()
    if section.selector == "min_ce":
        return MinCeSelector()
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
    from fuse_train.asn import AdaptiveSelector

    return AdaptiveSelector(section.asn)
