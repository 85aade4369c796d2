"""Method `bytes` (docs/alignment.md) in plain Python: dictionaries, a function per rule, float64.

Written from the description, not from the kernel; the fast path is held against it. What the target
knows before a token is a dictionary {place: weight}: where the source may stand. Every rule answers
with parts (target token, mass, where the source stands if that token is the label). The masses by
token are the distribution; the label's parts, divided by its mass, are the places before the next
token. An empty dictionary of places says that nothing is known.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from align.chain.continuation import Continuation
from align.chain.first_token import PieceTable
from align.chain.tail_tokens import TailTokens, no_tail_tokens
from align.chain.trie import TargetTrie
from align.chain.vocabulary_map import VocabularyMap
from store_schema.layout import Arrays, Origin
from store_schema.text.tokenizer import EncodedSegment
from store_schema.text.vocabulary import Vocabulary

TAIL = -1
"""In place of a target token: mass of which no token is known."""


LEAST_LEFT, LEAST_OF_REAL = 1e-3, 1e-3
"""A row that lists all but this share of the corpus's tokens has none in its tail; and none with less
mass than this part of the real token's is taken."""
LEAST_SPREAD = 1e-5
"""Less than this of an entry's mass goes to no further target token: it is tail."""


def vocabulary(*tokens: bytes, special: Sequence[int] = ()) -> Vocabulary:
    """A vocabulary by hand; b"" makes a token without bytes."""
    roles = np.zeros(len(tokens), bool)
    roles[list(special)] = True
    return Vocabulary(tokens, roles)


def vocabulary_map(
    pieces: PieceTable,
    continuation: Continuation,
    target: Vocabulary,
    *,
    eos: tuple[int, int] = (-1, -1),
    look_ahead: bool = True,
    tail: TailTokens | None = None,
) -> VocabularyMap:
    """What `project` asks for: the one place in the tests that builds it."""
    trie = TargetTrie.of(target)
    tail = tail or no_tail_tokens(len(pieces.offsets) - 1, len(target.lengths))
    return VocabularyMap(pieces, continuation, trie, target.lengths, tail, eos, look_ahead)


@dataclass(frozen=True)
class Tables:
    """Both vocabularies and the map between them."""

    source: Vocabulary
    target: Vocabulary
    mapping: VocabularyMap

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Target tokens by their bytes; of equal ones the highest id."""
        return {token: index for index, token in enumerate(self.target.tokens) if token}

    @cached_property
    def beginnings(self) -> frozenset[bytes]:
        """Every proper beginning of a target token: there the target could still go on."""
        return frozenset(t[:n] for t in self.by_bytes for n in range(len(t)))

    def decided(self, known: bytes) -> int:
        """The target token that text must begin with which begins with `known`, whatever follows."""
        return TAIL if known in self.beginnings else self.longest(known)

    def longest(self, known: bytes) -> int:
        """The longest target token that `known` begins with."""
        lengths = range(len(known), 0, -1)
        return next((self.by_bytes[known[:n]] for n in lengths if known[:n] in self.by_bytes), TAIL)

    def continuations(self, token: int) -> list[tuple[int, float]]:
        """Target tokens that a source token's mass is spread over."""
        going = self.mapping.continuation
        row = slice(going.offsets[token], going.offsets[token + 1])
        return list(zip(going.targets[row].tolist(), going.weights[row].tolist(), strict=True))

    def middle(self, token: int, at: int) -> int:
        """What the target begins with in running text on a source token's bytes from `at` on."""
        return int(self.mapping.pieces.middle[self.mapping.pieces.offsets[token] + at])

    def start(self, token: int, at: int) -> int:
        """The same at the beginning of a text."""
        return int(self.mapping.pieces.start[self.mapping.pieces.offsets[token] + at])


@dataclass(frozen=True, eq=False)
class Branch:
    """What the source says after an entry that is not the real token.

    Args:
        masses: Probability of each entry.
        tail: What they leave.
    """

    masses: dict[int, float]
    tail: float


