"""Method `bytes` on random tokenizers, rows and text: against the plain reference and the truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import align.chain.project as projection
from align.chain.continuation import PairCounts, first_tokens
from align.chain.first_token import piece_table
from align.chain.project import project
from align.chain.tail_tokens import no_tail_tokens, tail_tokens
from store_schema.layout import Arrays, Origin, check_shard, row_sums
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary
from tests.align_reference import (
    LEAST_SPREAD,
    AlignedSegment,
    Closed,
    Open,
    Places,
    Real,
    Row,
    Tables,
    reference,
    source_rows,
    vocabulary_map,
)
from tests.random_source import segments
from tests.test_align_project import (
    SAMPLES,
    hand_arrays,
    hand_segment,
    hand_tables,
    masses,
    trained_tables,
    vocabulary,
)
from tests.tiny import tiny_tokenizer

KINDS = ("byte_level", "unigram", "metaspace_bpe", "unmarked_bpe")
"""The last is metaspace_bpe without a word mark of its own before a text."""
SEEDS = 3
ALL = 4096
"""More entries than any row has: nothing is cut."""

PARTS = [
    "12", "123", "4567", "e\u0301", "\r\n", "\n", "\t", "👩‍👩‍👧", "🏳️‍🌈", " ", "   ", "漢", "字", "한국",
    "the", " the", "there", "he", "foo", "x", "é", "\x01", "\x7f", "\u200b", "</s>", ".",
    ",", "العربية",
]  # fmt: skip

# U+2581 is SentencePiece's own word mark: such tokenizers cannot tell it from a space.
wild_text = st.text(st.characters(codec="utf-8", exclude_characters="▁\x00"), max_size=24)
texts = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=20).map("".join),
    st.builds(lambda n, text: " " * n + text, st.integers(0, 40), wild_text),
    st.sampled_from(SAMPLES).flatmap(
        lambda sample: st.integers(0, len(sample) - 1).map(lambda at: sample[at : at + 40])
    ),
).filter(bool)


def training_text(seed: int) -> list[str]:
    """Random text over the adversarial parts, and one third of the samples."""
    rng = np.random.default_rng(seed)
    drawn = ["".join(rng.choice(PARTS, 30).tolist()) for _ in range(20)]
    return drawn + SAMPLES[seed % 3 :: 3]


@cache
def tokenizer(kind: str, seed: int) -> SegmentTokenizer:
    size = {"byte_level": 340, "unigram": 400, "metaspace_bpe": 420, "unmarked_bpe": 420}[kind]
    family: Any = "metaspace_bpe" if kind == "unmarked_bpe" else kind
    hf = tiny_tokenizer(
        family, training_text(seed), size + 30 * seed, dummy_prefix=kind != "unmarked_bpe"
    )
    return SegmentTokenizer(hf, name=f"{kind}{seed}")


@cache
def pair(source: tuple[str, int], target: tuple[str, int], *, look_ahead: bool) -> Tables:
    a, b = tokenizer(*source), tokenizer(*target)
    return trained_tables(
        a, b, training_text(source[1]) + training_text(target[1]), look_ahead=look_ahead
    )


@cache
def by_first_byte(tokens: tuple[bytes, ...]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for token, written in enumerate(tokens):
        if written:
            found.setdefault(written[0], []).append(token)
    return found


def agreeing_rows(
    encoded: Sequence[EncodedSegment], source: Vocabulary, contents: Sequence[bytes], seed: int,
    *, bos: bool = True, unknown: float = 0.0,
) -> Arrays:  # fmt: skip
    """Source rows many of whose entries agree with the text, so that the source may stand anywhere.

    Args:
        encoded: Segments in the source's tokens.
        source: Vocabulary.
        contents: Texts of the segments.
        seed: Of the rows; with it changes how peaked they are.
        bos: Whether the first row says anything.
        unknown: Share of the other rows that say nothing.
    """
    rng = np.random.default_rng(seed)
    index = by_first_byte(source.tokens)
    empty = np.flatnonzero(source.lengths == 0)
    flatness = rng.choice([0.05, 0.4, 5.0])
    ids: list[int] = []
    logprobs: list[float] = []
    counts, tails, labels = [0], [], []
    for segment, text in zip(encoded, contents, strict=True):
        begin = 0
        ends = segment.byte_ends.tolist()
        for i, label in enumerate(segment.token_ids.tolist()):
            if (i == 0 and not bos) or rng.random() < unknown:
                row, real = {}, np.nan
            else:
                ahead = text[begin : begin + 1]
                near = [*index.get(ahead[0], ())] if ahead else []
                near += index.get(32, ()) if i == 0 else ()
                chosen = {int(v) for v in rng.integers(len(source), size=3)}
                chosen |= set(rng.choice(near, min(len(near), 8), replace=False)) if near else set()
                chosen |= {int(rng.choice(empty))} if len(empty) else set()
                chosen |= {v for v in near if text.startswith(source.tokens[v], begin)}
                others = sorted(int(v) for v in chosen - {label})
                mass = rng.dirichlet(np.full(len(others) + 2, flatness)).clip(1e-7)
                mass /= mass.sum()
                row = dict(zip(others, mass[2:].tolist(), strict=True))
                real = float(mass[0])
                if rng.random() < 0.85:
                    row[label] = real
                elif rng.random() < 0.2:  # the entries leave the label too little room
                    real = min(real + 1.2 * float(mass[1]), 1.0)
            order = sorted(row, key=lambda token: (-np.float32(np.log(row[token])), token))
            ids += order
            logprobs += [math.log(row[token]) for token in order]
            counts.append(len(ids))
            tails.append(1.0 - sum(row.values()))
            labels.append(math.log(real) if real == real else np.nan)
            begin = ends[i]
    lengths = [len(segment.token_ids) for segment in encoded]
    return {
        "segment_ids": np.arange(len(encoded), dtype="<i8"),
        "token_offsets": np.cumsum([0, *lengths]).astype("<i8"),
        "token_ids": np.concatenate([s.token_ids for s in encoded]).astype("<u4"),
        "byte_ends": np.concatenate([s.byte_ends for s in encoded]).astype("<u4"),
        "entry_offsets": np.asarray(counts, "<i8"),
        "entry_ids": np.asarray(ids, "<u4"),
        "entry_logprobs": np.minimum(np.asarray(logprobs, "<f4"), 0),
        "tail_mass": np.clip(np.asarray(tails, "<f4"), 0, 1),
        "label_logprobs": np.minimum(np.asarray(labels, "<f4"), 0),
    }


def with_branches(
    arrays: Arrays, source: Vocabulary, contents: Sequence[bytes], seed: int
) -> Arrays:
    """The arrays with branches after half of the other entries, whose rows may agree with the text."""
    rng = np.random.default_rng(seed)
    index = by_first_byte(source.tokens)
    starts, offsets = arrays["token_offsets"].tolist(), arrays["entry_offsets"].tolist()
    special = np.flatnonzero(source.lengths == 0)
    places: list[tuple[int, int]] = []
    rows: list[list[tuple[int, float]]] = []
    for d, text in enumerate(contents):
        begin = 0
        for i in range(starts[d], starts[d + 1]):
            label = int(arrays["token_ids"][i])
            for token in sorted(arrays["entry_ids"][offsets[i] : offsets[i + 1]].tolist()):
                if token == label or rng.random() < 0.5:
                    continue
                after = begin + len(source.tokens[token])
                near = [*index.get(text[after], ())] if after < len(text) else []
                chosen = {int(v) for v in rng.integers(len(source), size=3)}
                chosen |= set(rng.choice(near, min(len(near), 6), replace=False)) if near else set()
                chosen |= {v for v in near if text.startswith(source.tokens[v], after)}
                chosen |= {int(rng.choice(special))} if len(special) else set()
                mass = np.sort(rng.dirichlet(np.full(len(chosen) + 1, 0.4)).clip(1e-7))[::-1]
                mass /= mass.sum()
                places.append((i, token))
                ids = rng.permutation(sorted(chosen)).tolist()
                rows.append(list(zip(ids, mass.tolist(), strict=False)))
            begin = int(arrays["byte_ends"][i])
    entries = [entry for row in rows for entry in row]
    return arrays | {
        "branch_positions": np.array([position for position, _ in places], "<u4"),
        "branch_tokens": np.array([token for _, token in places], "<u4"),
        "branch_entry_offsets": np.cumsum([0, *map(len, rows)]).astype("<i8"),
        "branch_entry_ids": np.array([token for token, _ in entries], "<u4"),
        "branch_entry_logprobs": np.log([p for _, p in entries] or [1.0])[: len(entries)].astype(
            "<f4"
        ),
        "branch_tail_mass": np.array([1.0 - sum(p for _, p in row) for row in rows], "<f4"),
    }


@dataclass(frozen=True, repr=False)
class Case:
    """A shard in both tokenizers."""

    tables: Tables
    arrays: Arrays
    contents: list[bytes]
    target: list[EncodedSegment]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis: the arrays would fill pages."""
        printer.text(f"Case of {self.contents}")

    def aligned(self, max_entries: int = ALL) -> Arrays:
        result = project(
            self.arrays, self.contents, self.target, self.tables.mapping, max_entries=max_entries
        )
        size = len(self.tables.target)
        check_shard("aligned", result, vocab_size=size, where="test")
        return result

    def expected(self) -> list[AlignedSegment]:
        return reference(self.tables, self.arrays, self.contents, self.target)

    def unrounded(self) -> tuple[list[dict[int, float]], list[float], list[int]]:
        """Entries, label mass and origin of every position before they are rounded to float32."""
        real = projection.project_segments
        with mock.patch.object(projection, "project_segments", wraps=real) as watched:
            kept: list[Any] = []
            watched.side_effect = lambda *arguments: kept.append(real(*arguments)) or kept[0]
            self.aligned()
        offsets, ids, mass, origin, label = kept[0]
        rows = [
            dict(zip(ids[first:stop].tolist(), mass[first:stop].tolist(), strict=True))
            for first, stop in itertools.pairwise(offsets.tolist())
        ]
        return rows, label.tolist(), origin.tolist()


