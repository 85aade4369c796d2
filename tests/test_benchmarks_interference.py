"""`make bench-interference`: right figures from made-up scores, and a toy pass through all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_interference as bench
from benchmarks.interference_figures import (
    CONTROL,
    OURS,
    REAL_TOKENS,
    RIVALS,
    SPOILED,
    TODAY,
    Forecast,
    all_figures,
    best_source_over_control,
    checked_forecasts,
    forecast_error,
    gain_kept,
    interference_ratios,
    ranks_domains_right,
    worst_domain,
)
from benchmarks.interference_steps import median_step
from fuse_eval.study.config import Setting, load_study
from fuse_eval.study.figures import Change, setting_record
from fuse_eval.study.grid import checked_places, place_of
from fuse_train.config import TrainSection
from launch.signals import StopFlag
from tests.study_results import (
    BLOCK_BYTES,
    EVEN,
    NUM_BLOCKS,
    document_nats,
    seen,
    study_of,
)
from tests.test_end_to_end import write_run

ROWS = (CONTROL, OURS, TODAY, *RIVALS)
FORECAST = {"forecast": {"a": {"gain": 0.13}, "b": {"gain": 0.0}}}


# ------------------------------------------------------------------------------------ what is trained


def test_the_study_compares_what_it_says(tmp_path: Path) -> None:
    study = load_study(bench.STUDY).model_copy(update={"study_dir": str(tmp_path)})
    assert set(study.rows) == set(ROWS)
    assert set(SPOILED) | {"demo"} | set(REAL_TOKENS) == set(study.settings)
    for name in study.settings:
        setting, rows = study.setting(name), study.rows_of(name)
        assert {CONTROL, OURS} <= set(rows)
        assert (TODAY in rows) == (name == "demo")
        assert len({str(tuning) for tuning in setting.tune}) == (2 if name == "real-large" else 3)
        tuned = {row for row, content in rows.items() if content.tuned_as is None}
        assert tuned == (set(rows) if name.startswith("real") else {CONTROL, OURS})
    for name in REAL_TOKENS:
        assert {t["train.lr"] for t in study.setting(name).tune} == {1e-4, 2e-4}
    runs = {name: place_of(study, name, 0) for name in study.settings}
    assert runs["demo"].data.folder == runs["spoiled-source"].data.folder
    inputs = runs["real-large"].data.content["corpus"]["inputs"]
    assert inputs[0]["path"] == "runs/real/inputs/text-150000/german.jsonl"


def test_every_recipe_is_one_that_training_takes(tmp_path: Path) -> None:
    study = load_study(bench.STUDY).model_copy(update={"study_dir": str(tmp_path)})
    from fuse_eval.study.grid import recipe_of

    for name in study.settings:
        place = place_of(study, name, 0)
        tuning = study.setting(name).tune[-1]
        sections = {
            row: recipe_of(study, place, row, tuning).run.section("train", TrainSection)
            for row in study.rows_of(name)
        }
        control = sections[CONTROL]
        assert (control.selector, control.clm_weight) == ("uniform", 1.0)
        assert control.loss.clm_weight_schedule is None
        gates = {row: section.fusion_gate.kind for row, section in sections.items()}
        assert gates.pop(OURS) != "none"
        assert set(gates.values()) == {"none"}
        assert sections[OURS].clm_weight == place.data.content["train"]["clm_weight"]
        if "fusion_x" in sections:
            published = sections["fusion_x"]
            assert (published.asn.preset, published.clm_weight) == ("fusion-x", 0.9)
            assert (published.feedback_weight, published.asn.objective) == (0.5, "fusion")
            assert {sections[row].selector for row in ("min_ce", "avg_ce")} == {"min_ce", "avg_ce"}
        assert {section.lr for section in sections.values()} == {tuning["train.lr"]}


def test_the_control_is_trained_once_for_all_settings_of_the_demo(tmp_path: Path) -> None:
    study = load_study(bench.STUDY).model_copy(update={"study_dir": str(tmp_path)})
    from fuse_eval.study.grid import Cell

    def folders(row: str) -> list[set[Path]]:
        return [
            {recipe.folder for recipe in Cell(study, place_of(study, name, 1), row).recipes}
            for name in ("demo", *SPOILED)
        ]

    control, ours = folders(CONTROL), folders(OURS)
    assert control[0] == control[1] == control[2]
    assert not ours[0] & ours[1]
    assert not ours[1] & ours[2]


# ------------------------------------------------------------------------------------------- figures


def record_of(**factors: Sequence[float]) -> dict[str, Any]:
    return setting_record(study_of(*factors), "demo", [seen(factors)])


def test_the_worst_domain_is_that_of_ours() -> None:
    found = worst_domain(record_of(control=EVEN, ours=[0.9] * 3 + [1.02] * 3))
    assert (found["domain"], found["value"]) == ("b", pytest.approx(0.02))


def test_ratios_need_a_rival_that_harms() -> None:
    harmless = record_of(**dict.fromkeys(ROWS, EVEN))
    assert interference_ratios([harmless], "every_nats") == dict.fromkeys(RIVALS)
    assert interference_ratios([record_of(control=EVEN, ours=EVEN)], "every_nats") == {}


def test_forecasts_are_shares_saved() -> None:
    study = study_of(CONTROL, OURS)
    factors = {CONTROL: EVEN, OURS: [0.9] * 3 + [1.02] * 3}
    checked = checked_forecasts(seen(factors, FORECAST), study)
    assert checked == {"a": (0.13, pytest.approx(0.1)), "b": (0.0, pytest.approx(-0.02))}
    assert forecast_error([checked]) == pytest.approx(0.05 / 0.12)
    assert ranks_domains_right(checked)
    assert not ranks_domains_right({"a": Forecast(0.0, 0.1), "b": Forecast(0.01, -0.02)})
    assert checked_forecasts(seen(factors), study) == {}
    assert forecast_error([]) is None


def test_whether_any_source_knows_more_than_the_control() -> None:
    pool = {"alone_bpb": {"s": {"a": 0.5, "b": 2.0}, "t": {"a": 0.9, "b": 1.5}}}
    found = seen({CONTROL: EVEN}, pool)
    nats = document_nats(found, CONTROL).reshape(2, -1).sum(1)
    bpb = nats / math.log(2) / (3 * NUM_BLOCKS * BLOCK_BYTES)
    assert best_source_over_control(found, "a") == pytest.approx(0.5 / bpb[0] - 1)
    assert best_source_over_control(found, "b") == pytest.approx(1.5 / bpb[1] - 1)


def test_every_figure_and_its_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPOILED, "spoiled-domain", "b")
    study = study_of(*ROWS)

    def full(ours: Sequence[float], pool: dict[str, Any] | None = None) -> Any:
        """Every rival harms one document."""
        factors = {rival: [1.2, *EVEN[1:]] for rival in RIVALS} | {TODAY: [0.95] * 6}
        return seen({CONTROL: EVEN, OURS: ours, **factors}, pool)

    good, bad = [0.9] * 6, [1.02, *[0.9] * 2, 1.0, 1.0, 1.0]
    forecast = {"forecast": {"a": {"gain": 0.1}, "b": {"gain": 0.12}}}
    pool = forecast | {"alone_bpb": {"s": {"a": 9.0, "b": 9.0}}, "pool_bpb": {}, "target_bpb": {}}
    seeds = {
        "demo": [full(good, pool), full(good)],
        "real": [full(bad)],
        "real-large": [full(good)],
        "spoiled-domain": [full(good, pool)],
    }
    settings = {name: setting_record(study, "demo", found) for name, found in seeds.items()}
    clear, near = Change(-0.1, -0.12, -0.05, (-0.1,)), Change(-0.03, -0.07, 0.01, (-0.03,))
    rates = {"real": {"0.0001": near, "0.0002": clear}, "real-large": {"0.0002": clear}}
    found = all_figures(study, settings, seeds, rates, (1.01, 1.2))
    assert json.loads(json.dumps(found)).keys() == found.keys()
    assert found["worst_domain"].keys() == {"demo", "real", "spoiled-domain"}
    assert found["worst_domain"]["real"]["domain"] == "b"
    assert found["mean_gain_kept"] == pytest.approx(2)
    assert found["mean_gain_real"].keys() == {"45000", "150000"}
    # ours harms the first document by a tenth of what rivals do, in one of four runs that count
    assert found["interference_ratio"] == pytest.approx(dict.fromkeys(RIVALS, 0.02 / 0.2 / 4))
    assert found["interference_ratio_every"] == found["interference_ratio"]
    assert found["forecast_error"] == pytest.approx(0.02 / 0.2)
    assert found["forecast_ranks_right"][1] == 2
    assert set(found["best_source_over_control"]) == {"spoiled-domain"}
    assert OURS in found["settings"]["real-large"]
    met = {name: state for name, _, _, state in bench.goals(found)}
    assert met["worst_domain demo"] is True
    assert met["mean_gain_real 45000 0.0001"] is False  # its interval is not clear of zero
    assert met["mean_gain_real 150000 0.0002"] is True
    assert met["interference_ratio fusion_x"] is True
    assert (met["mean_gain_kept"], met["step_ratio"], met["forecast_error"]) == (True, True, True)
    table = bench.goals_table(found)
    assert "worst_domain demo" in table
    assert "missed" in table


def test_without_gain_nothing_is_said_to_be_kept() -> None:
    assert gain_kept(record_of(control=EVEN, ours=[0.9] * 6, ungated=EVEN)) is None
    assert gain_kept(record_of(control=EVEN, ours=[0.9] * 6)) is None
    assert gain_kept(None) is None


def test_step_times_leave_the_first_steps_out() -> None:
    lines = [json.dumps({"step": 0, "valid_bpb": {}})]
    lines += [json.dumps({"step": i, "seconds": 100 if i <= 3 else i}) for i in range(1, 8)]
    assert median_step(lines) == 5.5
    assert median_step(lines[:3]) == 100


# --------------------------------------------------------------------------------------- a toy pass


def test_toy_pass_and_kept_results(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    run = write_run(tmp_path, tiny_models)
    full = load_study(bench.STUDY)
    demo = full.settings["demo"]
    toy = demo.model_copy(
        update={
            "run": str(run),
            "prepare": (),
            "set": {"evaluate.pool_selectors": ["uniform"]},
            "sources": ("code", "prose"),
            "tune": ({"train.lr": 1e-2}, {"train.lr": 1e-3}),
            "tuned_as": {"ungated": "ours"},
            "rows": (CONTROL, OURS, TODAY),
        }
    )
    real = Setting(like="demo", rows=(CONTROL, OURS))
    settings = {"demo": toy, "real": real}
    study = bench.quick_study(full.model_copy(update={"settings": settings}), tmp_path / "out")
    places = checked_places(study, [], [])
    found, settings_found = bench.measure(study, places, StopFlag(), rounds=1, steps=3)
    assert found["step_ratio"] > 0
    assert found["seconds_ratio"] > 0
    assert set(settings_found["demo"]["rows"]) == {CONTROL, OURS, TODAY}
    assert set(found["mean_gain_real"]["45000"]) == {"0.01", "0.001"}
    assert not list((tmp_path / "out").rglob("final"))
    kept = tmp_path / "out/kept"
    assert sum(p.stat().st_size for p in kept.rglob("*") if p.is_file()) < 100_000

    (tmp_path / "out/demo").rename(tmp_path / "gone")  # another machine
    again, _ = bench.measure(study, places, StopFlag(), rounds=0, steps=3)
    assert not (tmp_path / "out/demo").exists(), "what is kept needs neither models nor stores"
    assert again == found | {"step_ratio": None, "seconds_ratio": None}