@dataclass(frozen=True)
class Row:
    """A source position: the real token on bytes [start, end), what else it might have been.

    Args:
        token: The real token.
        start: First byte.
        end: Byte after the last.
        real: Its probability, NaN where nothing is known.
        others: Probability of each other entry.
        lead: Whether a space at the beginning of the row's tokens takes no byte of the text.
        branches: Branches of other entries.
    """

    token: int
    start: int
    end: int
    real: float
    others: dict[int, float]
    lead: bool
    branches: dict[int, Branch]

    @property
    def known(self) -> bool:
        """Whether the row says anything."""
        return not math.isnan(self.real)

    @property
    def tail(self) -> float:
        """What neither the real token nor another entry has."""
        return max(1.0 - self.real - sum(self.others.values()), 0.0)

    def counting(self, barred: frozenset[int]) -> float:
        """Mass of the row without the barred entries; of the tail as much as of the others."""
        total = sum(self.others.values())
        left = sum(p for token, p in self.others.items() if token not in barred)
        return self.real + left + (self.tail * left / total if total > 0 else self.tail)


@dataclass(frozen=True)
class Closed:
    """The real tokens before `row` end here. `barred`: entries of the row that the end of the last
    target token rules out."""

    row: int
    barred: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Real:
    """The real token of `row` began before this byte and goes on."""

    row: int


@dataclass(frozen=True)
class Open:
    """Another token: its bytes from `at` on lie ahead, and then its branch, if it has one."""

    token: int
    at: int
    branch: Branch | None = None


@dataclass(frozen=True)
class Lost:
    """Another token that has ended, and its branch, if it had one, was used."""


Place = Closed | Real | Open | Lost
Places = dict[Place, float]


@dataclass(frozen=True)
class Part:
    """Mass of a target token (or TAIL), and where the source then stands if it is the label."""

    token: int
    mass: float
    then: Place = Lost()


@dataclass(frozen=True)
class Position:
    """One aligned position.

    Args:
        mass: By target token, whole; {} where nothing is known.
        label: Mass of the label, NaN where nothing is known.
        origin: Of the position.
        before: Where the source may have stood before it.
    """

    mass: dict[int, float]
    label: float
    origin: Origin
    before: Places


@dataclass(frozen=True)
class AlignedSegment:
    """Positions of a segment and where the source stands after the last."""

    rows: list[Row]
    positions: list[Position]
    after: Places


def source_rows(arrays: Arrays, segment: int, source: Vocabulary) -> list[Row]:
    """Rows of one segment of a source store."""
    rows: list[Row] = []
    begin = 0
    for i in range(*arrays["token_offsets"][segment : segment + 2].tolist()):
        token, end = int(arrays["token_ids"][i]), int(arrays["byte_ends"][i])
        lead = not rows and len(source.tokens[token]) == end + 1
        real = math.exp(float(arrays["label_logprobs"][i]))
        beside = others(arrays, i, token, real)
        rows.append(Row(token, begin, end, real, beside, lead, branches(arrays, i)))
        begin = end
    return rows


def others(arrays: Arrays, i: int, token: int, real: float) -> dict[int, float]:
    """Entries of row i that are not the real token, scaled down where they leave no room for it."""
    entries = slice(*arrays["entry_offsets"][i : i + 2].tolist())
    ids = arrays["entry_ids"][entries].tolist()
    mass = np.exp(arrays["entry_logprobs"][entries].astype(float)).tolist()
    found = {v: p for v, p in zip(ids, mass, strict=True) if v != token}
    total = sum(found.values())
    if total > 1.0 - real:
        found = {v: p * (1.0 - real) / total for v, p in found.items()}
    return found


