"""What `bench-align` measures with: its rows, its cuts, its charges and its figures, on small cases."""

from __future__ import annotations

import math
import time
from functools import cache

import numpy as np
import pytest

from align.chain.project import BytesAligner
from align.methods.method import SpansAligner
from benchmarks import align_fusellm
from benchmarks.align_coverage import coverage_of
from benchmarks.align_pairs import (
    MAX_ENTRIES,
    SMOOTHING,
    Bigrams,
    Pair,
    as_segments,
    cjk_text,
    cut,
    emoji_text,
)
from benchmarks.align_pools import LEAST_TAIL, Pool, charged_nats, counted_rows, pool_of
from benchmarks.align_speed import Work, plain_arguments, run, time_limit
from benchmarks.align_student import EQUAL, MOST_TRIES, gain_kept, steps_to_reach, summary
from store_schema.layout import Arrays, check_shard, row_sums
from store_schema.text.tokenizer import EncodedSegment
from tests.tokenizer_zoo import zoo

TEXTS = [
    "The quick brown fox jumps over 12345 lazy dogs.\n    return x + 1\n",
    "def add(a, b):\n    return a + b  # the sum of the two\n",
    "It returned 123 and then 1234; the dogs were quick.\n",
] * 3


def encoded(*tokens: int, context: tuple[int, ...] = ()) -> EncodedSegment:
    """Tokens of a byte each."""
    ends = np.arange(1, len(tokens) + 1, dtype=np.uint32)
    return EncodedSegment(context, np.array(tokens, np.uint32), ends)


@cache
def pair(source: str = "llama3", target: str = "llama2") -> Pair:
    return Pair(zoo(source), zoo(target), as_segments(TEXTS))


@cache
def bigrams(source: str = "llama3") -> Bigrams:
    tokenizer = zoo(source)
    return Bigrams.of(tokenizer.encode(as_segments(TEXTS)), tokenizer.vocab_size)


def test_rows_are_smoothed_bigrams() -> None:
    """After 0 came 1 twice and 2 once; 3 tokens of 4 ids in all."""
    counted = [encoded(1, 0, 1), encoded(2, context=(0,)), encoded(1, context=(0,))]
    found = Bigrams.of(counted, 4, num_entries=3)
    unigram = np.array([1.5, 3.5, 1.5, 0.5]) / 7
    expected = (np.array([0, 2, 1, 0]) + SMOOTHING * unigram) / (3 + SMOOTHING)
    rows = found.rows([encoded(2, context=(0,))])
    assert rows["entry_ids"].tolist() == [1, 2, 0]
    np.testing.assert_allclose(np.exp(rows["entry_logprobs"]), expected[[1, 2, 0]], rtol=1e-6)
    assert math.exp(rows["label_logprobs"][0]) == pytest.approx(expected[2])
    assert rows["tail_mass"][0] == pytest.approx(expected[3])


def test_a_label_that_is_no_entry_takes_the_last_place() -> None:
    found = Bigrams.of([encoded(1, 0, 1), encoded(2, context=(0,))], 4, num_entries=2)
    rows = found.rows([encoded(3, context=(0,))])
    assert sorted(rows["entry_ids"].tolist()) == [1, 3]
    label = rows["entry_ids"].tolist().index(3)
    assert rows["label_logprobs"][0] == rows["entry_logprobs"][label]


def test_a_first_token_with_nothing_before_it_has_no_row() -> None:
    rows = Bigrams.of([encoded(0, 1, 2)], 3, num_entries=2).rows([encoded(0, 1)])
    assert rows["entry_offsets"].tolist() == [0, 0, 2]
    assert np.isnan(rows["label_logprobs"]).tolist() == [True, False]
    assert rows["tail_mass"][0] == 1


def test_rows_are_a_source_store() -> None:
    rows = bigrams().rows(pair().source.encode(as_segments(TEXTS)))
    check_shard("source", rows, vocab_size=pair().source.vocab_size, where="bigrams")
    sums = row_sums(np.exp(rows["entry_logprobs"].astype(float)), rows["entry_offsets"])
    np.testing.assert_allclose(sums + rows["tail_mass"], 1, atol=1e-6)


