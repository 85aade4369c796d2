"""Figures of a study from made-up scores, each against the plain way of computing it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fuse_eval.study.figures import (
    MEAN,
    best_baseline,
    bpb_of,
    changes,
    gap_closed,
    interference,
    over_seeds,
    setting_record,
    tokens_to_control,
    tokens_to_reach,
    worst_documents,
)
from fuse_eval.study.page import render_page
from fuse_eval.study.tables import markdown_table, settings_grid, text_table
from fuse_eval.study.verdict import notes, verdict
from tests.study_results import (
    BLOCK_BYTES,
    EVEN,
    NUM_BLOCKS,
    document_nats,
    seen,
    study_of,
    training,
)

STUDY = study_of("control", "ours", "other")
BETTER = [0.9] * 3 + [1.02] * 3


def test_changes_are_relative_to_the_control_and_means_of_seeds() -> None:
    better, worse = seen({"control": EVEN, "ours": BETTER}), [1.1] * 3 + [1.02] * 3
    one = changes([better], "ours", "control", STUDY)
    assert (one["a"].value, one["a"].low, one["a"].high) == pytest.approx((-0.1,) * 3)
    assert one["b"].seeds == pytest.approx((0.02,))
    sums = {row: document_nats(better, row).reshape(2, -1).sum(1) for row in ("ours", "control")}
    assert one[MEAN].value == pytest.approx(sums["ours"].mean() / sums["control"].mean() - 1)
    both = changes(
        [better, seen({"control": EVEN, "ours": worse}, seed=1)], "ours", "control", STUDY
    )
    assert both["a"].value == pytest.approx(0, abs=1e-12)
    # Of two seeds one may be drawn twice: the interval reaches from one to the other.
    assert (both["a"].low, both["a"].high) == pytest.approx((-0.1, 0.1))


def test_intervals_are_of_documents_drawn_within_domains() -> None:
    factors = [0.8, 1.0, 1.2, 1.0, 1.0, 1.0]
    found = seen({"control": EVEN, "ours": factors})
    study = study_of("control", "ours", bootstrap_samples=20_000)
    change = changes([found], "ours", "control", study)["a"]
    nats = document_nats(found, "control")[:3]
    drawn = np.random.default_rng(1).integers(0, 3, (20_000, 3))
    ratios = (nats * factors[:3])[drawn].sum(1) / nats[drawn].sum(1) - 1
    # Ten sets of documents can be drawn, so quantiles of many draws are the same values.
    ends = np.quantile(ratios, [0.025, 0.975])
    assert (change.low, change.high) == pytest.approx(tuple(ends), abs=1e-9)
    two = changes([found, found], "ours", "control", study)["a"]
    assert two.value == pytest.approx(change.value)
    assert two.high - two.low < 0.9 * (change.high - change.low)


def test_seeds_are_drawn_with_replacement() -> None:
    draws = np.stack([np.zeros(9000), np.ones(9000), np.full(9000, 5.0)])
    means = over_seeds(draws, np.random.default_rng(0))
    values = np.unique(np.round(means, 9))
    expected = {round((a + b + c) / 3, 9) for a in (0, 1, 5) for b in (0, 1, 5) for c in (0, 1, 5)}
    assert set(values.tolist()) == expected
    assert means.mean() == pytest.approx(2, abs=0.1)
    assert means.var() == pytest.approx(draws[:, 0].var() / 3, rel=0.1)
    assert over_seeds(draws[:1], np.random.default_rng(0)) is not None


def test_interference_is_of_documents_worse_beyond_the_noise() -> None:
    factors = [1.05, 0.5, 1.0, 1.1, 1.0, 0.9]
    found = seen({"control": EVEN, "ours": factors})
    nats = document_nats(found, "control")
    both = [found, found]
    told = interference(both, "ours", STUDY, changes(both, "ours", "control", STUDY))
    assert (told.documents, told.better, told.of) == (4, 4, 12)
    assert told.excess_nats == pytest.approx(2 * (0.05 * nats[0] + 0.1 * nats[3]))
    assert told.every_nats == pytest.approx(told.excess_nats)
    noisy = seen({"control": EVEN, "ours": EVEN})
    noisy.blocks.nats["ours"][:4] += [5.0, 4.0, -3.0, -1.0]
    told = interference([noisy], "ours", STUDY, changes([noisy], "ours", "control", STUDY))
    assert (told.excess_nats, told.every_nats) == (0, pytest.approx(5))
    worse = seen({"control": EVEN, "ours": [1.0] * 3 + [1.1] * 3})
    assert interference(
        [worse], "ours", STUDY, changes([worse], "ours", "control", STUDY)
    ).domains == ("b",)


def test_the_worst_documents_come_first() -> None:
    found = seen({"control": EVEN, "ours": [1.05, 0.5, 1.0, 1.3, 1.0, 0.9]}, seed=7)
    told = worst_documents([found], "ours", "control")
    assert [(item["document_id"], item["seed"]) for item in told] == [("d3", 7), ("d0", 7)]
    assert told[0]["change"] == pytest.approx(0.3)
    assert worst_documents([found], "ours", "control", count=1) == told[:1]


def test_tokens_are_read_off_a_straight_line_between_evaluations() -> None:
    record = training(valid=[(0, 2.0), (10, 1.5), (20, 1.0), (40, 0.9)])
    assert tokens_to_reach(record, 1.25) == pytest.approx(15 / 40)
    assert tokens_to_reach(record, 2.5) == 0
    assert tokens_to_reach(record, 0.9) == pytest.approx(1)
    assert tokens_to_reach(record, 0.5) is None
    slow = training(valid=[(0, 2.0), (40, 1.25), (80, 1.3)])
    both = {"ours": record, "control": slow}
    found = seen({"control": EVEN, "ours": EVEN}, trainings=both)
    assert tokens_to_control([found], "ours", "control") == pytest.approx(15 / 40)
    assert tokens_to_control([found], "control", "control") == pytest.approx(1)
    other = seen({"control": EVEN, "ours": EVEN}, trainings={"ours": slow, "control": record})
    assert tokens_to_control([found, other], "ours", "control") is None
    pairs = training(valid=[(0, 2.0), (40, 1.2), (0, 2.0), (40, 1.1)])
    merged = seen({"control": EVEN, "ours": EVEN}, trainings={"ours": pairs, "control": slow})
    assert tokens_to_control([merged], "ours", "control") is None


def test_the_gap_is_to_the_best_source_of_each_domain() -> None:
    before, best = {"a": 2.0, "b": 1.0, MEAN: 1.5}, {"a": 1.0, "b": 1.2, MEAN: 1.1}
    assert gap_closed({"a": 1.75, "b": 0.5, MEAN: 1.1}, before, best) == pytest.approx(0.25)
    assert gap_closed({"a": 0.5, "b": 0.5, MEAN: 0.5}, before, best) == pytest.approx(1.5)


def test_bits_per_byte_are_of_the_bytes_of_each_domain() -> None:
    found = seen({"control": EVEN})
    nats = document_nats(found, "control").reshape(2, -1).sum(1)
    bpb = nats / np.log(2) / (3 * NUM_BLOCKS * BLOCK_BYTES)
    told = bpb_of([found], "control")
    assert (told["a"], told["b"]) == pytest.approx(tuple(bpb))
    assert told[MEAN] == pytest.approx(bpb.mean())


def test_a_record_holds_rows_that_are_there_and_programs_can_read_it() -> None:
    study = study_of(
        *("control", "ours", "other", "source", "before", "late"),
        rows={
            "control": {"says": "plain | training"},
            "ours": {},
            "other": {"baseline": True, "group": "published"},
            "source": {"model": "source"},
            "before": {"model": "target"},
            "late": {},
        },
        interference_against="other",
    )
    trained = {row: training(row) for row in ("control", "ours", "other")}
    factors = {"control": EVEN, "ours": BETTER, "source": [0.8] * 6, "before": [1.2] * 6}
    first = seen(factors | {"other": [1.2] * 6}, trainings=trained)
    second = seen(factors, seed=1, trainings=trained)
    record = setting_record(study, "demo", [first, second])
    assert json.loads(json.dumps(record, allow_nan=False)).keys() == record.keys()
    rows = record["rows"]
    assert "late" not in rows
    assert rows["other"]["seeds"] == [0]
    assert rows["ours"]["gap_closed"] == pytest.approx(0.3 / 0.4 / 2 + 0.18 / 0.4 / 2, abs=1e-3)
    assert {row for row, found in rows.items() if "ours_against" in found} == set(rows) - {"ours"}
    assert rows["other"]["ours_against"]["a"]["value"] == pytest.approx(0.9 / 1.2 - 1)
    ratio = rows["ours"]["interference_ratio"]["every_nats"]
    assert ratio == pytest.approx(
        rows["ours"]["interference"]["every_nats"] / rows["other"]["interference"]["every_nats"]
    )
    text = text_table(settings_grid(study, record))
    assert text.index("ours") < text.index("published:") < text.index("  other")
    assert "plain / training" in markdown_table(settings_grid(study, record))
    assert "ours against it" in text
    assert best_baseline(study, record) == "other"
    assert "fusing pays" in verdict(study, "demo", record)
    assert any("best baseline is other" in note for note in notes(study, record))
    page = render_page(study, {"settings": {"demo": record}, "study": {}})
    assert "plain | training" in page
    assert "<svg" in page


@pytest.mark.parametrize(
    ("factor", "said"), [(0.9, "fusing pays"), (1.1, "fusing does not pay"), (1.0, "no difference")]
)
def test_the_verdict_is_that_of_the_interval(factor: float, said: str) -> None:
    found = seen({"control": EVEN, "ours": [factor] * 6})
    record = setting_record(study_of("control", "ours"), "demo", [found])
    assert said in verdict(study_of("control", "ours"), "demo", record)


def test_only_rows_that_lack_a_source_tell_what_a_source_carries() -> None:
    rows = {
        "control": {},
        "ours": {},
        "two": {"without_sources": ["a"]},
        "four": {"add_sources": ["b"]},
        "one": {"sources": ["c"]},
        "plain": {"without_sources": ["a"], "set": {"train.selector": "uniform"}},
    }
    factors = {"control": EVEN, "ours": [0.8] * 6, "two": [0.9] * 6}
    factors |= {name: [0.7] * 6 for name in ("four", "one", "plain")}
    study = study_of("control", "ours", rows=rows)
    found = notes(study, setting_record(study, "demo", [seen(factors)]))
    assert [note for note in found if "Without one source" in note] == [
        "Without one source, against ours: two +12.5\u202f%."
    ]
