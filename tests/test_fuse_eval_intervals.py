"""Bootstrap intervals: right point, right width, paired."""

from __future__ import annotations

import numpy as np
import pytest

from fuse_eval.config import EvaluateSection
from fuse_eval.evaluation import evaluation_record
from fuse_eval.intervals import compare, units_by_domain
from store_schema.errors import InputError
from tests import store_factory


def _units(nats: dict[str, list[float]], num_bytes: list[int], domains: list[str]) -> dict:
    names = [str(i) for i in range(len(num_bytes))]
    columns = {m: np.asarray(v, np.float64) for m, v in nats.items()}
    return units_by_domain(columns, np.asarray(num_bytes, np.float64), domains, names)


def test_units_are_sums_by_document_and_empty_segments_are_left_out() -> None:
    units = units_by_domain(
        {"m": np.array([1.0, 2.0, 4.0, 0.0])},
        np.array([10.0, 20.0, 5.0, 0.0]),
        ["x", "x", "y", "y"],
        ["d", "d", "e", "f"],
    )
    assert list(units) == ["x", "y"]
    assert units["x"].nats["m"].tolist() == [3.0]
    assert units["y"].num_bytes.tolist() == [5.0]
    assert units["x"].bpb("m") == pytest.approx(3 / np.log(2) / 30)


def test_a_constant_ratio_has_no_width_however_the_documents_differ() -> None:
    rng = np.random.default_rng(0)
    control = rng.exponential(50, 80)
    units = _units(
        {"fused": (control * 0.97).tolist(), "clm_control": control.tolist()},
        [100] * 80,
        ["x"] * 80,
    )
    found = compare(units, "fused", "clm_control", samples=400, confidence=0.95, seed=1)
    mean = found["mean"]
    assert mean["value"] == pytest.approx(-0.03)
    assert mean["high"] - mean["low"] < 1e-9
    assert found["worse"] == []


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(150):
        control = rng.gamma(4, 10, 60)
        fused = control * (1.02 + rng.normal(0, 0.05, 60))
        units = _units({"f": fused.tolist(), "c": control.tolist()}, [50] * 60, ["x"] * 60)
        mean = compare(units, "f", "c", samples=300, confidence=0.9, seed=trial)["mean"]
        hits += mean["low"] <= 0.02 <= mean["high"]
    assert 0.8 <= hits / 150 <= 0.97


def test_mean_weighs_domains_equally_and_worse_names_those_beyond_the_noise() -> None:
    nats = {"f": [90.0] * 30 + [105.0] * 3, "c": [100.0] * 33}
    units = _units(nats, [100] * 33, ["big"] * 30 + ["small"] * 3)
    found = compare(units, "f", "c", samples=200, confidence=0.95, seed=0)
    assert found["mean"]["value"] == pytest.approx((0.9 + 1.05) / 2 - 1)
    assert found["worse"] == ["small"]


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(0)
    nats = {"f": rng.exponential(9, 40).tolist(), "c": rng.exponential(9, 40).tolist()}
    units = _units(nats, [9] * 40, ["x"] * 40)
    first = compare(units, "f", "c", samples=200, confidence=0.95, seed=5)
    assert first == compare(units, "f", "c", samples=200, confidence=0.95, seed=5)
    assert first != compare(units, "f", "c", samples=200, confidence=0.95, seed=6)


def test_record_of_an_evaluation() -> None:
    segments = store_factory.segments(["abcd", "efgh", "ijkl"])
    record = evaluation_record(
        segments,
        np.array([4, 4, 0]),
        {"target_before": [4.0, 4.0, 0.0], "fused": [2.0, 4.0, 0.0], "s": [1.0, 1.0, 0.0]},
        EvaluateSection(bootstrap_samples=200),
        seed=0,
    )
    assert record["bpb"]["fused"]["odd"] == pytest.approx(6 / 8 / np.log(2))
    assert [(c["model"], c["against"]) for c in record["comparisons"]] == [
        ("fused", "target_before")
    ]
    assert record["domains"]["odd"] == {
        "documents": 3,
        "segments": 3,
        "bytes": 8,
        "excluded_bytes": 4,
    }
    assert record["specialists"] == [{"source": "s", "domain": "odd", "change": -0.75}]
    with pytest.raises(InputError, match="no byte"):
        evaluation_record(
            segments, np.zeros(3, int), {"fused": [0.0] * 3}, EvaluateSection(), seed=0
        )
