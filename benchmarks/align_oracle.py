"""The truth that an alignment is held against: what the source itself says of the target's next token.

Given a text up to where target token j begins, and that the target has read it as its tokens before j,
the source's probability that its next token is y is that of all continuations which the target's
tokenizer would begin with y. The source is asked for them directly:

1. *What stands before.* From a boundary of the source's real tokens a little before the position, all
   ways of writing the bytes up to it are followed; each ends with a token that ends there or reaches
   beyond it (healing at the near end).
2. *What comes.* Each way is written on, the most probable first, until the target's tokenizer would
   not change its mind about the token any more (healing at the far end). A continuation with which the
   tokens before j would have been others is none: the target would not stand here.

What is not followed to its end is the remainder, stated with each position.

Shape suffixes: V the source's vocabulary, n nodes.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary

OPEN, ELSEWHERE = -1, -2
"""Instead of a token: more text is needed; the tokens before the position would be others."""
PROBES = ("e", "s", " t", "1", ".", "\n")
"""Text that may come. Where the target's first token is the same before all of them, and no token of
its vocabulary goes on from what is there, it is settled."""

BACK = 1
"""Real source tokens before the last boundary at or before the position that are written again."""
LEAST_SHARE = 1e-6
"""Continuations below this share of what is possible are left to the remainder."""
REMAINDER, MOST_NODES, BATCH = 2e-3, 3_000, 64


class NextRows(Protocol):
    """The source at work on one segment."""

    def rows(self, before: int, nodes: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float64]:
        """[n, V] probabilities after the segment's first `before` tokens and each node's own."""
        ...


class ModelRows:
    """Rows of a transformers model, the shared prefix computed once for each position."""

    def __init__(self, model: Any, context_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """`context_ids` stand before the segment's tokens."""
        self._model, self._context, self._tokens = model, list(context_ids), list(token_ids)
        self._before, self._row = -1, np.empty(0)
        self._cache: Any = None

    def rows(self, before: int, nodes: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float64]:
        """As `NextRows` says."""
        if before != self._before:
            self._open(before)
        found: list[npt.NDArray[np.float64]] = [self._row] * len(nodes)
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for place, node in enumerate(nodes):
            by_length[len(node)].append(place)
        for length, places in by_length.items():
            if length:
                for place, row in zip(places, self._after([nodes[i] for i in places]), strict=True):
                    found[place] = row
        return np.stack(found)

    def _open(self, before: int) -> None:
        import torch

        ids = torch.tensor([self._context + self._tokens[:before]])
        with torch.inference_mode():
            out = self._model(ids, use_cache=True)
        self._before, self._cache = before, out.past_key_values
        self._row = _softmax(out.logits[:, -1])[0]

    def _after(self, nodes: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float64]:
        import copy

        import torch

        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(nodes))
        with torch.inference_mode():
            out = self._model(torch.tensor(nodes), past_key_values=cache, use_cache=True)
        return _softmax(out.logits[:, -1])


def _softmax(logits: Any) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = logits.double().softmax(-1).numpy()
    return found


@dataclass(frozen=True)
class SourcePieces:
    """A source's tokens by their bytes.

    Args:
        vocabulary: Of the source.
        eos_id: What ends its text; None for none.
    """

    vocabulary: Vocabulary
    eos_id: int | None

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        tokens = self.vocabulary.tokens
        order = sorted((i for i in range(len(tokens)) if tokens[i]), key=tokens.__getitem__)
        return [tokens[i] for i in order], order

    @cached_property
    def _by_bytes(self) -> dict[bytes, list[int]]:
        found: defaultdict[bytes, list[int]] = defaultdict(list)
        for token_id, token in enumerate(self.vocabulary.tokens):
            if token:
                found[token].append(token_id)
        return dict(found)

    def agreeing(self, needed: bytes) -> list[int]:
        """Tokens that `needed` begins with, and those that begin with it; all that have bytes where
        nothing is needed."""
        written, ids = self._sorted
        if not needed:
            return ids
        inside = [i for k in range(1, len(needed)) for i in self._by_bytes.get(needed[:k], ())]
        at = bisect.bisect_left(written, needed)
        while at < len(written) and written[at].startswith(needed):
            inside.append(ids[at])
            at += 1
        return inside