def make_case(
    source: tuple[str, int], target: tuple[str, int], chosen: Sequence[str], seed: int,
    *, bos: bool = True, unknown: float = 0.0, look_ahead: bool = True, branched: bool = False,
) -> Case:  # fmt: skip
    a, b = tokenizer(*source), tokenizer(*target)
    contents = [text.encode() for text in chosen]
    arrays = agreeing_rows(
        a.encode(segments(list(chosen))), a.vocabulary, contents, seed, bos=bos, unknown=unknown
    )
    if branched:
        arrays = with_branches(arrays, a.vocabulary, contents, seed)
        check_shard("branched", arrays, vocab_size=len(a.vocabulary), where="test")
    tables = pair(source, target, look_ahead=look_ahead)
    return Case(tables, arrays, contents, b.encode(segments(list(chosen))))


kinds = st.tuples(st.sampled_from(KINDS), st.integers(0, SEEDS - 1))
cases = st.builds(
    make_case,
    kinds,
    kinds,
    st.lists(texts, min_size=1, max_size=3),
    st.integers(0, 10**6),
    bos=st.booleans(),
    unknown=st.sampled_from([0.0, 0.0, 0.05]),
    look_ahead=st.booleans(),
    branched=st.booleans(),
)


def require_same(found: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    """The same masses; a token that one of them lacks has none."""
    tokens = sorted(found.keys() | expected.keys())
    ours = {token: found.get(token, 0.0) for token in tokens}
    theirs = {token: expected.get(token, 0.0) for token in tokens}
    assert ours == pytest.approx(theirs, rel=0, abs=tolerance)


def require_reference(case: Case) -> None:
    """The kernel gives the reference's mass to 1e-9, its origins, and so its tail."""
    rows, labels, origins = case.unrounded()
    positions = [p for segment in case.expected() for p in segment.positions]
    assert len(rows) == len(positions)
    tails = case.aligned()["tail_mass"].tolist()
    for j, position in enumerate(positions):
        require_same(rows[j], position.mass, 1e-9)
        if position.origin != Origin.NONE:
            assert labels[j] == pytest.approx(position.label, rel=1e-9, abs=1e-12), j
        assert origins[j] == position.origin, j
        assert tails[j] == pytest.approx(1.0 - sum(position.mass.values()), abs=1e-7), j


@settings(max_examples=120)
@given(cases)
def test_kernel_equals_the_plain_reference(case: Case) -> None:
    require_reference(case)


@settings(max_examples=40)
@given(cases, st.integers(1, 30))
def test_mass_is_conserved_and_what_is_kept_is_heaviest(case: Case, limit: int) -> None:
    whole, cut = case.aligned(), case.aligned(limit)
    for result in (whole, cut):
        mass = row_sums(np.exp(result["entry_logprobs"].astype(float)), result["entry_offsets"])
        assert np.abs(mass + result["tail_mass"] - 1).max() < 1e-6
    np.testing.assert_array_equal(whole["label_logprobs"], cut["label_logprobs"])
    labels = whole["token_ids"].tolist()
    for label, row, kept in zip(labels, masses(whole), masses(cut), strict=True):
        assert len(kept) == min(limit, len(row))
        assert kept.items() <= row.items()
        assert not row or label in kept
        out = max((m for token, m in row.items() if token not in kept), default=0.0)
        assert all(m >= out for token, m in kept.items() if token != label)


def real_weight(places: Places) -> float:
    return sum(w for place, w in places.items() if isinstance(place, Closed | Real))


def real_place(places: Places) -> Closed | Real | None:
    return next((place for place in places if isinstance(place, Closed | Real)), None)


def rows_read(place: Closed | Real) -> int:
    return place.row if isinstance(place, Closed) else place.row + 1


def log_counting(place: Closed | Real, rows: Sequence[Row]) -> float:
    """Logarithm of the share of a place's row that still counts: a row is cut down where the label
    before it could have gone on, and its weight is that of what is left."""
    cut = isinstance(place, Closed) and place.barred
    return math.log(rows[place.row].counting(place.barred)) if cut else 0.0


def known_runs(segment: AlignedSegment) -> Iterator[tuple[int, int, Places, Places]]:
    """Stretches of positions of which something is known: (first, stop, places before, after)."""
    befores = [p.before for p in segment.positions] + [segment.after]
    none = [p.origin == Origin.NONE for p in segment.positions] + [True]
    first = 0
    for j, ends in enumerate(none):
        if ends:
            if j > first:
                yield first, j, befores[first], befores[j]
            first = j + 1


def cut_down(seed: int) -> Case:
    """Nothing is known behind a place whose row only counts in part."""
    texts = ["        ", "12 123 1234 foo there"]
    return make_case(("metaspace_bpe", 0), ("byte_level", 0), texts, seed, unknown=0.05)


@settings(max_examples=60)
@given(cases)
@example(cut_down(1))
@example(cut_down(20))
def test_the_chain_rule(case: Case) -> None:
    """The labels' product, times the weight of the real path after the last of them, is the source's
    probability of its own tokens; what is left of the weight stays open (or lost) at the end, so the
    product alone is never below the source's. Exact in every stretch without a row that says nothing.
    """
    result = case.aligned()
    rows_from = case.arrays["token_offsets"].tolist()
    labels = result["label_logprobs"].astype(float)
    source = case.arrays["label_logprobs"].astype(float)
    of_segment = [
        source_rows(case.arrays, d, case.tables.source) for d in range(len(case.contents))
    ]
    for d, segment in enumerate(case.expected()):
        for first, stop, before, after in known_runs(segment):
            start, end = real_place(before), real_place(after)
            if start is None or end is None:
                continue
            positions = slice(*(result["token_offsets"][d] + [first, stop]))
            product = labels[positions].sum()
            rows = slice(rows_from[d] + rows_read(start), rows_from[d] + rows_read(end))
            own = math.log(real_weight(before)) + source[rows].sum()
            own += log_counting(end, of_segment[d]) - log_counting(start, of_segment[d])
            if math.isnan(own):  # the source was taken up again in between
                continue
            tolerance = 1e-6 * (1 + abs(own))  # labels are float32
            assert product + math.log(real_weight(after)) == pytest.approx(own, abs=tolerance)
            assert product >= own - tolerance


def test_the_chain_rule_is_tested_where_much_stays_open() -> None:
    """The test above must see real paths that share their weight, and ends that do not."""
    weights = []
    for seed in range(12):
        source, target = ("byte_level", seed % 3), ("unigram", (seed + 1) % 3)
        case = make_case(source, target, SAMPLES[seed % 3 : seed % 3 + 3], seed)
        for segment in case.expected():
            weights += [real_weight(p.before) for p in segment.positions]
    assert sum(w < 0.9 for w in weights) > 100
    assert sum(w > 0.999 for w in weights) > 100


def standing_rows(tables: Tables, arrays: Arrays) -> Arrays:
    """The same rows without entries that the target's tokenizer would not write as they stand."""
    keep = []
    own = tables.mapping.eos[0]
    offsets = arrays["entry_offsets"].tolist()
    starts = set(arrays["token_offsets"].tolist())
    for i, (first, stop) in enumerate(itertools.pairwise(offsets)):
        label = int(arrays["token_ids"][i])
        marked = i in starts and len(tables.source.tokens[label]) == arrays["byte_ends"][i] + 1
        for token in arrays["entry_ids"][first:stop].tolist():
            written = tables.source.tokens[token]
            at = int(marked and written.startswith(b" "))
            goes = tables.start if i in starts else tables.middle
            stands = token in (own, label) or (len(written) > at and goes(token, at) == token)
            keep.append(stands)
    kept = np.array(keep, bool)
    counts = np.concatenate(([0], np.cumsum(kept)))[arrays["entry_offsets"]]
    changed = {
        "entry_offsets": counts.astype("<i8"),
        "entry_ids": arrays["entry_ids"][kept],
        "entry_logprobs": arrays["entry_logprobs"][kept],
    }
    mass = row_sums(np.exp(changed["entry_logprobs"].astype(float)), changed["entry_offsets"])
    return arrays | changed | {"tail_mass": np.clip(1 - mass, 0, 1).astype("<f4")}


@settings(max_examples=30)
@given(
    kinds,
    st.lists(texts, min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_the_same_tokenizer_gives_the_same_distributions(kind, chosen, seed, bos, ahead) -> None:
    """Of tokens that the tokenizer writes as they stand; others go where it would go on."""
    a = tokenizer(*kind)
    encoded = a.encode(segments(chosen))
    contents = [text.encode() for text in chosen]
    table = piece_table(a.vocabulary, a)
    counts = PairCounts(a.vocab_size, a.vocab_size)
    going = counts.continuation(first_tokens(table), 1.0)
    eos, lengths = (a.eos_id, a.eos_id), a.vocabulary.lengths
    tail = tail_tokens(counts.distinct, lengths, lengths, 5)
    mapping = vocabulary_map(table, going, a.vocabulary, eos=eos, look_ahead=ahead, tail=tail)
    tables = Tables(a.vocabulary, a.vocabulary, mapping)
    written = {token for segment in encoded for token in segment.token_ids.tolist()}
    if any(tables.continuations(v) != [(v, 1.0)] for v in written):
        # A token that stands only where the text forces it: looking ahead would ask after it.
        mapping = mapping._replace(look_ahead=False)
        tables = Tables(a.vocabulary, a.vocabulary, mapping)
    made = agreeing_rows(encoded, a.vocabulary, contents, seed, bos=bos)
    arrays = standing_rows(tables, made)
    result = Case(tables, arrays, contents, encoded).aligned()
    rows = masses(arrays)
    labels = np.exp(arrays["label_logprobs"].astype(float)).tolist()
    for row, token, real in zip(rows, arrays["token_ids"].tolist(), labels, strict=True):
        if real == real:
            row.pop(token, None)
            left = max(1.0 - real, 0.0)
            scale = min(1.0, left / total) if (total := sum(row.values())) > 0 else 1.0
            row.update({v: p * scale for v, p in row.items()})
            row[token] = real
    for found, row in zip(masses(result), rows, strict=True):
        require_same(found, row, 1e-6)
    np.testing.assert_allclose(result["label_logprobs"], arrays["label_logprobs"], atol=1e-6)
    known = ~np.isnan(arrays["label_logprobs"])
    np.testing.assert_array_equal(result["origin"] == Origin.BOUNDARY, known)


def one_segment(arrays: Arrays, d: int) -> Arrays:
    rows = slice(*arrays["token_offsets"][d : d + 2].tolist())
    entries = slice(*arrays["entry_offsets"][[rows.start, rows.stop]].tolist())
    found: Arrays = {
        "segment_ids": arrays["segment_ids"][d : d + 1],
        "token_offsets": arrays["token_offsets"][d : d + 2] - rows.start,
        "token_ids": arrays["token_ids"][rows],
        "byte_ends": arrays["byte_ends"][rows],
        "entry_offsets": arrays["entry_offsets"][rows.start : rows.stop + 1] - entries.start,
        "entry_ids": arrays["entry_ids"][entries],
        "entry_logprobs": arrays["entry_logprobs"][entries],
        "tail_mass": arrays["tail_mass"][rows],
        "label_logprobs": arrays["label_logprobs"][rows],
    }
    if "branch_tokens" not in arrays:
        return found
    places = arrays["branch_positions"]
    here = slice(*np.searchsorted(places, [rows.start, rows.stop]).tolist())
    after = slice(*arrays["branch_entry_offsets"][[here.start, here.stop]].tolist())
    return found | {
        "branch_positions": (places[here] - rows.start).astype("<u4"),
        "branch_tokens": arrays["branch_tokens"][here],
        "branch_entry_offsets": arrays["branch_entry_offsets"][here.start : here.stop + 1]
        - after.start,
        "branch_entry_ids": arrays["branch_entry_ids"][after],
        "branch_entry_logprobs": arrays["branch_entry_logprobs"][after],
        "branch_tail_mass": arrays["branch_tail_mass"][here],
    }


@settings(max_examples=25)
@given(cases, st.integers(1, 40), st.randoms(use_true_random=False))
def test_alignment_does_not_depend_on_how_segments_are_assigned(case: Case, limit, random) -> None:
    """Together, alone and in another order: the same bits."""
    whole = case.aligned(limit)
    order = list(range(len(case.contents)))
    random.shuffle(order)
    for d in order:
        part = Case(
            case.tables, one_segment(case.arrays, d), [case.contents[d]], [case.target[d]]
        ).aligned(limit)
        rows = slice(*whole["token_offsets"][d : d + 2].tolist())
        entries = slice(*whole["entry_offsets"][[rows.start, rows.stop]].tolist())
        spans = slice(*whole["span_offsets"][d : d + 2].tolist())
        for name in (
            "token_ids",
            "byte_ends",
            "tail_mass",
            "label_logprobs",
            "origin",
            "span_index",
        ):
            np.testing.assert_array_equal(part[name], whole[name][rows], err_msg=name)
        for name in ("entry_ids", "entry_logprobs"):
            np.testing.assert_array_equal(part[name], whole[name][entries], err_msg=name)
        for name in ("span_byte_ends", "span_logprobs"):
            np.testing.assert_array_equal(part[name], whole[name][spans], err_msg=name)
        for name in ("source_nats", "source_bytes"):
            np.testing.assert_array_equal(part[name], whole[name][d : d + 1], err_msg=name)


def spans_of(arrays: Arrays, d: int) -> dict[tuple[int, int], int]:
    """Positions of a segment by the bytes [begin, end) of their tokens."""
    first, stop = arrays["token_offsets"][d : d + 2].tolist()
    ends = arrays["byte_ends"][first:stop].tolist()
    return {(b, e): first + i for i, (b, e) in enumerate(zip([0, *ends], ends, strict=False))}


def converted(tables: Tables, mass: dict[int, float], without: int = -1) -> dict[int, float]:
    """Masses of whole source tokens in the target's, apart from what goes to `without`."""
    found: dict[int, float] = {}
    own, other = tables.mapping.eos
    for v, p in mass.items():
        goes = tables.continuations(v) if tables.source.tokens[v] else []
        for n, (y, weight) in enumerate([(other, 1.0)] if v == own and other >= 0 else goes):
            if y != without and (n == 0 or p * weight >= LEAST_SPREAD):
                found[y] = found.get(y, 0.0) + p * weight
    return found


def only_closed(places: Places) -> bool:
    return len(places) == 1 and all(isinstance(p, Closed) and not p.barred for p in places)


def there_and_back(case: Case, back: Case) -> tuple[int, int]:
    """Check the clean positions; numbers of entries that came back alone, and with company."""
    ab, ba, result = case.tables, back.tables, masses(back.aligned())
    clean_ab = [only_closed(p.before) for s in case.expected() for p in s.positions]
    clean_ba = [only_closed(p.before) for s in back.expected() for p in s.positions]
    rows, alone, met = masses(case.arrays), 0, 0
    for d in range(len(case.contents)):
        own, other = spans_of(case.arrays, d), spans_of(back.arrays, d)
        for span in sorted(own.keys() & other.keys()):
            i, j = own[span], other[span]
            if span[0] == 0 or span[0] == span[1] or not (clean_ab[j] and clean_ba[i]):
                continue
            t, y = int(case.arrays["token_ids"][i]), int(back.arrays["token_ids"][j])
            real = math.exp(float(case.arrays["label_logprobs"][i]))
            row = {v: p for v, p in rows[i].items() if v != t}
            room = min(1.0, max(1.0 - real, 0.0) / max(sum(row.values()), 1e-30))
            row = {v: p * room for v, p in row.items()}
            expected = converted(ba, converted(ab, row, without=y))
            expected[t] = expected.get(t, 0.0) + real + converted(ab, row).get(y, 0.0)
            require_same(result[i], expected, 2e-6)
            for v, p in row.items():
                there = converted(ab, {v: 1.0})
                if len(there) != 1 or y in there or converted(ba, there) != {v: 1.0}:
                    continue
                company = {u: m for u, m in row.items() if u != v}
                if v in converted(ba, converted(ab, company, without=y)):
                    met += 1
                    assert result[i].get(v, 0.0) >= p - 2e-6
                else:
                    alone += 1
                    assert result[i].get(v, 0.0) == pytest.approx(p, abs=2e-6)
    return alone, met


def test_there_and_back_gives_what_survives() -> None:
    """A to B to A, at positions where both have a token on the same bytes and in both directions the
    source can stand nowhere else (closed, weight 1), not at a text's start.

    There an entry comes back through the product of the two continuation tables, apart from what goes
    to B's label, which comes back as A's label. So a token that is one token on both sides (all its
    weight goes to one B token other than the label, all of whose weight comes back) has its own mass
    exactly where no other entry goes the same way, and at least that where one does. The tail stays
    tail here.
    """

    def listed_only(tables: Tables) -> Tables:
        none = no_tail_tokens(len(tables.source), len(tables.target))
        return replace(tables, mapping=tables.mapping._replace(tail=none))

    alone = met = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        first, second = ((str(rng.choice(KINDS)), int(rng.integers(SEEDS))) for _ in range(2))
        chosen = SAMPLES[seed % 3 :: 3]
        case = make_case(first, second, chosen, seed, look_ahead=False)
        case = replace(case, tables=listed_only(case.tables))
        target = tokenizer(*first).encode(segments(chosen))
        tables = listed_only(pair(second, first, look_ahead=False))
        found = there_and_back(case, Case(tables, case.aligned(), case.contents, target))
        alone, met = alone + found[0], met + found[1]
    assert alone > 50
    assert met > 50


LETTERS = st.sampled_from([b"a", b"b", b"ab", b"ba", b"aa", b"bb", b"aba", b"bab", b"abb", b"bba"])
"""Source tokens of the tiny world."""
PREFIX_FREE = (
    (b"a", b"b"),
    (b"aa", b"ab", b"b"),
    (b"aa", b"ab", b"ba", b"bb"),
    (b"a", b"ba", b"bb"),
    (b"aaa", b"aab", b"ab", b"b"),
    (b"a", b"bb", b"baa", b"bab"),
)
"""Targets whose next token is known as soon as its bytes are."""


@dataclass(frozen=True)
class Markov:
    """A source that draws each token given the last (row 0: at the start), the last column ends."""

    tokens: tuple[bytes, ...]
    table: np.ndarray

    @classmethod
    def draw(cls, tokens: tuple[bytes, ...], rng: np.random.Generator) -> Markov:
        flat = np.full(len(tokens) + 1, rng.choice([0.2, 1.0, 5.0]))
        return cls(tokens, rng.dirichlet(flat, len(tokens) + 1).clip(1e-6))

    def row(self, last: int) -> np.ndarray:
        """[V+1] what follows a token (-1: at the start)."""
        row = self.table[last + 1]
        return row / row.sum()

    def begins(self, text: bytes, last: int = -1, *, ended: bool = False) -> float:
        """Probability that all that follows begins with `text`, summed over every way to write it;
        `ended`: that it is all."""
        row = self.row(last)
        if not text:
            return float(row[-1]) if ended else 1.0
        total = 0.0
        for v, token in enumerate(self.tokens):
            if text.startswith(token):
                total += row[v] * self.begins(text[len(token) :], v, ended=ended)
            elif token.startswith(text) and not ended:
                total += row[v]
        return float(total)

    def sample(self, rng: np.random.Generator, length: int) -> list[int]:
        """Tokens, at least one."""
        drawn, size = [], 0
        while size < length:
            row = self.row(drawn[-1] if drawn else -1)[:-1]
            drawn.append(int(rng.choice(len(row), p=row / row.sum())))
            size += len(self.tokens[drawn[-1]])
        return drawn


def split(text: bytes, target: Sequence[bytes]) -> list[int]:
    """The longest token each time, as far as the text goes."""
    ids, at = [], 0
    order = sorted(range(len(target)), key=lambda y: -len(target[y]))
    while at < len(text):
        y = next((y for y in order if text.startswith(target[y], at)), None)
        if y is None:
            break
        ids.append(y)
        at += len(target[y])
    return ids


@dataclass(frozen=True)
class World:
    """A Markov source, a target, and a text of the source's own."""

    source: Markov
    target: tuple[bytes, ...]
    drawn: list[int]

    @property
    def text(self) -> bytes:
        return b"".join(self.source.tokens[v] for v in self.drawn)

    def aligned(self, weights: Any = None, *, look_ahead: bool = True) -> tuple[Arrays, list[int]]:
        """Every entry is stored, so what is in the tail is what the method cannot know."""
        source = vocabulary(*self.source.tokens, b"</s>", special=[len(self.source.tokens)])
        eos = (len(self.source.tokens), len(self.target))
        there = vocabulary(*self.target, b"</s>", special=[len(self.target)])
        tables = hand_tables(source, there, weights, eos=eos, look_ahead=look_ahead)
        lasts = [-1, *self.drawn[:-1]]
        rows = [dict(enumerate(self.source.row(v).tolist())) for v in lasts]
        arrays = hand_arrays(self.drawn, hand_segment(self.drawn, source).byte_ends.tolist(), rows)
        target = split(self.text, self.target)
        encoded = hand_segment(target, there)
        result = project(arrays, [self.text], [encoded], tables.mapping, max_entries=ALL)
        return result, target


@st.composite
def worlds(draw: Any, targets: Any) -> World:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    extra = draw(st.lists(LETTERS, min_size=2, max_size=5, unique=True))
    source = Markov.draw(tuple(dict.fromkeys([b"a", b"b", *extra])), rng)
    target = draw(targets)
    for _ in range(20):
        drawn = source.sample(rng, int(rng.integers(2, 9)))
        text = b"".join(source.tokens[v] for v in drawn)
        if b"".join(target[y] for y in split(text, target)) == text:
            return World(source, target, drawn)
    assume(False)
    raise AssertionError


def next_token_law(world: World) -> dict[int, dict[int, float]]:
    """The true P(target token | the source has just written v from here), for prefix-free targets.

    What v leaves open is settled by the source's law after v; a text that ends first has none.
    """
    law = {}
    for v, token in enumerate(world.source.tokens):
        law[v] = {}
        for y, written in enumerate(world.target):
            if token.startswith(written):
                law[v][y] = 1.0
            elif written.startswith(token):
                law[v][y] = world.source.begins(written[len(token) :], v)
    return law


@settings(max_examples=80)
@given(worlds(st.sampled_from(PREFIX_FREE)))
def test_against_the_truth_where_the_target_needs_no_look_ahead(world: World) -> None:
    """Every way of writing a text summed, for any source and prefix-free targets.

    No target token begins another, so "the target's tokens so far" says exactly "the bytes so far",
    and truth is P(y' | y_<j) = P(text begins with y_<j y') / P(text begins with y_<j). The
    continuation weights are the source's own law. G_j is the product of the labels' probabilities
    before j: the probability, as the method has it, of the tokens so far.

    Exact: the whole segment (G times the weight of the real path is the source's probability of its
    tokens); and every entry, and EOS, as long as nothing has gone to the tail.
    Never too much: G_j * entry_j(y') <= P(text begins with y_<j y'), for the label too. What is missing
    was tail at j or before (lost hypotheses, and what known bytes do not settle): it is at most the
    sum of G_i * tail_i, i <= j.
    Not a bound: an entry by itself. When lost mass is dropped at j the rest is divided by less than the
    truth, so later conditionals may lie above it; the joint probabilities above never do.
    """
    result, target = world.aligned(next_token_law(world))
    eos = len(world.target)
    joint, gone, read = 1.0, 0.0, b""
    tails = result["tail_mass"].astype(float).tolist()
    labels = np.exp(result["label_logprobs"].astype(float)).tolist()
    for row, label, real, tail in zip(masses(result), target, labels, tails, strict=True):
        gone += joint * tail
        for y, written in [*enumerate(world.target), (eos, b"")]:
            true = world.source.begins(read + written, ended=y == eos)
            found = joint * row.get(y, 0.0)
            assert found <= true + 1e-6, (read, written)
            assert found >= true - gone - 1e-6, (read, written)
            if gone < 1e-9:
                assert found == pytest.approx(true, abs=1e-6)
        read += world.target[label]
        joint *= real
        assert joint <= world.source.begins(read) + 1e-6


def test_the_truth_is_met_exactly_where_the_source_has_one_way_to_write() -> None:
    """Prefix-free on both sides: nothing is ever lost, and nearly nothing is tail."""
    rng = np.random.default_rng(0)
    for target in PREFIX_FREE:
        for source_tokens in PREFIX_FREE:
            source = Markov.draw(source_tokens, rng)
            for _ in range(5):
                drawn = source.sample(rng, 6)
                world = World(source, target, drawn)
                if b"".join(target[y] for y in split(world.text, target)) != world.text:
                    continue
                result, ids = world.aligned(next_token_law(world))
                read = b""
                for row, label in zip(masses(result), ids, strict=True):
                    before = source.begins(read)
                    read += target[label]
                    true = source.begins(read) / before
                    if result["tail_mass"].max() < 1e-6:
                        assert row[label] == pytest.approx(true, abs=1e-5)


MERGING = (
    (b"a", b"b", b"ab"),
    (b"a", b"b", b"ab", b"ba", b"aba"),
    (b"a", b"b", b"aa", b"bb", b"abb"),
)
"""Targets that take their longest token: which one it is may hang on the text to come."""


@settings(max_examples=50)
@given(worlds(st.sampled_from(MERGING)), st.booleans())
def test_the_whole_text_is_exact_for_any_target(world: World, look_ahead: bool) -> None:
    """Where the target must look ahead single positions are estimates, but the segment is exact: the
    labels' product times the weight of the real path (1 or less) is the source's probability of its
    tokens, which is the probability of the text where the source has one way to write it."""
    result, _ = world.aligned(look_ahead=look_ahead)
    own = sum(
        math.log(world.source.row(last)[v])
        for last, v in zip([-1, *world.drawn[:-1]], world.drawn, strict=True)
    )
    assert result["label_logprobs"].astype(float).sum() >= own - 1e-5
    mass = row_sums(np.exp(result["entry_logprobs"].astype(float)), result["entry_offsets"])
    assert np.abs(mass + result["tail_mass"] - 1).max() < 1e-6


ODD_BYTES = [
    b"\xff",
    b"\x80",
    b"\xe6",
    b"\xe6\xbc",
    b"\xe6\xbc\xa2",
    b" ",
    b"a",
    b"b",
    b"\x00",
    b"\n",
]


def odd_case(seed: int, size: int) -> Case:
    """Vocabularies by hand: duplicates, tokens without bytes, huge ones, high ids, no UTF-8."""
    rng = np.random.default_rng(seed)
    parts = rng.choice(len(ODD_BYTES), 4, replace=False)
    alphabet = [ODD_BYTES[i] for i in parts]
    source, target = _odd_vocabulary(alphabet, size, rng), _odd_vocabulary(alphabet, size, rng)
    text = b"".join(alphabet[i] for i in rng.integers(0, 4, rng.integers(1, 40)))
    if rng.random() < 0.3:
        text += alphabet[0] * 200
    weights = _agreeing_weights(source, target, rng)
    eos = (int(rng.integers(-1, size)), int(rng.integers(-1, size)))
    if eos[0] >= 0 and source.tokens[eos[0]]:
        eos = (-1, eos[1])
    tables = hand_tables(source, target, weights, eos=eos, look_ahead=bool(rng.random() < 0.5))
    own = _any_split(text, source, rng)
    arrays = agreeing_rows([own], source, [text], int(rng.integers(10**6)), unknown=0.05)
    return Case(tables, arrays, [text], [_any_split(text, target, rng)])


def _odd_vocabulary(alphabet: Sequence[bytes], size: int, rng: np.random.Generator) -> Vocabulary:
    written = [b""] * size
    made = [*alphabet, alphabet[0] * 200, b" " + alphabet[0]]
    made += [
        b"".join(alphabet[i] for i in rng.integers(0, 4, rng.integers(2, 5))) for _ in range(12)
    ]
    made += made[:6]  # the same bytes twice
    for index, token in zip(rng.choice(size, len(made), replace=False), made, strict=True):
        written[index] = token
    return vocabulary(*written, special=[])


def _any_split(text: bytes, chosen: Vocabulary, rng: np.random.Generator) -> EncodedSegment:
    """Some tokens that join to the text, not always the longest."""
    filled = [int(v) for v in np.flatnonzero(chosen.lengths)]
    ids, at = [], 0
    while at < len(text):
        fits = [v for v in filled if text.startswith(chosen.tokens[v], at)]
        sure = [v for v in fits if _can_go_on(text, at + len(chosen.tokens[v]), chosen, filled)]
        ids.append(int(rng.choice(sure)))
        at += len(chosen.tokens[ids[-1]])
    return hand_segment(ids, chosen)


def _can_go_on(text: bytes, at: int, chosen: Vocabulary, filled: Sequence[int]) -> bool:
    """Parts of the alphabet begin each other, so not every split can be finished."""
    reached = {at}
    for place in range(at, len(text)):
        if place in reached:
            reached |= {
                place + len(chosen.tokens[v])
                for v in filled
                if text.startswith(chosen.tokens[v], place)
            }
    return len(text) in reached


def _agreeing_weights(
    source: Vocabulary, target: Vocabulary, rng: np.random.Generator
) -> dict[int, dict[int, float]]:
    """Random weights of source tokens on target tokens that begin them or that they begin."""
    weights = {}
    filled = [int(y) for y in np.flatnonzero(target.lengths)]
    for v in np.flatnonzero(source.lengths).tolist():
        token = source.tokens[v]
        agree = [
            y
            for y in filled
            if token.startswith(target.tokens[y]) or target.tokens[y].startswith(token)
        ]
        mass = rng.dirichlet(np.ones(len(agree) + 1))
        falling = np.sort(mass[1:])[::-1].tolist()
        weights[v] = dict(zip(agree, falling, strict=True))
    return weights


def require_odd(case: Case) -> None:
    require_reference(case)
    result = case.aligned(3)
    mass = row_sums(np.exp(result["entry_logprobs"].astype(float)), result["entry_offsets"])
    assert np.abs(mass + result["tail_mass"] - 1).max() < 1e-6


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([40, 300]))
def test_odd_byte_tables(seed: int, size: int) -> None:
    require_odd(odd_case(seed, size))


@pytest.mark.parametrize("seed", range(3))
def test_ids_beyond_17_bits(seed: int) -> None:
    case = odd_case(seed, 2**17 + 40)
    assert case.arrays["entry_ids"].max() > 2**16
    require_odd(case)


def test_a_label_over_very_many_source_tokens_keeps_every_place() -> None:
    """100 source tokens of one byte under one label, all of whose rows have longer entries."""
    source = vocabulary(*(b"a" * n for n in range(1, 130)), b"b")
    target = vocabulary(b"a" * 100, b"a", b"b", b"aa")
    tables = hand_tables(source, target)
    rows = [{0: 0.97} | dict.fromkeys(range(1, 129), 0.03 / 128)] * 101
    rows[100] = {0: 0.25, 129: 0.75}
    arrays = hand_arrays([0] * 100 + [129], [*range(1, 101), 101], rows)
    case = Case(tables, arrays, [b"a" * 100 + b"b"], [hand_segment([0, 2], target)])
    places = sum(isinstance(place, Open) for place in case.expected()[0].positions[1].before)
    assert places > 60
    require_reference(case)
