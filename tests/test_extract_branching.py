"""Which entries get a branch: within the budget, the largest gains, by counts that are a plain sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from extract.branch_config import BranchOptions
from extract.branching.choice import chances, choose_branches
from extract.branching.past_ends import PRIOR, past_ends
from extract.config import ExtractSection
from store_schema.layout import Arrays
from store_schema.text.encoded import EncodedSegment
from tests import store_factory
from tests.align_reference import vocabulary

VOCAB = 500

shards = st.builds(
    lambda rows, seed: store_factory.arrays("source", rows, vocab_size=VOCAB, seed=seed),
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.integers(0, 10_000),
)
budgets = st.builds(
    BranchOptions, per_position=st.floats(0.01, 4.0), min_mass=st.sampled_from([1e-6, 0.05, 0.4])
)


def chance_of(arrays: Arrays, seed: int) -> Any:
    """Some are 0, many are equal."""
    return np.random.default_rng(seed).choice([0.0, 0.25, 0.5, 1.0], len(arrays["entry_ids"]))


@given(shards, budgets, st.integers(0, 1000))
def test_the_largest_gains_within_the_budget(
    arrays: Arrays, options: BranchOptions, seed: int
) -> None:
    arrays["token_ids"][::3] = arrays["entry_ids"][:1] if len(arrays["entry_ids"]) else 0
    chance_E = chance_of(arrays, seed)
    chosen = choose_branches(arrays, chance_E, options).tolist()
    num_positions = len(arrays["token_ids"])
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= options.per_position * num_positions
    rows = np.repeat(np.arange(num_positions), np.diff(arrays["entry_offsets"]))
    masses = np.exp(arrays["entry_logprobs"].astype(float))
    able = [
        e
        for e in range(len(masses))
        if masses[e] >= options.min_mass
        and chance_E[e] > 0
        and arrays["entry_ids"][e] != arrays["token_ids"][rows[e]]
    ]
    assert set(chosen) <= set(able)
    left = [masses[e] * chance_E[e] for e in able if e not in set(chosen)]
    least = min((masses[e] * chance_E[e] for e in chosen), default=np.inf)
    if left:
        assert max(left) <= least
        assert len(chosen) == int(options.per_position * num_positions)


def test_the_text_may_go_on_from_an_entry() -> None:
    """ "in" and "int" are ahead of "intern" + "al"; "internal" is the whole text, " in" none of it."""
    tokens = vocabulary(b"intern", b"al", b"in", b"int", b"internal", b" in", b"</s>", special=[6])
    arrays: Arrays = {
        "token_offsets": np.array([0, 2, 3]),
        "token_ids": np.array([0, 1, 0], "<u4"),
        "entry_offsets": np.array([0, 6, 7, 8]),
        "entry_ids": np.array([0, 2, 3, 4, 5, 6, 1, 2], "<u4"),
    }
    chance_V = np.array([0.5, 0.5, 0.1, 0.2, 0.3, 0.4, 0.0])
    found = chances(arrays, chance_V, tokens).tolist()
    assert found == [1.0, 1.0, 1.0, 0.3, 0.4, 0.0, 0.5, 1.0]


def segment(ids: list[int], ends: list[int]) -> EncodedSegment:
    return EncodedSegment((), np.array(ids, np.uint32), np.array(ends, np.uint32))


def test_how_often_the_target_goes_on() -> None:
    source = segment([0, 1, 0, 2], [2, 4, 6, 8])
    target = segment([7, 8, 9], [4, 6, 8])  # across the first end alone; the last is the text's
    found = past_ends([(source, target)], np.array([2, 2, 2, 0]))
    share = 1 / 3
    expected = [(1 + PRIOR * share) / (2 + PRIOR), PRIOR * share / (1 + PRIOR), share, 0.0]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"branches": {"per_position": 0}}, "greater than 0"),
        ({"branches": {"min_mass": 1.0}}, "less than 1"),
        ({"branches": {"per_position": 5}, "top_k": 4}, "at most top_k: 4 entries"),
        ({"branches": {}, "estimator": "sampled"}, "not estimator sampled"),
        ({"branches": {}, "engine": "vllm"}, "branches need engine transformers"),
        ({"branches": {}, "quantization": "fp8"}, "quantization needs"),
    ],
)
def test_what_has_no_branches(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExtractSection(**values)


def test_branches_are_content_only_where_there_are_some() -> None:
    assert "branches" not in ExtractSection().content()
    section = ExtractSection(branches={})
    assert section.content()["branches"] == {"per_position": 0.3, "min_mass": 0.01}
    assert section.settled(on_cpu=False, fp32_head=True).engine == "transformers"
    assert section.loader == "transformers"
    assert section.answering().branches is None