class TargetText:
    """What the target's tokenizer makes of a segment's text up to one of its tokens, and of more."""

    def __init__(
        self, tokenizer: SegmentTokenizer, text: bytes, encoded: EncodedSegment, position: int
    ) -> None:
        """`position` is that of the token, in the segment."""
        begin = int(encoded.byte_ends[position - 1]) if position else 0
        self.begin = begin
        self._tokenizer, self._before = tokenizer, text[:begin]
        self._ids, self._known = encoded.token_ids[:position].tolist(), {}
        self._prefixes = proper_prefixes(tokenizer.vocabulary)

    def tokens(self, continuations: Sequence[tuple[bytes, bool]]) -> list[int]:
        """The token that the target begins with on each continuation, OPEN or ELSEWHERE.

        Args:
            continuations: Bytes from the position on, and whether the text ends with them.
        """
        new = [one for one in dict.fromkeys(continuations) if one not in self._known]
        asked: list[str] = []
        spans: list[tuple[tuple[bytes, bool], int, int]] = []
        for one in new:
            written, final = one
            texts = self._texts(written, final)
            if texts is None:
                self._known[one] = ELSEWHERE
            elif not texts:
                self._known[one] = OPEN
            else:
                spans.append((one, len(asked), len(asked) + len(texts)))
                asked += texts
        readings = self._tokenizer.encode_text(asked) if asked else []
        for one, begin, end in spans:
            found = {self._token(ids, at_end=one[1]) for ids in readings[begin:end]}
            self._known[one] = found.pop() if len(found) == 1 else OPEN
        return [self._known[one] for one in continuations]

    def _texts(self, written: bytes, final: bool) -> list[str] | None:
        """Texts to tokenise; none where more is needed, None where these bytes are no text."""
        whole = self._before + written
        try:
            text = whole.decode()
        except UnicodeDecodeError as error:
            cut_short = error.end == len(whole) and len(whole) - error.start < 4
            return [] if cut_short and not final and "unexpected end" in error.reason else None
        if final:
            return [text]
        if written in self._prefixes or not written:
            return []
        return [text + probe for probe in PROBES]

    def _token(self, ids: Sequence[int], *, at_end: bool) -> int:
        number = len(self._ids)
        if list(ids[:number]) != self._ids:
            return ELSEWHERE
        if len(ids) > number:
            return int(ids[number])
        eos = self._tokenizer.eos_id
        return eos if at_end and eos is not None else ELSEWHERE


_PREFIXES: dict[str, frozenset[bytes]] = {}


def proper_prefixes(vocabulary: Vocabulary) -> frozenset[bytes]:
    """All that is the beginning of a token and not the whole of it."""
    if vocabulary.fingerprint not in _PREFIXES:
        found = {token[:k] for token in vocabulary.tokens for k in range(1, len(token))}
        _PREFIXES[vocabulary.fingerprint] = frozenset(found)
    return _PREFIXES[vocabulary.fingerprint]


class Way(NamedTuple):
    """Source tokens written from the start on.

    Args:
        tokens: Their ids.
        written: Their bytes that stand at the position or behind it.
        mass: Their probability.
        final: Whether the text ends with them.
    """

    tokens: tuple[int, ...]
    written: bytes
    mass: float
    final: bool = False


@dataclass
class Truth:
    """The source's distribution over the target's next token.

    Args:
        mass: {token: probability}, 1 in sum.
        remainder: Share of the mass that was not followed to its end; `mass` is of the rest.
        elsewhere: Share of the continuations with which the tokens before would have been others.
        nodes: Rows that the source was asked for.
    """

    mass: dict[int, float] = field(default_factory=dict)
    remainder: float = 0.0
    elsewhere: float = 0.0
    nodes: int = 0


def truth_at(
    rows: NextRows,
    pieces: SourcePieces,
    target: TargetText,
    text: bytes,
    source: EncodedSegment,
    *,
    remainder: float = REMAINDER,
    most_nodes: int = MOST_NODES,
) -> Truth | None:
    """The truth at one position; None where the source has no row before it.

    Args:
        rows: The source on this segment.
        pieces: Its tokens.
        target: The position.
        text: The segment's.
        source: The segment as the source reads it.
        remainder: Followed until no more than this share is left.
        most_nodes: Rows to ask for, at most.
    """
    starts = np.concatenate(([0], source.byte_ends[:-1])).astype(np.int64)
    row = int(np.searchsorted(starts, target.begin, side="right")) - 1
    first = 0 if source.context_ids else 1
    row = max(row - BACK, first)
    if row >= len(starts) or starts[row] > target.begin:
        return None
    search = _Search(rows, pieces, target, row)
    ways = search.up_to_the_position(text[int(starts[row]) : target.begin])
    return search.beyond(ways, remainder, most_nodes)


