"""Method ot: the shares are the plan that iterating gives, and the cheapest; the carrying uses them."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.papers.carry import CarryOptions
from align.papers.mined import MinedAligner
from align.papers.mined_vocabulary import NearestTokens, nearest_tokens, written_tokens
from align.papers.transport import NUM_CANDIDATES, TransportAligner, transport_shares
from store_schema.layout import check_shard, row_sums
from store_schema.text.tokenizer import SegmentTokenizer
from tests import papers_reference
from tests.random_source import random_source, segments
from tests.tiny import SAMPLE_TEXTS, tiny_tokenizer

KINDS = ["byte_level", "unigram", "metaspace_bpe"]
PAIRS = list(itertools.product(KINDS, KINDS))
SAMPLES = [text for texts in SAMPLE_TEXTS.values() for text in texts]


@cache
def tokenizer(kind: str, seed: int = 0) -> SegmentTokenizer:
    size = {"byte_level": 380, "unigram": 430, "metaspace_bpe": 460}[kind] + 40 * seed
    return SegmentTokenizer(tiny_tokenizer(kind, SAMPLES[:: 1 + seed], size), name=kind)


@cache
def nearest(source: str, target: str) -> NearestTokens:
    there = tokenizer(target, 1)
    return nearest_tokens(
        tokenizer(source).vocabulary, there.vocabulary,
        count=NUM_CANDIDATES, written=written_tokens(there),
    )  # fmt: skip


def costs(source: str, target: str, tokens: list[int]) -> np.ndarray:
    """[K, T] normalised edit distances where an entry may go, else inf; T target tokens."""
    a, b = tokenizer(source).vocabulary.tokens, tokenizer(target, 1).vocabulary.tokens
    found = nearest(source, target)
    costs_KT = np.full((len(tokens), len(b)), np.inf)
    for k, token in enumerate(tokens):
        for goal in found.ids[token][found.ids[token] >= 0].tolist():
            longer = max(len(a[token]), len(b[goal]), 1)
            costs_KT[k, goal] = papers_reference.edit_distance(a[token], b[goal]) / longer
    return costs_KT


@pytest.mark.parametrize(("source", "target"), [p for p in PAIRS if p[0] != p[1]])
@given(seed=st.integers(0, 999), strength=st.sampled_from([0.03, 0.1, 1.0]))
def test_the_shares_are_sinkhorns_plan(
    source: str, target: str, seed: int, strength: float
) -> None:
    found = nearest(source, target)
    rng = np.random.default_rng(seed)
    tokens = rng.choice(np.flatnonzero(found.ids[:, 0] >= 0), 8, replace=False).tolist()
    masses = rng.dirichlet(np.ones(8)) * 0.9 + 1e-6
    costs_KT = costs(source, target, tokens)
    reached = np.isfinite(costs_KT).any(axis=0)
    plan_KT = papers_reference.sinkhorn(masses, costs_KT[:, reached], strength, hold=0.0, steps=5)
    a, b = tokenizer(source).vocabulary, tokenizer(target, 1).vocabulary
    shares = transport_shares(found, a, b, strength)
    ours_KT = np.zeros_like(costs_KT)
    for k, token in enumerate(tokens):
        some = found.ids[token] >= 0
        ours_KT[k, found.ids[token][some]] = masses[k] * shares[token][some]
    np.testing.assert_allclose(ours_KT[:, reached], plan_KT, atol=1e-12)
    np.testing.assert_allclose(ours_KT.sum(axis=1), masses, atol=1e-12)


def test_no_other_plan_is_cheaper() -> None:
    found = nearest("byte_level", "unigram")
    a, b = tokenizer("byte_level").vocabulary, tokenizer("unigram", 1).vocabulary
    spread = np.flatnonzero((found.ids >= 0).sum(axis=1) == NUM_CANDIDATES)[:20]
    shares = transport_shares(found, a, b, 0.1)[spread]
    lengths = np.maximum(a.lengths[spread][:, None], b.lengths[found.ids[spread]])
    relative = found.distances[spread] / lengths

    def price(plan: np.ndarray) -> np.ndarray:
        return (plan * relative + 0.1 * plan * np.log(plan)).sum(axis=1)

    rng = np.random.default_rng(0)
    for _ in range(200):
        other = 0.9 * shares + 0.1 * rng.dirichlet(np.ones(NUM_CANDIDATES), len(spread))
        assert (price(other) >= price(shares) - 1e-12).all()
    assert shares.max() < 1  # there is something to spread


def test_a_target_marginal_held_changes_the_plan() -> None:
    """So that leaving it free is a choice: held to uniform, mass leaves where it should go."""
    costs_KT = np.array([[0.1, 0.5], [0.1, 0.5]])
    masses = np.array([0.6, 0.3])
    free = papers_reference.sinkhorn(masses, costs_KT, 0.1, hold=0.0)
    held = papers_reference.sinkhorn(masses, costs_KT, 0.1, hold=10.0)
    assert free[:, 1].sum() < 0.05
    assert held[:, 1].sum() > 0.3


@pytest.mark.parametrize(("source", "target"), PAIRS)
@given(seed=st.integers(0, 99), limit=st.sampled_from([3, 1000]))
def test_aligned_shards_equal_the_plain_reading(source, target, seed, limit) -> None:
    a, b = tokenizer(source), tokenizer(target, 1)
    chosen = SAMPLES[:2]
    arrays = random_source(a.encode(segments(chosen)), a.vocab_size, seed)
    encoded, raw = b.encode(segments(chosen)), [text.encode() for text in chosen]
    found = nearest(source, target)
    aligner = TransportAligner.of(
        found, a.vocabulary, b.vocabulary, options=CarryOptions(max_entries=limit)
    )
    result = aligner.align(arrays, raw, encoded)
    check_shard("aligned", result, vocab_size=b.vocab_size, where="test")
    mass = row_sums(np.exp(result["entry_logprobs"].astype(float)), result["entry_offsets"])
    assert np.abs(mass + result["tail_mass"] - 1).max() < 1e-6
    if limit < 1000:
        return
    spread = {
        token: {
            int(goal): float(share)
            for goal, share in zip(found.ids[token], aligner.shares[token], strict=True)
            if goal >= 0
        }
        for token in range(a.vocab_size)
    }
    for d, text in enumerate(raw):
        first = result["token_offsets"][d]
        for j, known in enumerate(papers_reference.carried(arrays, d, text, encoded[d], spread)):
            entries = slice(*result["entry_offsets"][first + j : first + j + 2])
            masses = np.exp(result["entry_logprobs"][entries].astype(float)).tolist()
            ours = dict(zip(result["entry_ids"][entries].tolist(), masses, strict=True))
            assert ours == pytest.approx(known.masses, abs=2e-6)


def test_without_entropy_it_is_the_nearest_token() -> None:
    """eps to 0: the plan of method mined, where relative and absolute nearness agree."""
    a, b = tokenizer("unigram"), tokenizer("byte_level", 1)
    found = nearest("unigram", "byte_level")
    first = NearestTokens(found.ids[:, :1].copy(), found.distances[:, :1].copy())
    arrays = random_source(a.encode(segments(SAMPLES)), a.vocab_size, 0)
    encoded, raw = b.encode(segments(SAMPLES)), [text.encode() for text in SAMPLES]
    ours = TransportAligner.of(first, a.vocabulary, b.vocabulary).align(arrays, raw, encoded)
    theirs = MinedAligner(found.token_map, b.vocab_size).align(arrays, raw, encoded)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