def test_cuts_join_to_the_text() -> None:
    text = "".join(TEXTS)
    pieces = cut(text, zoo("llama2"), 40)
    assert len(pieces) > 2
    assert text.startswith("".join(pieces))
    lengths = [len(ids) for ids in zoo("llama2").encode_text(pieces)]
    assert 30 < min(lengths) <= max(lengths) < 90


@pytest.mark.parametrize("make", [cjk_text, emoji_text])
def test_made_text_is_long_enough_the_same_again_and_other_by_seed(make) -> None:
    text = make(3_000, 1)
    assert 3_000 <= len(text.encode()) < 3_400
    assert text == make(3_000, 1) != make(3_000, 2)
    assert sum(ord(c) > 127 for c in text) > 100


@cache
def work() -> Work:
    return Work.of(pair(), bigrams(), TEXTS[:4])


def test_a_part_of_the_work_is_that_part() -> None:
    aligner = BytesAligner(pair().bytes_map(), MAX_ENTRIES)
    whole, one, joined = (run(aligner, w) for w in (work(), work().one(2), work().joined(3)))
    offsets = whole["token_offsets"]
    for part, rows in ((one, slice(offsets[2], offsets[3])), (joined, slice(0, offsets[3]))):
        np.testing.assert_array_equal(part["label_logprobs"], whole["label_logprobs"][rows])
        np.testing.assert_array_equal(part["tail_mass"], whole["tail_mass"][rows])


def test_the_plain_way_is_given_the_same_segment() -> None:
    source_ids, source_texts, target_ids, target_texts, rows = plain_arguments(work().one(1))
    assert b"".join(source_texts) == b"".join(target_texts) == TEXTS[1].encode()
    assert len(rows) == len(source_ids)
    assert all(len(row) == align_fusellm.TOP_K for row in rows)
    aligned = align_fusellm.align_plain(
        source_ids, source_texts, target_ids, target_texts, rows, {i: i for i in source_ids}
    )
    assert [sum(row.values()) for row in aligned] == pytest.approx([1] * len(target_ids))


def test_the_part_of_edit_distances_is_what_the_plain_way_works_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, source, _, target, _ = plain_arguments(work().one(1))
    plain, asked = align_fusellm.edit_distance, []
    monkeypatch.setattr(
        align_fusellm, "edit_distance", lambda a, b: asked.append((a, b)) or plain(a, b)
    )
    align_fusellm.warping_path(source, target)
    on_the_way = sorted(asked)
    asked.clear()
    align_fusellm.pair_distances(source, target)
    assert sorted(asked) == on_the_way


def test_a_limit_leaves_the_block() -> None:
    start = time.monotonic()
    with time_limit(1) as limit:
        while time.monotonic() < start + 20:
            pass
    assert limit.reached
    assert time.monotonic() - start < 10
    with time_limit(1) as limit:
        pass
    assert not limit.reached


def charged() -> Arrays:
    """A label with mass, one without beside two entries, one without anything, one without tail."""
    return {
        "label_logprobs": np.log(np.array([0.25, np.nan, np.nan, np.nan])),
        "tail_mass": np.array([0.5, 0.3, 1.0, 0.0]),
        "entry_offsets": np.array([0, 2, 4, 4, 5]),
    }


def test_labels_without_mass_are_charged_the_tail() -> None:
    expected = [0.25, 0.3 / 8, 1 / 10, LEAST_TAIL / 9]
    np.testing.assert_allclose(charged_nats(charged(), 10), -np.log(expected))


def test_rows_before_the_common_start_do_not_count() -> None:
    found = counted_rows([encoded(5, 6, 7, context=(0,)), encoded(8, 9, context=(0,))], [2, 0])
    assert found.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("source", ["llama3", "gpt2"])
