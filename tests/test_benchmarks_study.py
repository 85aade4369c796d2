"""`make study`: its goals from a study's record, and every row of its file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.bench_study import add_seconds, study_figures
from fuse_eval.study.config import load_study
from fuse_eval.study.figures import setting_record
from fuse_eval.study.grid import checked_places
from tests.study_results import EVEN, seen, study_of

ROOT = Path(__file__).resolve().parent.parent


def test_goals_are_of_the_mean_and_of_the_best_baseline() -> None:
    rows = {"control": {}, "ours": {}, "weak": {"baseline": True}, "strong": {"baseline": True}}
    study = study_of(*rows, rows=rows, interference_against="strong")
    factors = {"control": EVEN, "ours": [0.8] * 6, "weak": [1.0] * 6, "strong": [0.9] * 5 + [1.2]}
    whole = setting_record(study, "demo", [seen(factors)])
    found = study_figures(study, {"settings": {"demo": whole, "none": {"rows": {}}}})
    assert found["ours_minus_control"]["demo"]["value"] == pytest.approx(-0.2)
    best = found["ours_minus_best_baseline"]["demo"]
    assert best["baseline"] == "strong"
    assert best["high"] < 0
    assert found["interference_ratio_mince"]["demo"] == 0
    assert found["tokens_to_control"]["demo"] == pytest.approx(1)
    assert set(found["ours_minus_control"]) == {"demo"}


def test_seconds_of_all_calls_are_added(tmp_path: Path) -> None:
    assert add_seconds(tmp_path / "study", 2.5) == 2.5
    assert add_seconds(tmp_path / "study", 1.0) == 3.5


def test_every_row_of_the_example_is_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study("examples/study.yaml")
    places = checked_places(study, (), ())
    seeds = {name: 1 if name == "published models" else 3 for name in study.settings}
    assert Counter(place.setting for place in places) == seeds
    assert {"gold", "h_kl", "p_kl", "byte_prefix", "fusechat", "random source"} <= set(study.rows)
    baselines = [row for row in study.rows.values() if row.baseline]
    assert len(baselines) == 13
