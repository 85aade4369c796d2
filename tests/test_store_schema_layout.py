"""The layout's invariants: each one broken once, and found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store_schema.errors import CorruptionError
from store_schema.layout import (
    FORMS,
    LAYOUT,
    Arrays,
    Finish,
    Form,
    array_names,
    axis_lengths,
    check_shard,
    row_sums,
)
from tests import store_factory

VOCAB = store_factory.BIG_VOCAB


def _check(kind: Form, arrays: Arrays) -> None:
    check_shard(kind, arrays, vocab_size=VOCAB, where="store X, shard 7")


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("rows", [(3, 0, 5), (), (0, 0), (1,), (1, 1, 1)])
def test_made_up_shards_are_sound(kind: Form, rows: tuple[int, ...]) -> None:
    arrays = store_factory.arrays(kind, rows)
    _check(kind, arrays)
    assert axis_lengths(arrays)["N"] == sum(rows)


def test_answers_are_text_and_aligned_stores_have_what_source_stores_have() -> None:
    source, branched, generated, aligned = (set(array_names(form)) for form in FORMS)
    text = {"segment_ids", "token_offsets", "token_ids", "byte_ends"}
    assert generated == text | {"answer_index", "finish"}
    assert source & generated == text
    assert source < aligned
    assert source == {name for name in branched if not name.startswith("branch_")} < branched
    assert branched | generated | aligned == {spec.name for spec in LAYOUT}


def _set(name: str, index: int, value: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name][index] = value

    return change


def _replace(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = make(arrays[name])

    return change


def _swap_first_entries(arrays: Arrays) -> None:
    row = int(np.flatnonzero(np.diff(arrays["entry_offsets"]) >= 2)[0])
    at = int(arrays["entry_offsets"][row])
    logprobs = arrays["entry_logprobs"]
    logprobs[at], logprobs[at + 1] = logprobs[at + 1], logprobs[at] + np.float32(1e-6)


def _leave_out(arrays: Arrays) -> None:
    del arrays["tail_mass"]


BROKEN: dict[str, tuple[Callable[[Arrays], None], str]] = {
    "array left out": (_leave_out, "*"),
    "array too many": (lambda a: a.update(extra=np.zeros(1)), "*"),
    "dtype": (_replace("token_ids", lambda x: x.astype("<i8")), "token_ids"),
    "big endian": (_replace("token_ids", lambda x: x.astype(">u4")), "token_ids"),
    "shape": (_replace("tail_mass", lambda x: x[:-1]), "tail_mass"),
    "two axes": (_replace("tail_mass", lambda x: x[:, None]), "tail_mass"),
    "offsets start": (_set("token_offsets", 0, 1), "token_offsets"),
    "offsets end": (_set("token_offsets", -1, 7), "token_offsets"),
    "offsets fall": (_set("token_offsets", 1, 11), "token_offsets"),
    "entry offsets fall": (_set("entry_offsets", 2, 10_000), "entry_offsets"),
    "span offsets end": (_set("span_offsets", -1, 99), "span_offsets"),
    "token id range": (_set("token_ids", 0, VOCAB), "token_ids"),
    "entry id range": (_set("entry_ids", 0, VOCAB), "entry_ids"),
    "log-probability above 0": (_set("entry_logprobs", 0, 0.5), "entry_logprobs"),
    "log-probability NaN": (_set("entry_logprobs", 0, np.nan), "entry_logprobs"),
    "entries unsorted": (_swap_first_entries, "entry_logprobs"),
    "label above 0": (_set("label_logprobs", 1, 0.1), "label_logprobs"),
    "tail below 0": (_set("tail_mass", 0, -0.01), "tail_mass"),
    "tail above 1": (_set("tail_mass", 0, 1.01), "tail_mass"),
    "tail NaN": (_set("tail_mass", 0, np.nan), "tail_mass"),
    "mass not conserved": (_set("tail_mass", 0, 0.99), "tail_mass"),
    "byte ends fall": (_set("byte_ends", 4, 4_000_000_000), "byte_ends"),
    "unknown origin": (_set("origin", 0, 3), "origin"),
    "entries without origin": (_replace("origin", np.zeros_like), "origin"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_broken_invariant_is_found_and_named(case: str) -> None:
    change, name = BROKEN[case]
    arrays = store_factory.arrays("aligned", (4, 6))
    change(arrays)
    with pytest.raises(CorruptionError) as caught:
        _check("aligned", arrays)
    assert f"store X, shard 7, array {name}" in caught.value.line()


BROKEN_ANSWERS: dict[str, tuple[Callable[[Arrays], None], str]] = {
    "answers of equal number": (_set("answer_index", 1, 0), "answer_index"),
    "answers fall": (_set("answer_index", 0, 2), "answer_index"),
    "segments fall": (_set("segment_ids", 0, 1), "answer_index"),
    "distributions": (lambda a: a.update(tail_mass=np.zeros(11, "<f4")), "*"),
    "token id range": (_set("token_ids", 0, VOCAB), "token_ids"),
    "offsets fall": (_set("token_offsets", 1, 11), "token_offsets"),
    "byte ends fall": (_set("byte_ends", 1, 9), "byte_ends"),
    "unknown reason": (_set("finish", 0, 5), "finish"),
    "tokens after a prompt too long": (_set("finish", 0, Finish.PROMPT_TOO_LONG), "finish"),
    "empty with text": (_set("finish", 0, Finish.EMPTY), "finish"),
    "stopped without a byte": (_set("finish", 3, Finish.STOP), "finish"),
    "stop text without a byte": (_set("finish", 3, Finish.STOP_TEXT), "finish"),
    "cut without tokens": (_set("finish", 2, Finish.LENGTH), "finish"),
}


@pytest.mark.parametrize("case", BROKEN_ANSWERS)
def test_each_broken_invariant_of_answers_is_found_and_named(case: str) -> None:
    change, name = BROKEN_ANSWERS[case]
    arrays = store_factory.arrays("generated", (4, 6, 0, 1))
    arrays["byte_ends"][:] = [1, 2, 3, 3, 1, 1, 1, 2, 2, 5, 0]
    arrays["finish"][:] = [Finish.STOP, Finish.LENGTH, Finish.PROMPT_TOO_LONG, Finish.EMPTY]
    _check("generated", arrays)
    change(arrays)
    with pytest.raises(CorruptionError) as caught:
        _check("generated", arrays)
    assert f"store X, shard 7, array {name}" in caught.value.line()


BROKEN_BRANCHES: dict[str, tuple[Callable[[Arrays], None], str]] = {
    "position out of range": (_set("branch_positions", -1, 10), "branch_positions"),
    "positions fall": (_replace("branch_positions", np.flip), "branch_tokens"),
    "after no entry": (_set("branch_tokens", 0, VOCAB - 1), "branch_tokens"),
    "token id range": (_set("branch_tokens", -1, VOCAB), "branch_tokens"),
    "entry id range": (_set("branch_entry_ids", 0, VOCAB), "branch_entry_ids"),
    "offsets end": (_set("branch_entry_offsets", -1, 999), "branch_entry_offsets"),
    "above 0": (_set("branch_entry_logprobs", 0, 0.5), "branch_entry_logprobs"),
    "tail above 1": (_set("branch_tail_mass", 0, 1.5), "branch_tail_mass"),
    "mass not conserved": (_set("branch_tail_mass", 0, 0.999), "branch_tail_mass"),
    "row left out": (_replace("branch_tail_mass", lambda x: x[:-1]), "branch_tail_mass"),
}


@pytest.mark.parametrize("case", BROKEN_BRANCHES)
def test_each_broken_invariant_of_branches_is_found_and_named(case: str) -> None:
    change, name = BROKEN_BRANCHES[case]
    arrays = store_factory.arrays("branched", (4, 6))
    assert len(arrays["branch_tokens"]) > 3
    change(arrays)
    with pytest.raises(CorruptionError) as caught:
        _check("branched", arrays)
    assert f"store X, shard 7, array {name}" in caught.value.line()


def test_a_branch_after_the_texts_own_token_is_none() -> None:
    arrays = store_factory.arrays("branched", (4, 6))
    arrays["token_ids"][arrays["branch_positions"][0]] = arrays["branch_tokens"][0]
    with pytest.raises(CorruptionError, match="the text's own token"):
        _check("branched", arrays)


def test_an_answer_may_be_cut_before_its_first_byte_or_end_without_a_token() -> None:
    arrays = store_factory.arrays("generated", (1, 0, 0))
    arrays["byte_ends"][:] = 0
    arrays["finish"][:] = [Finish.LENGTH, Finish.EMPTY, Finish.PROMPT_TOO_LONG]
    _check("generated", arrays)


def test_zero_length_token_inside_a_segment_is_sound() -> None:
    arrays = store_factory.arrays("source", (4,))
    arrays["byte_ends"][:] = [0, 2, 2, 5]
    _check("source", arrays)


@given(
    st.lists(st.lists(st.floats(0, 1), max_size=5), max_size=8),
)
def test_row_sums_equal_the_plain_loop(rows: list[list[float]]) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    values = np.asarray([v for r in rows for v in r], np.float64)
    assert np.allclose(row_sums(values, offsets), [sum(r) for r in rows], atol=1e-12)


@given(st.lists(st.integers(0, 6), max_size=5), st.integers(0, 2**31))
def test_random_shards_are_sound(rows: list[int], seed: int) -> None:
    for kind in ("branched", "generated", "aligned"):
        _check(kind, store_factory.arrays(kind, rows, seed=seed))
