"""Rho-1's choice of rows against a plain sort."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse_train.losses.token_selection import row_factors


def test_the_rows_of_largest_excess_are_kept_and_the_mean_stays() -> None:
    nll = torch.tensor([5.0, 4.0, 1.0, 3.0, 2.0])
    reference = torch.tensor([4.5, 1.0, 0.0, 3.5, math.nan])
    factors = row_factors(nll, reference, 0.5)  # excess 0.5, 3, 1, -0.5, unknown
    torch.testing.assert_close(factors, torch.tensor([0.0, 5 / 3, 5 / 3, 0.0, 5 / 3]))
    assert row_factors(nll, reference, 1.0).tolist() == [1.0] * 5


def test_unknown_references_keep_everything() -> None:
    assert row_factors(torch.ones(3), torch.full((3,), math.nan), 0.1).tolist() == [1.0] * 3
    assert row_factors(torch.ones(0), torch.ones(0), 0.5).tolist() == []


@given(
    st.lists(
        st.tuples(st.floats(0, 9), st.floats(0, 9) | st.just(math.nan)), min_size=1, max_size=30
    ),
    st.floats(0.01, 1.0),
)
def test_choice_equals_a_plain_sort(pairs, share) -> None:
    nll, reference = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)
    )
    factors = row_factors(nll, reference, share).tolist()
    known = [i for i, (_, r) in enumerate(pairs) if not math.isnan(r)]
    kept = {i for i, f in enumerate(factors) if f > 0}
    count = max(1, round(share * len(known))) if known else 0
    assert len(kept) == count + len(pairs) - len(known)
    assert kept >= set(range(len(pairs))) - set(known)
    excess = {i: pairs[i][0] - pairs[i][1] for i in known}
    lowest = min((excess[i] for i in known if i in kept), default=0.0)
    assert all(excess[i] <= lowest for i in known if i not in kept)
    assert math.isclose(sum(factors), len(pairs))
