"""Votes, final answers and options of judges: what needs no model."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from extract.judge_kinds import JUDGES
from extract.judging.config import JudgeSection
from extract.judging.final_answers import (
    contains_answer,
    final_answer,
    same_answer,
    same_formula,
    stated_answer,
)
from extract.judging.votes import TIE, Scale, judge_votes, passing, settle, totals
from store_schema.config import parse_run
from store_schema.errors import ConfigError

VOTES = ("majority", "mean_rank", "mean_z")


def chosen(vote: Any, scores_JA: list[list[float | None]], likely: Any = None) -> tuple[int, str]:
    scales = [Scale.of([s for s in scores if s is not None] or [0.0]) for scores in scores_JA]
    votes = [judge_votes(vote, s, scale) for s, scale in zip(scores_JA, scales, strict=True)]
    number = len(scores_JA[0])
    return settle(totals(vote, votes), likely or [None] * number, range(number))


@pytest.mark.parametrize("vote", VOTES)
def test_one_judge_alone_decides(vote: Any) -> None:
    assert chosen(vote, [[1.0, 3.0, 2.0]]) == (1, "votes")


def test_votes_differ_where_judges_do() -> None:
    scores: list[list[float | None]] = [[9.0, 3.0, 2.0, 1.0]] * 2 + [[0.0, 3.0, 2.0, 1.0]]
    assert chosen("majority", scores) == (0, "votes")
    assert chosen("mean_rank", scores) == (1, "votes")
    assert chosen("mean_z", scores) == (0, "votes")
    scores = [[3.0, 2.9, 1.0], [3.0, 2.9, 1.0], [0.0, 90.0, 80.0]]
    assert chosen("majority", scores) == (0, "votes")
    assert chosen("mean_z", scores) == (1, "votes")


def test_a_vote_is_split_among_equals() -> None:
    scale = Scale.of([1.0, 0.0])
    assert judge_votes("majority", [1.0, 0.0, 1.0, None], scale) == [0.5, 0.0, 0.5, 0.0]
    assert judge_votes("mean_rank", [1.0, 0.0, 1.0, None], scale) == [1.5, 3.0, 1.5, 4.0]
    assert judge_votes("mean_z", [1.0, 0.0, None], scale) == [1.0, -1.0, -1.0]


@pytest.mark.parametrize("vote", VOTES)
def test_a_judge_without_scores_abstains(vote: Any) -> None:
    scale = Scale.of([1.0, 2.0])
    assert judge_votes(vote, [None, None], scale) == [None, None]
    assert chosen(vote, [[None, None], [1.0, 2.0]]) == (1, "votes")
    assert chosen(vote, [[None, None]]) == (0, "order")


@pytest.mark.parametrize("vote", VOTES)
def test_ties_go_to_the_likelier_then_to_the_earlier(vote: Any) -> None:
    scores: list[list[float | None]] = [[5.0, 1.0, 5.0], [1.0, 0.0, 1.0]]
    assert chosen(vote, scores, [-2.0, -0.1, -1.0]) == (2, "likelihood")
    assert chosen(vote, scores, [None, -0.1, -1.0]) == (0, "order")  # the first may be likelier
    assert chosen(vote, scores, [-2.0, None, -1.0]) == (2, "likelihood")  # it has not tied
    assert chosen(vote, scores, [-1.0, -0.1, -1.0]) == (0, "order")
    assert chosen(vote, scores) == (0, "order")


def test_sums_that_differ_by_rounding_tie() -> None:
    assert settle([0.3, 0.1 + 0.2], [-1.0, -2.0], (0, 1)) == (0, "likelihood")
    assert settle([0.3, 0.3 + 3 * TIE], [-1.0, -2.0], (0, 1)) == (1, "votes")


def test_answers_below_a_least_score_are_not_chosen() -> None:
    scores_JA = [[1.0, 0.5, None, 2.0], [5.0, 9.0, 9.0, None]]
    assert passing([None, None], scores_JA) == [0, 1, 2, 3]
    assert passing([0.5, None], scores_JA) == [0, 1, 3]
    assert passing([1.0, 5.0], scores_JA) == [0]
    assert passing([3.0, None], scores_JA) == []
    assert settle([0.9, 0.1, 0.1], [None, -2.0, -1.0], (1, 2)) == (2, "likelihood")


def test_scale_of_large_and_of_equal_scores() -> None:
    scale = Scale.of([-1e300, 1e300])
    assert scale.z(1e300) == pytest.approx(1.0)
    assert Scale.of([2.0, 2.0]).z(2.0) == 0.0


SCORES = st.lists(
    st.lists(st.none() | st.integers(-40, 40).map(float), min_size=3, max_size=3),
    min_size=2,
    max_size=5,
)


@given(SCORES, st.sampled_from(VOTES), st.integers(0, 99))
def test_votes_do_not_depend_on_the_order_of_judges(
    scores: list[list[float | None]], vote: Any, seed: int
) -> None:
    other = list(scores)
    random.Random(seed).shuffle(other)
    likely = [-1.0, -0.5, None]
    assert chosen(vote, scores, likely) == chosen(vote, other, likely)


@given(
    SCORES,
    st.sampled_from(VOTES),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
)
@example([[3.0, 3.0, 3.0], [None, None, None]], "majority", 0.001, 0.0)
def test_votes_do_not_depend_on_a_judges_scale(
    scores: list[list[float | None]], vote: Any, factor: float, offset: float
) -> None:
    first = [None if s is None else factor * s + offset for s in scores[0]]
    assert chosen(vote, [first, *scores[1:]]) == chosen(vote, scores)
    known = [s for s in scores[0] if s is not None]
    if known:
        before, after = Scale.of(known), Scale.of([factor * s + offset for s in known])
        for score in known:
            assert math.isclose(
                before.z(score), after.z(factor * score + offset), rel_tol=1e-6, abs_tol=1e-6
            )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 5-3 = 2", "2"),
        ("about 1,234.50.", "1,234.50"),
        ("so -7", "-7"),
        ("x = \u22127", "\u22127"),
        ("3/4 of it", "3/4"),
        ("one, 2, 3", "3"),
        (r"\boxed{\frac{3}{4}} of 8", r"\frac{3}{4}"),
        (r"\boxed{1} or \boxed{2", "1"),
        ("12 apples\n#### 42\nright?", "42"),
        ("It takes 10 1/2 hours", "10 1/2"),
        ("-3 1/2 or 2 7/8.", "2 7/8"),
        ("about 3\u00bd", "3 1/2"),
        (r"so $x = \frac{3}{4}$", "3/4"),
        ("of 12 and 5 7/3", "7/3"),
        ("in 2020 3/4", "3/4"),
        ("on 5 1/2/2020", "2020"),
        ("H2O", None),
        ("nothing", None),
        (r"\boxed{" * 20_000, None),
    ],
)
def test_final_answers(text: str, found: str | None) -> None:
    assert final_answer(text) == found


def test_final_answers_by_a_pattern() -> None:
    assert final_answer("Answer: B\nAnswer: C", r"Answer: ([A-D])") == "C"
    assert final_answer("yes no", r"yes|no") == "no"
    assert final_answer("maybe", r"yes|no") is None


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("42", "42.0", True),
        ("1,000", "1e3", True),
        ("1/2", ".5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", "0.5", True),
        ("10 1/2", "10.5", True),
        ("10 1/2", "7 1/2", False),
        ("-3 1/2", "-3.5", True),
        ("\u22123 1/2 m", "-3.5", True),
        (r"3\frac{1}{2}", "3.5", True),
        (r"3\dfrac12", "15.5", False),
        ("3\u00bd hours", "7/2", True),
        ("42 apples", "42", True),
        ("$18.", "18", True),
        (r"42\text{ km}", "42", True),
        ("Yes.", " yes", True),
        ("3", "4", False),
        ("5 or 6", "6", False),
        ("42 apples", "42 pears", False),
        ("1/0", "1/0", True),
        ("9" * 5000, "9" * 5000, True),
        ("1e999999999", "1e999999998", False),
    ],
)
def test_final_answers_are_compared(given: str, expected: str, same: bool) -> None:
    assert same_answer(given, expected) == same


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("x+1", "1+x", True),
        (r"\sqrt{49}", "7", True),
        ("x+1", "x-1", False),
        ("3 1/2", "3.5", True),
        ("3 1/2", "2", False),
        ("10 1/2", "1", False),
    ],
)
def test_formulas_are_the_same_or_not(given: str, expected: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert same_formula(given, expected) == same
    assert same_formula(expected, given) == same


def test_prompts_that_hold_their_answer() -> None:
    assert stated_answer("Put it behind ####.") == "."
    assert contains_answer("3 + 4? The answer is 7.", "#### 7")
    assert contains_answer("Repeat:  Hello, there\nWorld", "hello, there world.")
    assert not contains_answer("3 + 7? Put the answer in \\boxed{}.", "7")
    assert not contains_answer("Say yes or no.", "yes")
    assert not contains_answer("Helloing theres", "Helloing there")


def section(*judges: Any, **more: Any) -> JudgeSection:
    return JudgeSection.model_validate({"judges": list(judges)} | more)


def test_options_of_judges() -> None:
    found = section("exact_answer", {"kind": "reward_model", "name": "rm", "model": "m"})
    assert [judge.title for judge in found.judges] == ["exact_answer", "rm"]
    again = JudgeSection.model_validate(found.model_dump(mode="json"))
    assert again == found
    assert again.content() == found.content()
    faster = section("exact_answer", {
        "kind": "reward_model", "name": "rm", "model": "m", "batch_tokens": 1, "device": "cpu",
    })  # fmt: skip
    assert faster.content() == found.content()
    assert section("exact_answer", scored_in="x").content() == section("exact_answer").content()
    assert section("exact_answer").content() != section("exact_answer", drop_cut=False).content()


@pytest.mark.parametrize(
    ("judges", "said"),
    [
        (["best"], "should be 'reward_model'"),
        ([{"name": "x"}], "mapping with `kind`"),
        ([{"kind": "reward_model"}], "reward_model: model: it is missing"),
        ([{"kind": "python", "function": "f"}], "python: function: "),
        ([{"kind": "exact_answer", "pattern": "("}], "not a regular expression"),
        ([{"kind": "exact_answer", "size": 3}], "size: unknown key"),
        (["exact_answer", "exact_answer"], "two judges have the name exact_answer"),
        ([{"kind": "exact_answer", "name": "../x"}], "name: "),
    ],
)
def test_options_that_are_refused(judges: list[Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        section(*judges)


def test_a_wrong_option_is_told_once_with_what_may_be_meant() -> None:
    judge = {"kind": "exact_answer", "patern": "x (.+)"}
    run = {"name": "r", "sources": {"a": {"model": "a"}}, "target": {"model": "b"}}
    with pytest.raises(ConfigError) as caught:
        parse_run(run | {"judge": {"judges": [judge]}}, where="run.yaml")
    said = "judge.judges.0: exact_answer: patern: unknown key (got 'x (.+)'), did you mean pattern?"
    assert caught.value.line().endswith(said)


def test_every_judge_has_options_and_says_what_it_is() -> None:
    for kind in JUDGES:
        assert kind.summary
        assert {"kind", "name"} <= set(kind.section.model_fields)
