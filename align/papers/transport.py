"""Method `ot`, after PTA-LLM: entries spread over near spellings by optimal transport.

PTA-LLM joins the source's top entries to the target model's own top entries at the same position, with
edit distance as cost. Here no target model runs, so neither its entries nor their masses are known.
What is taken instead, and why:

- Support: the m target tokens nearest in spelling to each entry. An entry whose bytes the target has
  goes there alone: it costs nothing, and spreading what is known to be the same only blurs it.
- Cost: edit distance over the length of the longer token, so from 0 to 1.
- Source marginal: the entries' masses, kept exactly. Tail stays tail.
- Target marginal: free. A uniform one would move mass away from likely tokens for no reason, and one
  made from the entries themselves (their nearest tokens) has the map of method `mined` as its own
  cheapest plan, so it says nothing new.

With entropy of strength eps, one marginal fixed and one free, Sinkhorn's iteration stands still after
its first step, and the plan is known in closed form:

    T(v, y) = p(v) exp(-c(v, y) / eps) / sum over y' of exp(-c(v, y') / eps)

The shares do not depend on the position, so they are made once for the vocabulary, and the method is
as fast as `mined`, of which everything else is taken. It is not context-dependent as PTA-LLM is: that
would need the target's own distributions.

Source: PTA-LLM, arXiv 2509.17276.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from align.papers.carry import LOSSLESS, CarryOptions
from align.papers.dtw import BAND_BYTES
from align.papers.mined import align_rows
from align.papers.mined_vocabulary import NearestTokens
from store_schema.layout import Arrays
from store_schema.text.tokenizer import EncodedSegment
from store_schema.text.vocabulary import Vocabulary

NUM_CANDIDATES = 4
"""m: target tokens that an entry may go to."""
STRENGTH = 0.1
"""eps, in units of the cost."""


@dataclass(frozen=True, slots=True)
class TransportAligner:
    """The method, ready for one source and one target.

    Args:
        targets: [V, m] int32 target tokens of each source token, nearest first, -1 for none.
        shares: [V, m] float64 share of a source token's mass that goes to each; sum 1 or 0.
        target_vocab_size: Ids of the target are below it.
        options: What becomes of a matched row.
        band_bytes: Bytes that matched tokens may lie apart, at most.
    """

    targets: npt.NDArray[np.int32]
    shares: npt.NDArray[np.float64]
    target_vocab_size: int
    options: CarryOptions = LOSSLESS
    band_bytes: int = BAND_BYTES

    @classmethod
    def of(
        cls,
        nearest: NearestTokens,
        source: Vocabulary,
        target: Vocabulary,
        *,
        options: CarryOptions = LOSSLESS,
        strength: float = STRENGTH,
    ) -> TransportAligner:
        """From the m nearest tokens (`nearest_tokens` with count m)."""
        shares = transport_shares(nearest, source, target, strength)
        return cls(nearest.ids, shares, len(target), options)

    def align(
        self, source: Arrays, texts: Sequence[bytes], target: Sequence[EncodedSegment]
    ) -> Arrays:
        """Aligned arrays of one shard.

        Args:
            source: The source store's arrays of the shard.
            texts: UTF-8 text of each segment, in the order of the shard.
            target: The same segments as the target's tokenizer reads them.

        Raises:
            MismatchError: Tokens end past their text, or ids are outside the map.
        """
        return align_rows(
            source, texts, target, self.targets, self.shares,
            self.target_vocab_size, self.options, self.band_bytes,
        )  # fmt: skip


def transport_shares(
    nearest: NearestTokens, source: Vocabulary, target: Vocabulary, strength: float
) -> npt.NDArray[np.float64]:
    """[V, m] the plan's rows per unit of mass; 0 where there is no candidate."""
    there = nearest.ids >= 0
    lengths = np.maximum(source.lengths[:, None], target.lengths[np.where(there, nearest.ids, 0)])
    costs = nearest.distances / np.maximum(lengths, 1)
    # Nearest in bytes need not be cheapest: the cost is relative. Shift by the least, for exp.
    least = np.where(there, costs, np.inf).min(axis=1, keepdims=True)
    weights = np.where(there, np.exp(-(costs - np.where(there, least, 0.0)) / strength), 0.0)
    totals = weights.sum(axis=1, keepdims=True)
    shares: npt.NDArray[np.float64] = weights / np.where(totals > 0, totals, 1.0)
    return shares
