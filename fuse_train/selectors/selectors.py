"""Selectors: modules that give each source a weight at each position.

A selector reads figures of the sources (`SourceView`), never the label of the row, and gives weights
that sum to 1 over the sources that cover the row. Those marked `hindsight` use the labels of the whole
segment, as the papers do: fine for training on given text, but their pools predict nothing.

Shape suffixes: B segments, T rows, M sources, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class SourceView:
    """What a selector may read of a batch.

    Args:
        covered_BTM: bool, whether the source has a distribution of the row.
        features_BTMF: float32, columns as in `features.FEATURES`, scaled to about 1; F is 0 for a
            selector that does not need them (`SelectorKind.needs_features`).
        source_bpb_BM: The source's bits per byte of the whole segment, inf where not known. Hindsight.
        past_logprobs_BTM: float32 nats of the label of the row BEFORE, NaN where not known.
        begins_BT: bool, rows where no source is inside one of its tokens (see pools.py); None is all.
        author_B: int64, the source that wrote a segment, -1 for none; None where none wrote any.
    """

    covered_BTM: torch.Tensor
    features_BTMF: torch.Tensor
    source_bpb_BM: torch.Tensor
    past_logprobs_BTM: torch.Tensor
    begins_BT: torch.Tensor | None = None
    author_B: torch.Tensor | None = None

    def of_sources(self, kept: Sequence[int]) -> SourceView:
        """The view of these sources alone, by index."""
        at = list(kept)
        author_B = self.author_B
        if author_B is not None:
            places = torch.full((self.covered_BTM.shape[-1] + 1,), -1, device=author_B.device)
            places[at] = torch.arange(len(at), device=author_B.device)
            author_B = places[author_B]  # index -1 is the last place, which holds -1
        return SourceView(
            self.covered_BTM[..., at],
            self.features_BTMF[:, :, at],
            self.source_bpb_BM[:, at],
            self.past_logprobs_BTM[..., at],
            self.begins_BT,
            author_B,
        )


class Selector(nn.Module):
    """Base of selectors: `forward(view)` gives weights.

    Weights [B, T, M] are 0 or more, sum to 1 over the covered sources of a row, are 0 for others,
    and all 0 where no source covers the row.
    """

    learns: ClassVar[bool] = False
    """Whether it has parameters to train, and can be saved and loaded (asn.py)."""
    pool_trains: bool = False
    """Whether the pool's NLL of the labels trains it."""
    fusion_trains: bool = False
    """Whether the fusion loss of the target trains it."""

    @property
    def hindsight(self) -> bool:
        """Whether weights of a row depend on its label or later ones."""
        return False

    @property
    def bound(self) -> bool:
        """Whether it works only for the sources it was made for, in their order."""
        return False

    def gates(self, view: SourceView) -> torch.Tensor:
        """Weights before the cut [B, T, M], which the pool loss uses."""
        weights_BTM: torch.Tensor = self(view)
        return weights_BTM

    def keep(self, gates_BTM: torch.Tensor) -> torch.Tensor:
        """Weights from gates: the cut, if there is one."""
        return gates_BTM

    def set_threshold(self, threshold: float) -> None:
        """Set the threshold of gates, if it has one, from a schedule."""

    def save(self, folder: Path) -> None:
        """Write its parameters into an existing folder, if it learns."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Load the parameters that `save` wrote."""
        raise NotImplementedError

    def forward(self, view: SourceView) -> torch.Tensor:
        """Weights [B, T, M] float32."""
        raise NotImplementedError


class StaticSelector(Selector):
    """Fixed weights, scaled to sum 1 over the covered sources.

    Where only sources of weight 0 cover a row, their weights are equal, so that no row is lost.
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