@dataclass
class _Search:
    rows: NextRows
    pieces: SourcePieces
    target: TargetText
    row: int
    nodes: int = 0

    def _asked(self, nodes: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float64]:
        self.nodes += len(nodes)
        return self.rows.rows(self.row, nodes)

    def up_to_the_position(self, needed: bytes) -> list[Way]:
        """All ways of writing the bytes up to the position, from the start on."""
        tokens = self.pieces.vocabulary.tokens
        found: list[Way] = []
        pending: list[tuple[tuple[int, ...], bytes, float]] = [((), needed, 1.0)]
        while pending:
            done = [one for one in pending if not one[1]]
            found += [Way(ids, b"", mass) for ids, _, mass in done]
            batch = [one for one in pending if one[1]]
            if not batch:
                break
            pending = []
            best = max((way.mass for way in found), default=0.0)
            for (ids, left, mass), row_V in zip(
                batch, self._asked([one[0] for one in batch]), strict=True
            ):
                for token in self.pieces.agreeing(left):
                    part, written = mass * float(row_V[token]), tokens[token]
                    if part < LEAST_SHARE * best:
                        continue
                    if len(written) > len(left):
                        found.append(Way((*ids, token), written[len(left) :], part))
                    else:
                        pending.append(((*ids, token), left[len(written) :], part))
            pending = sorted(pending, key=lambda one: -one[2])[:BATCH]
        return found

    def beyond(self, ways: Sequence[Way], remainder: float, most_nodes: int) -> Truth:
        """Write each way on until the target's token is settled."""
        total = sum(way.mass for way in ways)
        settled: defaultdict[int, float] = defaultdict(float)
        left_out = 0.0
        heap: list[tuple[float, int, Way]] = []
        number = 0

        def take(ways: Sequence[Way]) -> None:
            nonlocal number
            tokens = self.target.tokens([(way.written, way.final) for way in ways])
            for way, token in zip(ways, tokens, strict=True):
                if token == OPEN:
                    number += 1
                    heapq.heappush(heap, (-way.mass, number, way))
                else:
                    settled[token] += way.mass

        take(ways)
        pending = sum(-one[0] for one in heap)
        while heap and pending + left_out > remainder * total and self.nodes < most_nodes:
            batch = [heapq.heappop(heap)[2] for _ in range(min(BATCH, len(heap)))]
            for way, row_V in zip(batch, self._asked([w.tokens for w in batch]), strict=True):
                children = self._children(way, row_V, LEAST_SHARE * total)
                left_out += way.mass - sum(child.mass for child in children)
                take(children)
            pending = sum(-one[0] for one in heap)
        elsewhere = settled.pop(ELSEWHERE, 0.0)
        kept = sum(settled.values())
        return Truth(
            mass={token: mass / kept for token, mass in settled.items()} if kept else {},
            remainder=(pending + left_out) / total if total else 1.0,
            elsewhere=elsewhere / total if total else 0.0,
            nodes=self.nodes,
        )

    def _children(self, way: Way, row_V: npt.NDArray[np.float64], least: float) -> list[Way]:
        tokens, eos = self.pieces.vocabulary.tokens, self.pieces.eos_id
        found = []
        for token in np.flatnonzero(way.mass * row_V >= least).tolist():
            part = way.mass * float(row_V[token])
            if token == eos:
                found.append(Way((*way.tokens, token), way.written, part, final=True))
            elif token < len(tokens) and tokens[token]:
                found.append(Way((*way.tokens, token), way.written + tokens[token], part))
        return found


def divergence(
    truth: Truth, ids: npt.NDArray[Any], probabilities: npt.NDArray[Any], num_ids: int
) -> tuple[float, float]:
    """KL in nats and total variation of a row from the truth.

    What the row's entries leave is spread evenly over the ids that are no entries.

    Args:
        truth: At the position.
        ids: The row's entries.
        probabilities: Theirs.
        num_ids: Of the target.
    """
    entries = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    tail = max(1.0 - float(probabilities.sum()), 1e-9)
    others = tail / max(num_ids - len(entries), 1)
    given = {token: entries.get(token) or others for token in truth.mass}
    kl = sum(mass * math.log(mass / given[token]) for token, mass in truth.mass.items() if mass)
    apart = sum(abs(mass - given[token]) for token, mass in truth.mass.items())
    # What is given to tokens that the truth does not have.
    return kl, 0.5 * (apart + max(1.0 - sum(given.values()), 0.0))