@pytest.mark.parametrize("target", ["llama2", "gemma", "qwen"])
def test_bytes_cost_what_the_source_costs(source: str, target: str) -> None:
    """The product of the labels is the source's own, but for what reaches over the end."""
    here = pair(source, target)
    segments = as_segments(TEXTS)
    own, read = here.source.encode(segments), here.target.encode(segments)
    texts = [s.text.encode() for s in segments]
    rows = bigrams(source).rows(own)
    aligner = BytesAligner(here.bytes_map(), MAX_ENTRIES)
    pool = pool_of(aligner, rows, own, read, texts, here.target.vocab_size)
    assert pool.num_bytes <= sum(map(len, texts))
    assert pool.unlabelled == 0
    if source == "llama3":  # which puts BOS before a text: all bytes count
        assert pool.num_bytes == sum(map(len, texts))
        assert pool.own_nats == pytest.approx(-float(rows["label_logprobs"].sum()), rel=1e-5)
    assert -0.05 < pool.excess < 1e-5
    assert 0.5 < pool.mean_mass <= 1


def test_no_distribution_is_charged_as_the_uniform_distribution_and_shown() -> None:
    here, segments = pair(), as_segments(TEXTS)
    own, read = here.source.encode(segments), here.target.encode(segments)
    texts = [s.text.encode() for s in segments]
    size = here.target.vocab_size
    uncovered = pool_of(SpansAligner(), bigrams().rows(own), own, read, texts, size)
    assert uncovered.unlabelled == uncovered.positions
    assert uncovered.nats == pytest.approx(uncovered.positions * math.log(size))
    assert uncovered.uncovered_part == pytest.approx(1 + uncovered.excess)
    covering = BytesAligner(here.bytes_map(), MAX_ENTRIES)
    assert pool_of(covering, bigrams().rows(own), own, read, texts, size).uncovered_part == 0


def test_pools_add_up() -> None:
    total = Pool()
    total.add(Pool(nats=3.0, own_nats=2.0, covered=2, mass=1.0))
    total.add(Pool(nats=1.0, own_nats=2.0, covered=2, mass=2.0))
    assert total.excess == 0
    assert total.mean_mass == 0.75


def test_a_first_token_of_a_source_without_bos_does_not_count_against_coverage() -> None:
    segments = as_segments(TEXTS)
    here = pair("gpt2", "gpt2")
    assert coverage_of(here, here.bytes_map(), bigrams("gpt2"), segments) == (1, 0)


def test_gain_kept() -> None:
    bpb = {"control": 2.0, "native": 1.6, "bytes": 1.7, "bytes-tail": 2.1}
    assert gain_kept(bpb, "bytes") == pytest.approx(0.75)
    assert gain_kept(bpb, "bytes-tail") == pytest.approx(-0.25)
    assert math.isnan(gain_kept(bpb | {"native": 2.1}, "bytes"))


@pytest.mark.parametrize("goal", [0.376, 0.41, 0.5, 0.7])
def test_steps_after_which_specialists_are_equally_good(goal: float) -> None:
    tried: list[int] = []

    def score(steps: int) -> float:
        tried.append(steps)
        return 0.3 + 0.076 * (300 / steps) ** 1.3

    found = steps_to_reach(goal, 300, score)
    assert abs(score(found) / goal - 1) <= EQUAL
    assert len(tried) <= MOST_TRIES + 2
    assert (found == 300) == (goal == 0.376)


def test_a_summary_is_of_the_mean_over_seeds() -> None:
    tables = [
        {"control": 2.0, "native": 1.0, "bytes": 1.5},
        {"control": 3.0, "native": 2.0, "bytes": 2.1},
    ]
    found = summary({"demo": tables}, ["bytes"])
    assert found["bpb"]["demo"] == pytest.approx({"control": 2.5, "native": 1.5, "bytes": 1.8})
    assert found["gain_kept"]["demo"]["bytes"] == pytest.approx(0.7)
    assert found["gain_kept_by_seed"]["demo"]["bytes"] == pytest.approx([0.5, 0.9])
    assert found["num_seeds"] == 2