def branches(arrays: Arrays, i: int) -> dict[int, Branch]:
    """Branches of the entries of row i, by entry; scaled down where they have more than 1."""
    found: dict[int, Branch] = {}
    for b, position in enumerate(arrays.get("branch_positions", np.empty(0)).tolist()):
        if position == i:
            entries = slice(*arrays["branch_entry_offsets"][b : b + 2].tolist())
            mass = np.exp(arrays["branch_entry_logprobs"][entries].astype(float))
            total = float(mass.sum())
            shares = (mass / max(total, 1.0)).tolist()
            ids = arrays["branch_entry_ids"][entries].tolist()
            tail = max(1.0 - total, 0.0)
            token = int(arrays["branch_tokens"][b])
            found[token] = Branch(dict(zip(ids, shares, strict=True)), tail)
    return found


@dataclass(frozen=True)
class Reading:
    """One target token [begin, end) of a segment, and all that its rules look at."""

    tables: Tables
    rows: list[Row]
    text: bytes
    label: int
    begin: int
    end: int
    first: bool
    lead: bool

    def parts(self, places: Places) -> Iterator[Part]:
        """What every place says."""
        for place, weight in places.items():
            if isinstance(place, Closed):
                yield from self.closed(place, weight)
            elif isinstance(place, Real):
                yield from self.path(place.row, weight)
            elif isinstance(place, Open):
                yield from self.open(place, weight)
            else:
                yield Part(TAIL, weight)

    def open(self, place: Open, weight: float) -> Iterator[Part]:
        """A token that is not the real one: the target begins with what it begins the rest with, unless
        its branch says more."""
        ahead = self.tables.source.tokens[place.token][place.at :]
        branch = place.branch
        if branch is not None and not ahead:
            for token, p in branch.masses.items():
                yield from self.begun(token, 0, weight * p, None)
            yield Part(TAIL, weight * branch.tail)
            return
        if branch is not None and self.is_open(ahead):
            yield from self.after(branch, place.token, place.at, weight)
            weight, branch = weight * self.unsettled(branch, ahead), None
        goal = self.tables.middle(place.token, place.at)
        yield Part(goal, weight, self.read_on(place.token, place.at, self.begin, branch))

    def is_open(self, known: bytes) -> bool:
        """Whether a longer token of the target begins with these bytes."""
        return known in self.tables.beginnings

    def unsettled(self, branch: Branch, known: bytes, entry: int = TAIL) -> float:
        """Share of a branch with which the target's token is not determined, nor counted."""
        left = branch.tail
        for following, p in branch.masses.items():
            more = self.tables.source.tokens[following]
            if more and self.is_open(known + more) and not self.counted(entry, known, more):
                left += p
        return left

    def counted(self, entry: int, known: bytes, more: bytes) -> dict[int, float]:
        """Shares of the target tokens that were counted where `entry` began and agree with its bytes
        `known` and those after it; {} if there is none, or `entry` is not known to begin there."""
        if entry < 0:
            return {}
        ends = self.stopped(entry, known, more)
        found = {
            goal: weight
            for goal, weight in self.tables.continuations(entry)
            if goal == ends
            or (
                len(self.tables.target.tokens[goal]) > len(known + more)
                and self.tables.target.tokens[goal][len(known) :].startswith(more)
            )
        }
        total = sum(found.values())
        return {goal: weight / total for goal, weight in found.items()} if total else {}

    def stopped(self, entry: int, known: bytes, more: bytes) -> int:
        """The target's token if it ends with these bytes or before."""
        goal = self.tables.longest(known + more)
        return self.tables.middle(entry, 0) if goal == self.tables.longest(known) else goal

    def after(
        self,
        branch: Branch,
        token: int,
        at: int,
        weight: float,
        known: bytes = b"",
        *,
        whole: bool = False,
    ) -> Iterator[Part]:
        """A token that goes on with its branch, as far as that settles the target's token.

        Args:
            branch: Of the token.
            token: Its bytes from `at` on lie ahead.
            at: See `token`.
            weight: Of the token.
            known: Bytes of the target's token before.
            whole: Whether the token and the target's token begin here.
        """
        tokens = self.tables.source.tokens
        ahead, begin = tokens[token][at:], self.begin + len(known) - self.lead
        before = self.tables.longest(known + ahead)
        own = before if known else self.tables.middle(token, at)
        for following, p in branch.masses.items():
            more = tokens[following]
            if not more:
                ends = following == self.tables.mapping.eos[0] and own >= 0
                yield Part(own if ends else TAIL, weight * p)
                continue
            if self.is_open(known + ahead + more):
                entry = token if whole else TAIL
                shares = self.counted(entry, ahead, more)
                if not shares:
                    continue
                ends = shares.pop(self.stopped(entry, ahead, more), 0.0)
                for longer, share in shares.items():
                    yield Part(longer, weight * p * share)
                p *= ends
            goal = self.tables.longest(known + ahead + more)
            if goal == before:
                yield Part(own, weight * p, self.read_on(token, at, begin, branch))
            else:
                read = self.end - begin - len(ahead)
                then = Open(following, read) if read < len(more) else Lost()
                yield Part(goal, weight * p, then)

    def closed(self, place: Closed, weight: float) -> Iterator[Part]:
        """The next row applies."""
        if place.row == len(self.rows) or not self.rows[place.row].known:
            yield Part(TAIL, weight)
            return
        row = self.rows[place.row]
        scale = weight / row.counting(place.barred) if place.barred else weight
        for token, p in row.others.items():
            if token not in place.barred:
                yield from self.entry(row, token, scale * p)
        left = sum(p for token, p in row.others.items() if token not in place.barred)
        parts = [] if place.barred or self.first or row.lead else list(self.unlisted(row, scale))
        yield from parts
        yield Part(TAIL, weight - scale * (left + row.real) - sum(part.mass for part in parts))
        several = len(self.tables.continuations(row.token)) != 1
        ask = self.tables.mapping.look_ahead and several and not self.first
        yield from self.path(place.row, scale * row.real, ask=ask)

    def unlisted(self, row: Row, scale: float) -> Iterator[Part]:
        """Tokens that the row does not list and that begin with the label and reach beyond it: their
        part of the row's tail, by how often the corpus has them with the label."""
        tail = self.tables.mapping.tail
        listed = {row.token, *row.others}
        left = 1.0 - sum(float(tail.of_source[token]) for token in listed)
        if left <= LEAST_LEFT:
            return
        for c in range(*tail.offsets[self.label : self.label + 2].tolist()):
            token, share = int(tail.tokens[c]), float(tail.shares[c])
            mass = scale * row.tail * share / left
            if token not in listed and mass > LEAST_OF_REAL * scale * row.real:
                yield Part(self.label, mass, self.read_on(token, 0, self.begin))

    def entry(self, row: Row, token: int, mass: float) -> Iterator[Part]:
        """An entry of the row that applies, not the real token."""
        eos, target_eos = self.tables.mapping.eos
        at = self.cut(row, token)
        if token == eos and target_eos >= 0:
            yield Part(target_eos, mass)
        elif at == len(self.tables.source.tokens[token]):
            yield Part(TAIL, mass)
        elif self.first:
            then = self.read_on(token, at, self.begin, row.branches.get(token))
            yield Part(self.tables.start(token, at), mass, then)
        else:
            branch = row.branches.get(token)
            yield from self.begun(token, at, mass, branch, settles=not row.lead)

    def begun(
        self, token: int, at: int, mass: float, branch: Branch | None, *, settles: bool = True
    ) -> Iterator[Part]:
        """A token that begins here in running text; `settles`: whether its branch is asked now."""
        eos, target_eos = self.tables.mapping.eos
        written = self.tables.source.tokens[token][at:]
        if token == eos and target_eos >= 0:
            yield Part(target_eos, mass)
        elif not written:
            yield Part(TAIL, mass)
        else:
            if branch is not None and settles and self.is_open(written):
                yield from self.after(branch, token, at, mass, whole=True)
                mass, branch = mass * self.unsettled(branch, written, token), None
            for n, (goal, weight) in enumerate(self.tables.continuations(token)):
                if n == 0 or mass * weight >= LEAST_SPREAD:
                    then = self.read_on(token, at, self.begin, branch)
                    yield Part(goal, mass * weight, then)

    def path(self, index: int, mass: float, *, ask: bool = False) -> Iterator[Part]:
        """The real tokens up to row `index` were written; `ask`: whether to look ahead."""
        row = self.rows[index]
        after = self.rows[index + 1] if index + 1 < len(self.rows) else None
        if row.end > self.end:
            yield Part(self.label, mass, Real(index))
        elif row.end == self.end:
            longer = self.longer(after) if ask and after is not None and after.known else {}
            yield from self.ended(index, mass, longer)
        elif after is None or not after.known:
            yield Part(TAIL, mass)
        else:
            for token, p in after.others.items():
                yield from self.beside(after, token, mass * p)
            yield Part(TAIL, mass * after.tail)
            yield from self.path(index + 1, mass * after.real, ask=ask)

    def beside(self, row: Row, token: int, mass: float) -> Iterator[Part]:
        """An entry of a later row on the real path, not the real token."""
        written, branch = self.tables.source.tokens[token], row.branches.get(token)
        known, whole = self.known(row.start), self.known(self.end)
        if not written:
            # Where the text ends the target writes what it has.
            ends = token == self.tables.mapping.eos[0]
            yield Part(self.tables.longest(known) if ends else TAIL, mass)
            return
        if whole not in self.tables.by_bytes:  # the label is a role, written in the text
            if written.startswith(self.text[row.start : self.end]):
                yield Part(self.label, mass, self.read_on(token, 0, row.start, branch))
            else:
                yield Part(TAIL, mass)
            return
        if branch is not None and self.is_open(known + written):
            yield from self.after(branch, token, 0, mass, known)
            mass, branch = mass * self.unsettled(branch, known + written), None
        goal = self.tables.decided(known + written)
        if goal == self.tables.longest(whole):
            yield Part(self.label, mass, self.read_on(token, 0, row.start, branch))
        else:
            yield Part(goal, mass)

    def ended(self, index: int, mass: float, longer: dict[int, int]) -> Iterator[Part]:
        """The label and the real token of row `index` end together.

        Args:
            index: The row.
            mass: Of the real path.
            longer: Entries of the next row with which the target would have written another token
                than the label, and which. They take their part, and the tail its own in proportion;
                the rest of that row is the label's.
        """
        if not longer:
            yield Part(self.label, mass, Closed(index + 1))
            return
        after = self.rows[index + 1]
        for token, goal in longer.items():
            yield Part(goal, mass * after.others[token])
        counts = after.counting(frozenset(longer))
        gone = 1.0 - counts - sum(after.others[token] for token in longer)
        yield Part(TAIL, mass * gone)
        yield Part(self.label, mass * counts, Closed(index + 1, frozenset(longer)))

    def longer(self, after: Row) -> dict[int, int]:
        """Entries of the row after the label that would have made it longer, and the token then."""
        known = self.known(self.end)
        if known not in self.tables.beginnings or known not in self.tables.by_bytes:
            return {}
        found = {}
        for token in after.others:
            written = self.tables.source.tokens[token]
            goal = self.tables.decided(known + written)
            if written and goal != self.tables.longest(known):
                found[token] = goal
        return found

    def known(self, stop: int) -> bytes:
        """The bytes of the target's token up to `stop`, its own word mark with them."""
        return b" " * self.lead + self.text[self.begin : stop]

    def cut(self, row: Row, token: int) -> int:
        """Bytes of a token that are not of the text."""
        return int(row.lead and self.tables.source.tokens[token].startswith(b" "))

    def read_on(self, token: int, at: int, begin: int, branch: Branch | None = None) -> Place:
        """Where a token whose bytes from `at` on lay at byte `begin` stands after the label."""
        read, ahead = self.text[begin : self.end], self.tables.source.tokens[token][at:]
        enough = len(ahead) > len(read) or (len(ahead) == len(read) and branch is not None)
        if enough and ahead.startswith(read):
            return Open(token, at + len(read), branch)
        return Lost()


