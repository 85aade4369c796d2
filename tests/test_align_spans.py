"""Spans: each source token is paid for once, those without bytes too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.chain.project import project
from align.methods.spans import common_spans
from tests.test_align_project import hand_arrays, hand_segment, hand_tables, vocabulary

lengths = st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=1, max_size=12)


@given(source=lengths, target=lengths)
def test_a_token_without_bytes_belongs_to_the_span_that_ends_where_it_stands(
    source: list[int], target: list[int]
) -> None:
    """A dummy prefix to the first span. Every token counts once, in one span."""
    short = sum(source) - sum(target)
    source, target = [*source, max(-short, 0) + 1], [*target, max(short, 0) + 1]
    ends, target_ends = np.cumsum(source), np.cumsum(target)
    labels = -np.arange(1.0, len(source) + 1)
    rows = (np.array([0, len(source)]), np.array([0, len(target)]))
    offsets, index, span_ends, logprobs = common_spans(rows, ends, target_ends, labels)
    common = sorted((set(ends.tolist()) & set(target_ends.tolist())) - {0})
    assert offsets.tolist() == [0, len(common)]
    assert span_ends.tolist() == common
    expected = np.zeros(len(common))
    np.add.at(expected, np.searchsorted(common, ends), labels)
    assert logprobs == pytest.approx(expected)
    assert index.tolist() == np.searchsorted(common, target_ends).tolist()


def test_labels_pay_for_tokens_without_bytes_once() -> None:
    """A dummy prefix with the token after it, one in the middle with the next, as the chain goes on;
    behind the last byte there is no label left to pay, and only the span has it."""
    a, b, nothing = range(3)
    source, target = vocabulary(b"a", b"b", b""), vocabulary(b"a", b"b")
    rows = [{nothing: 0.5}, {a: 0.8}, {nothing: 0.4}, {b: 0.7}, {nothing: 0.9}]
    tokens = [nothing, a, nothing, b, nothing]
    arrays = hand_arrays(tokens, [0, 1, 1, 2, 2], rows)
    segment = hand_segment([0, 1], target)
    tables = hand_tables(source, target)
    found = project(arrays, [b"ab"], [segment], tables.mapping, max_entries=9)
    labels = np.exp(found["label_logprobs"].astype(float))
    assert labels == pytest.approx([0.5 * 0.8, 0.4 * 0.7])
    spans = np.exp(found["span_logprobs"].astype(float))
    assert spans == pytest.approx([0.5 * 0.8 * 0.4, 0.7 * 0.9])
    assert found["source_nats"] == pytest.approx([-np.log(0.5 * 0.8 * 0.4 * 0.7 * 0.9)])


@pytest.mark.parametrize("place", range(4))
def test_spans_of_a_segment_cost_what_its_tokens_cost(place: int) -> None:
    """Wherever the token without bytes stands, on either side."""
    a, b, nothing = range(3)
    source, target = vocabulary(b"a", b"b", b""), vocabulary(b"ab", b"a", b"b", b"")
    with_bytes = [(a, 0.8), (b, 0.7), (a, 0.6)]
    tokens = [*with_bytes[:place], (nothing, 0.5), *with_bytes[place:]]
    ends = np.cumsum([token != nothing for token, _ in tokens]).tolist()
    arrays = hand_arrays([t for t, _ in tokens], ends, [{t: p} for t, p in tokens])
    tables = hand_tables(source, target)
    for ours in ([0, 1], [1, 2, 1], [3, 0, 1], [0, 3, 1], [0, 1, 3]):
        segment = hand_segment(ours, target)
        found = project(arrays, [b"aba"], [segment], tables.mapping, max_entries=9)
        assert found["span_logprobs"].sum() == pytest.approx(np.log(0.8 * 0.7 * 0.6 * 0.5))
        assert found["source_nats"] == pytest.approx(-found["span_logprobs"].sum())
