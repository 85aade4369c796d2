"""Adds branches to a scored shard: chooses entries, asks the engine, and makes the arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.branch_config import BranchOptions
from extract.branching.choice import chances, choose_branches
from extract.branching.past_ends import counted_past_ends
from extract.engines.protocol import Branches, Engine
from extract.scoring.rows import ScoredSegment, scored_segment
from store_schema.config import RunConfig
from store_schema.encoding.selection import select_entries
from store_schema.layout import Arrays
from store_schema.plan.plan import Plan
from store_schema.presets import Encoding
from store_schema.text.encoded import EncodedSegment
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Brancher:
    """What is chosen by, for one source.

    Args:
        options: The budget.
        encoding: Of the store; entries that it does not keep get no branch.
        vocabulary: Of the source.
        chance_V: [V] chance that the target's tokenizer goes on past each token (`past_ends`).
    """

    options: BranchOptions
    encoding: Encoding
    vocabulary: Vocabulary
    chance_V: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls,
        run: RunConfig,
        plan: Plan,
        source: SegmentTokenizer,
        options: BranchOptions,
        encoding: Encoding,
    ) -> Brancher:
        """For a source of a run; counts text of the plan."""
        target = SegmentTokenizer.load(run.target, name="target")
        chance_V = counted_past_ends(plan, source, target)
        return cls(options, encoding, source.vocabulary, chance_V)

    def with_branches(
        self,
        engine: Engine,
        encoded: Sequence[EncodedSegment],
        arrays: Arrays,
        *,
        where: str,
        on_segment: Callable[[], object] = lambda: None,
    ) -> Arrays:
        """The arrays of a shard with branches, and with the entries that the store keeps.

        Args:
            engine: The loaded model.
            encoded: The shard's segments as the model read them.
            arrays: Of the shard, without branches.
            where: Shard and source, for messages.
            on_segment: Called after each segment; may raise to stop.

        Raises:
            ModelError: The model returns NaN.
        """
        arrays = select_entries(arrays, self.encoding)
        chance_E = chances(arrays, self.chance_V, self.vocabulary)
        offsets, entry_offsets = arrays["token_offsets"], arrays["entry_offsets"]
        for d, segment in enumerate(encoded):
            if segment.ends_turn:  # no text follows there
                last = int(offsets[d + 1]) - 1
                chance_E[entry_offsets[last] : entry_offsets[last + 1]] = 0
        chosen = choose_branches(arrays, chance_E, self.options)
        positions = np.searchsorted(entry_offsets, chosen, side="right") - 1
        tokens = arrays["entry_ids"][chosen]
        order = np.lexsort((tokens, positions))
        positions, tokens = positions[order], tokens[order].astype(np.int64)
        bounds = np.searchsorted(positions, offsets)
        with_some = np.flatnonzero(np.diff(bounds)).tolist()
        asked = [
            Branches(
                encoded[d],
                positions[bounds[d] : bounds[d + 1]] - offsets[d],
                tokens[bounds[d] : bounds[d + 1]],
            )
            for d in with_some
        ]
        rows: dict[int, ScoredSegment] = {}
        for i, dense in engine.branch(asked):
            rows[i] = scored_segment(
                dense,
                len(asked[i].positions),
                vocab_size=len(self.vocabulary),
                where=f"{where}, branches",
            )
            on_segment()
        return arrays | _branch_arrays(positions, tokens, [rows[i] for i in range(len(asked))])


def _branch_arrays(
    positions: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], rows: Sequence[ScoredSegment]
) -> Arrays:
    """The arrays of branches (`store_schema.layout`), from the rows of segments in order."""

    def joined(name: str, dtype: str) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = np.concatenate([[], *(getattr(row, name) for row in rows)])
        return found.astype(dtype)

    return {
        "branch_positions": positions.astype("<u4"),
        "branch_tokens": tokens.astype("<u4"),
        "branch_entry_offsets": np.concatenate([[0], np.cumsum(joined("counts", "<i8"))]).astype(
            "<i8"
        ),
        "branch_entry_ids": joined("entry_ids", "<u4"),
        "branch_entry_logprobs": joined("entry_logprobs", "<f4"),
        "branch_tail_mass": joined("tail_mass", "<f4"),
    }
