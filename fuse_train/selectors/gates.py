"""Two other selectors that learn: the paper's network, and a gate without inputs.

Shape suffixes: B segments, T rows, M sources.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn

from fuse_train.selectors.asn import AdaptiveSelector, SelectorRecord
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.selectors import SourceView, covered_softmax, rewards


class RewardNetwork(AdaptiveSelector):
    """The ASN as Fusion-X has it: an MLP on the rewards of the whole segment.

        r_m = exp(-CE_m);  g = softmax(W3 GELU(W2 GELU(W1 r)))  with M -> 2M -> M -> M

    Bound to its sources and their order, since each has its own input. Rewards are of the whole
    segment: hindsight.

    Source: Fusion-X (2505.23844) and its public code. Departures: CE in nats per byte, not per token
    (sources with longer tokens lose otherwise); softmax over the covered sources; created once, trained
    and saved. The public code creates it in every loss call and never trains it. `untrained` does so
    too, with random weights seeded by the batch, so that a batch always gets the same.
    """

    kind = "fusion-x"

    def __init__(self, section: AsnSection, num_sources: int) -> None:
        super().__init__(section)
        self.num_sources = num_sources
        self.mlp = nn.Sequential(
            nn.Linear(num_sources, 2 * num_sources),
            nn.GELU(),
            nn.Linear(2 * num_sources, num_sources),
            nn.GELU(),
            nn.Linear(num_sources, num_sources),
        )
        self._untrained = section.untrained
        self.requires_grad_(not section.untrained)

    @property
    def hindsight(self) -> bool:
        return True

    @property
    def bound(self) -> bool:
        return True

    def gates(self, view: SourceView) -> torch.Tensor:
        if self._untrained:
            self._reinitialise(view.source_bpb_BM)
        scores_BM = self.mlp(rewards(view.source_bpb_BM))
        return covered_softmax(scores_BM[:, None].expand(view.covered_BTM.shape), view.covered_BTM)

    def _reinitialise(self, source_bpb_BM: torch.Tensor) -> None:
        """Draw new weights as PyTorch initialises them, seeded by the figures of the batch."""
        seed = zlib.crc32(source_bpb_BM.detach().cpu().numpy().tobytes())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for layer in self.mlp:
                if isinstance(layer, nn.Linear):
                    fresh = nn.Linear(layer.in_features, layer.out_features)
                    layer.load_state_dict(fresh.state_dict())

    def record(self) -> SelectorRecord:
        return SelectorRecord(kind=self.kind, granularity="segment", num_sources=self.num_sources)


class ConstantGate(AdaptiveSelector):
    """One learned score for each source, whatever the text: the baseline of adaptive networks."""

    kind = "constant"

    def __init__(self, section: AsnSection, num_sources: int) -> None:
        super().__init__(section)
        self.scores_M = nn.Parameter(torch.zeros(num_sources))

    @property
    def bound(self) -> bool:
        return True

    def gates(self, view: SourceView) -> torch.Tensor:
        return covered_softmax(self.scores_M.expand(view.covered_BTM.shape), view.covered_BTM)

    def record(self) -> SelectorRecord:
        return SelectorRecord(
            kind=self.kind, granularity="position", num_sources=len(self.scores_M)
        )
