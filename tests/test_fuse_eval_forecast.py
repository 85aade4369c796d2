"""What fusing may gain: the n-gram model in place of the trained control, and what is made of it."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse_eval.forecast import SHARE_TAKEN, Forecast, NgramModel, forecasts

IDS = st.lists(st.integers(0, 4), max_size=12)


@given(st.lists(st.tuples(IDS, IDS), max_size=4), IDS, st.integers(1, 4))
def test_an_ngram_model_is_a_distribution_after_any_context(texts, context, order) -> None:
    model = NgramModel(5, order)
    for before, ids in texts:
        model.add(before, ids)
    total = sum(exp(-model.nats(context, [token])[0]) for token in range(5))
    assert total == pytest.approx(1.0)


def test_witten_bell_by_hand() -> None:
    """After 1 came 2 twice and 3 once; of all five tokens that were counted 2 came twice."""
    model = NgramModel(10, order=2)
    model.add([], [1, 2, 1, 2])
    model.add([1], [3])
    # alone: tokens 1, 2, 1, 2, 3 of three kinds, over ten ids alike
    alone = (2 + 3 * 0.1) / (5 + 3)
    after = (2 + 2 * alone) / (3 + 2)
    assert model.nats([7, 1], [2])[0] == pytest.approx(-log(after))
    assert model.nats([], [2])[0] == pytest.approx(-log(alone))
    assert model.nats([9], [2])[0] == pytest.approx(-log(alone))  # nothing came after 9
    assert model.num_tokens == 5


def test_context_is_not_counted() -> None:
    model = NgramModel(10, order=3)
    model.add([4, 5], [6])
    assert model.nats([], [4])[0] == pytest.approx(-log(0.1 / 2))
    assert NgramModel(10).nats([1], [2, 3]) == pytest.approx([log(10)] * 2)


def test_repeated_text_is_learned() -> None:
    text = [1, 5, 2, 8, 3, 3, 9, 0] * 20
    model = NgramModel(10)
    model.add([], text)
    assert model.nats(text[:8], text[:8]).mean() < 0.2


def test_nothing_is_gained_from_a_pool_that_knows_no_more() -> None:
    """Bounds are of the best mixtures: a pool worse than plain training in every span adds nothing."""
    rng = np.random.default_rng(0)
    target = rng.uniform(2, 4, 500)
    ngram, worse, better = target - 1.0, target + 1.0, target - 2.0
    made = forecasts(
        {"bad": np.stack([target, worse]), "good": np.stack([target, better])},
        {"bad": np.stack([ngram, worse]), "good": np.stack([ngram, better])},
    )
    assert made["bad"].control == pytest.approx(ngram.sum())
    assert made["bad"].gain == pytest.approx(0.0, abs=1e-9)
    assert made["good"].most == pytest.approx(1 - better.sum() / ngram.sum())
    assert made["good"].gain == SHARE_TAKEN * made["good"].most
    assert Forecast(0.0, 0.0).gain == 0.0  # a domain without a span
