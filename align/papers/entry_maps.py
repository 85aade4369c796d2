"""What other methods know of two vocabularies: target tokens, with weights, for each source token.

gold     TRL's GOLD (documentation of trl 0.25): tokens of the same bytes.
h_kl     X-Token's hybrid (arXiv 2605.21699): as gold, and a target token that the source writes as
         several counts as the first of them, where that has `PINNED` of its weight.
p_kl     X-Token's projection: each target token is the source's tokens that write it, the first
         `MOST_PARTS` of them with weights that fall by half. The published loss projects the student
         into the source's ids; here a source token's mass is shared out among the target tokens
         that are made of it, in proportion to those weights.
byte_prefix
         A byte-prefix map (after arXiv 2607.22334): the longest target token that a source token's
         bytes begin with.

All are our plain readings. In each, the source's EOS is the target's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store_schema.text.tokenizer import SegmentTokenizer

MOST_PARTS, PINNED = 4, 0.6


class Weighted(NamedTuple):
    """A token and its weight."""

    token: int
    weight: float


Table = Mapping[int, Sequence[Weighted]]
"""Source token to target tokens; a token that is not in it has none."""


class EntryMap(NamedTuple):
    """A table as arrays; V source tokens, M pairs.

    Args:
        offsets: [V+1] int64 pairs of each source token.
        targets: [M] int64 target tokens.
        weights: [M] float64, at most 1 in sum for a source token.
    """

    offsets: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]

    @classmethod
    def of(cls, table: Table, vocab_size: int) -> EntryMap:
        """From a table of source tokens below `vocab_size`."""
        counts = np.zeros(vocab_size, np.int64)
        for source, targets in table.items():
            counts[source] = len(targets)
        pairs = [pair for source in sorted(table) for pair in table[source]]
        return cls(
            np.concatenate(([0], np.cumsum(counts))),
            np.array([pair.token for pair in pairs], np.int64),
            np.array([pair.weight for pair in pairs], np.float64),
        )


@dataclass(frozen=True)
class Vocabularies:
    """Both sides.

    Args:
        source: The source's tokenizer.
        target: The target's tokenizer.
    """

    source: SegmentTokenizer
    target: SegmentTokenizer

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Target token of given bytes, the first of several."""
        tokens = self.target.vocabulary.tokens
        return {token: i for i, token in reversed(list(enumerate(tokens))) if token}

    @cached_property
    def eos(self) -> dict[int, list[Weighted]]:
        """The source's EOS and the target's; empty if one has none."""
        if self.source.eos_id is None or self.target.eos_id is None:
            return {}
        return {self.source.eos_id: [Weighted(self.target.eos_id, 1.0)]}

    @cached_property
    def shared(self) -> dict[int, list[Weighted]]:
        """Tokens of the same bytes."""
        tokens = self.source.vocabulary.tokens
        same = {
            i: [Weighted(self.by_bytes[token], 1.0)]
            for i, token in enumerate(tokens)
            if token in self.by_bytes
        }
        return same | self.eos

    @cached_property
    def parts(self) -> dict[int, list[Weighted]]:
        """Target token to the source tokens that write it, with weights that sum to 1."""
        texts: dict[int, str] = {}
        for i, token in enumerate(self.target.vocabulary.tokens):
            try:
                texts[i] = token.decode()
            except UnicodeDecodeError:
                continue  # part of a character: no text to tokenise
        asked = {i: text for i, text in texts.items() if text}
        readings = self.source.encode_text(list(asked.values()))
        found = {}
        for i, ids in zip(asked, readings, strict=True):
            kept = ids[:MOST_PARTS]
            weights = np.array([2.0**-k for k in range(len(kept))])
            weights /= weights.sum()
            found[i] = [Weighted(int(t), float(w)) for t, w in zip(kept, weights, strict=True)]
        exact = {target.token: source for source, (target,) in self.shared.items()}
        return found | {target: [Weighted(source, 1.0)] for target, source in exact.items()}

    @cached_property
    def projection(self) -> dict[int, list[Weighted]]:
        """Source token to the target tokens that are made of it, with weights that sum to 1."""
        found: defaultdict[int, list[Weighted]] = defaultdict(list)
        for target, parts in self.parts.items():
            for source, weight in parts:
                found[source].append(Weighted(target, weight))
        return {source: _scaled(targets) for source, targets in found.items()}

    @cached_property
    def hybrid(self) -> dict[int, list[Weighted]]:
        """As `shared`, and the target tokens whose first part has most of their weight."""
        found = defaultdict(
            list, {source: list(targets) for source, targets in self.shared.items()}
        )
        pinned: defaultdict[int, list[Weighted]] = defaultdict(list)
        for target, parts in self.parts.items():
            if not parts:
                continue
            source, weight = parts[0]
            if weight >= PINNED and source not in self.shared:
                pinned[source].append(Weighted(target, weight))
        return dict(found) | {source: _scaled(targets) for source, targets in pinned.items()}

    @cached_property
    def prefixes(self) -> dict[int, list[Weighted]]:
        """The longest target token that a source token's bytes begin with."""
        found = dict(self.eos)
        for source, written in enumerate(self.source.vocabulary.tokens):
            goal = self.longest_prefix(written)
            if goal is not None:
                found[source] = [Weighted(goal, 1.0)]
        return found

    def longest_prefix(self, written: bytes) -> int | None:
        """The longest target token that some bytes begin with."""
        for length in range(len(written), 0, -1):
            if written[:length] in self.by_bytes:
                return self.by_bytes[written[:length]]
        return None


def _scaled(targets: list[Weighted]) -> list[Weighted]:
    total = sum(weight for _, weight in targets)
    return [Weighted(token, weight / total) for token, weight in targets]