def take_up(tables: Tables, rows: list[Row], text: bytes, end: int) -> Places:
    """Where the source may stand at byte `end` when nothing was known before."""
    index = next((r for r, row in enumerate(rows) if row.end > end), len(rows))
    if index == len(rows) or rows[index].start == end:
        return {Closed(index): 1.0}
    row = rows[index]
    if not row.known:
        return {}
    read = text[row.start : end]
    places: Places = {Real(index): row.real}
    for token, p in row.others.items():
        at = int(row.lead and tables.source.tokens[token].startswith(b" "))
        if tables.source.tokens[token][at:].startswith(read):
            ended, branch = (
                len(tables.source.tokens[token]) - at == len(read),
                row.branches.get(token),
            )
            place: Place = Open(token, at + len(read), branch)
            if ended and branch is None:
                place = Lost()
            places[place] = places.get(place, 0.0) + p
    total = sum(places.values())
    return {place: weight / total for place, weight in places.items()}


def begins_row(rows: list[Row], places: Places) -> bool:
    """Whether a row that says something may begin here."""
    begun = [place.row for place in places if isinstance(place, Closed)]
    return any(index < len(rows) and rows[index].known for index in begun)


def align_segment(
    tables: Tables, arrays: Arrays, segment: int, text: bytes, target: EncodedSegment
) -> AlignedSegment:
    """Aligned positions of one segment, every entry kept."""
    rows = source_rows(arrays, segment, tables.source)
    places: Places = {Closed(0): 1.0}
    positions = []
    begin = 0
    pairs = zip(target.token_ids.tolist(), target.byte_ends.tolist(), strict=True)
    for j, (label, end) in enumerate(pairs):
        lead = j == 0 and len(tables.target.tokens[label]) == end + 1
        reading = Reading(tables, rows, text, label, begin, end, j == 0, lead)
        mass: dict[int, float] = defaultdict(float)
        then: dict[Place, float] = defaultdict(float)
        for part in reading.parts(places):
            mass[part.token] += part.mass
            if part.token == label:
                then[part.then] += part.mass
        mass.pop(TAIL, None)
        total = mass.get(label, 0.0)
        if total > 0:
            origin = Origin.BOUNDARY if begins_row(rows, places) else Origin.INSIDE
            kept = {token: m for token, m in mass.items() if m > 0}
            positions.append(Position(kept, total, origin, places))
            places = {place: m / total for place, m in then.items() if m > 0}
            if all(isinstance(place, Lost) for place in places):
                places = take_up(tables, rows, text, end)
        else:
            positions.append(Position({}, math.nan, Origin.NONE, places))
            places = take_up(tables, rows, text, end)
        begin = end
    return AlignedSegment(rows, positions, places)


def keep(mass: dict[int, float], label: int, max_entries: int) -> dict[int, float]:
    """The heaviest entries, ties by id, the label among them."""
    order = sorted(mass, key=lambda token: (token != label, -mass[token], token))
    return {token: mass[token] for token in order[:max_entries]}


def reference(
    tables: Tables, arrays: Arrays, texts: Sequence[bytes], target: Sequence[EncodedSegment]
) -> list[AlignedSegment]:
    """Every segment of a shard."""
    pairs = zip(texts, target, strict=True)
    return [align_segment(tables, arrays, d, text, t) for d, (text, t) in enumerate(pairs)]
