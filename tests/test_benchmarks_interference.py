"""`make bench-interference`: right figures from made-up scores, and a toy pass through all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
import pytest
import yaml

from benchmarks import bench_interference as bench
from benchmarks import interference_settings as asked
from benchmarks import recipes
from benchmarks.interference_figures import (
    MEAN,
    Change,
    Seen,
    all_figures,
    best_pair,
    best_source_over_control,
    changes,
    checked_forecasts,
    excess,
    forecast_error,
    gain_kept,
    interference_ratios,
    ranks_domains_right,
    rate_pair,
    worst,
)
from benchmarks.interference_settings import CONTROL, METHODS, OURS, TODAY, Data, Recipe, Setting
from benchmarks.interference_steps import median_step
from benchmarks.interference_text import TestText
from fuse_eval.interference.blocks import Blocks
from fuse_train.cli import train
from fuse_train.config import TrainSection
from logitfuse import main
from store_schema.config import load_run
from tests import eval_run

NUM_BLOCKS, BLOCK_BYTES = 12, 100
DOMAINS = ("a", "a", "a", "b", "b", "b")
"""Of the documents."""


def seen(
    factors: Mapping[Recipe, Sequence[float]],
    valid: Mapping[Recipe, float] | None = None,
    forecast: Mapping[str, float] | None = None,
) -> Seen:
    """Each recipe's NLL is the same text's, times a factor for each of the six documents."""
    rng = np.random.default_rng(3)
    base = rng.uniform(50, 90, (len(DOMAINS), NUM_BLOCKS))
    count = base.size
    return Seen(
        valid=valid or dict.fromkeys(factors, 1.0),
        blocks=Blocks(
            document_ids=tuple(f"d{i}" for i in range(len(DOMAINS)) for _ in range(NUM_BLOCKS)),
            segment_ids=tuple(f"d{i}#0" for i in range(len(DOMAINS)) for _ in range(NUM_BLOCKS)),
            domains=tuple(domain for domain in DOMAINS for _ in range(NUM_BLOCKS)),
            numbers=np.tile(np.arange(NUM_BLOCKS, dtype=np.int32), len(DOMAINS)),
            num_bytes=np.full(count, BLOCK_BYTES, np.int64),
            nats={str(r): (base * np.asarray(f)[:, None]).ravel() for r, f in factors.items()},
        ),
        alone={"s": {"a": 0.5, "b": 2.0}, "t": {"a": 0.9, "b": 1.5}},
        forecast=forecast,
    )


def recipe(method: str, lr: float = 1e-3, epochs: float = 1) -> Recipe:
    return Recipe(method, lr, epochs)


EVEN = [1.0] * 6


# ------------------------------------------------------------------------------------ what is trained


def test_ours_and_the_control_have_the_same_recipes_and_others_some_of_them() -> None:
    for name, setting in asked.all_settings(Path("out")).items():
        by_method: dict[str, list[tuple[float, float]]] = {}
        for one in setting.recipes():
            by_method.setdefault(one.method, []).append((one.lr, one.epochs))
        assert len(set(setting.grid)) == (2 if name == asked.LARGE else 3)
        for method, pairs in by_method.items():
            tuned = method in (CONTROL, OURS)
            assert sorted(pairs) == sorted(setting.grid if tuned else setting.others_grid)
        assert set(setting.others_grid) <= set(setting.grid)
        assert (setting.others_grid == setting.grid) == name.startswith("real")
        assert {CONTROL, OURS} <= by_method.keys()
        assert (TODAY in by_method) == (name == "demo")
    for grid in asked.GRIDS["real"], asked.GRID_OF_LARGE:
        assert set(asked.REAL_RATES) == {lr for lr, _ in grid}


def test_every_recipe_is_one_that_training_takes(tmp_path: Path) -> None:
    for setting in asked.all_settings(tmp_path).values():
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(setting.run(setting.data[0])))
        sections = {
            one.method: load_run(file, one.overrides).section("train", TrainSection)
            for one in setting.recipes()
        }
        control = sections[CONTROL]
        assert (control.selector, control.clm_weight) == ("uniform", 1.0)
        gates = {name: section.fusion_gate.kind for name, section in sections.items()}
        ours = gates.pop(OURS)
        assert ours != "none"
        assert set(gates.values()) == {"none"}
        assert sections[OURS].clm_weight == setting.data[0].run["train"]["clm_weight"]
        if "fusion_x" in sections:
            published = sections["fusion_x"]
            assert (published.asn.preset, published.clm_weight) == ("fusion-x", 0.9)
            assert (published.feedback_weight, published.asn.objective) == (0.5, "fusion")
            assert {sections[name].selector for name in ("min_ce", "avg_ce")} == {
                "min_ce",
                "avg_ce",
            }
        lrs = {name: section.lr for name, section in sections.items()}
        assert {lrs.pop(CONTROL), lrs.pop(OURS)} == {setting.grid[-1][0]}
        assert set(lrs.values()) <= {setting.others_grid[-1][0]}


def test_settings_share_data_and_differ_in_sources(tmp_path: Path) -> None:
    settings = asked.all_settings(tmp_path)
    demo, domain = settings["demo"], settings["spoiled-domain"]
    wrong = settings["spoiled-source"]
    assert [data.seed for data in demo.data] == [0, 1, 2]
    assert demo.data == domain.data == wrong.data
    assert set(demo.run(demo.data[1])["sources"]) == {"code", "prose", "facts"}
    assert set(domain.run(demo.data[1])["sources"]) == {"code", "facts"}
    run = wrong.run(demo.data[1])
    assert set(run["sources"]) == {"code", "prose", "wrong_facts"}
    assert run["sources"]["wrong_facts"]["model"] == f"{tmp_path}/demo-1/inputs/models/wrong_facts"
    assert (run["seed"], run["data_dir"]) == (1, f"{tmp_path}/demo-1")
    assert len(settings["real"].data) == 1
    texts = [item["path"] for item in settings["real-large"].data[0].run["corpus"]["inputs"]]
    assert texts[0] == "runs/real/inputs/text-150000/german.jsonl"


def test_settings_are_chosen_by_name() -> None:
    settings = asked.all_settings(Path("out"))
    assert [s.name for s in bench.chosen("demo, real", settings)] == ["demo", "real"]
    assert bench.chosen("", settings) == list(settings.values())
    with pytest.raises(click.UsageError, match=r"no setting 'dem': there are real, demo"):
        bench.chosen("dem", settings)


# ------------------------------------------------------------------------------------------- figures


def test_the_best_recipe_is_that_of_the_valid_split() -> None:
    valid = {
        recipe(OURS, 1e-3, 1): 1.3,
        recipe(OURS, 1e-3, 2): 1.2,
        recipe(OURS, 2e-3, 1): 1.1,
        recipe(CONTROL, 1e-3, 2): 1.0,
        recipe(CONTROL, 2e-3, 1): 1.4,
    }
    found = seen(dict.fromkeys(valid, EVEN), valid)
    assert best_pair(OURS)(found) == (recipe(OURS, 2e-3, 1), recipe(CONTROL, 1e-3, 2))
    assert rate_pair(1e-3)(found) == (recipe(OURS, 1e-3, 2), recipe(CONTROL, 1e-3, 2))
    assert rate_pair(2e-3)(found) == (recipe(OURS, 2e-3, 1), recipe(CONTROL, 2e-3, 1))
    assert found.methods == [OURS, CONTROL]


def test_changes_are_relative_to_the_control_and_means_of_seeds() -> None:
    better = seen({recipe(CONTROL): EVEN, recipe(OURS): [0.9] * 3 + [1.02] * 3})
    worse = seen({recipe(CONTROL): EVEN, recipe(OURS): [1.1] * 3 + [1.02] * 3})
    one = changes([better], best_pair(OURS))
    assert one["a"] == pytest.approx((-0.1, -0.1, -0.1))  # the same in every draw
    assert one["b"] == pytest.approx((0.02, 0.02, 0.02))
    nats = better.blocks.nats
    sums = {name: values.reshape(2, -1).sum(1) for name, values in nats.items()}
    ours, control = sums[str(recipe(OURS))], sums[str(recipe(CONTROL))]
    assert one[MEAN].value == pytest.approx(ours.mean() / control.mean() - 1)
    both = changes([better, worse], best_pair(OURS))
    assert both["a"] == pytest.approx((0, 0, 0), abs=1e-12)
    assert worst(both) == ("b", both["b"])


def test_intervals_are_of_documents_drawn_within_domains() -> None:
    factors = [0.8, 1.0, 1.2, 1.0, 1.0, 1.0]
    found = seen({recipe(CONTROL): EVEN, recipe(OURS): factors})
    change = changes([found], best_pair(OURS), samples=20_000)["a"]
    nats = found.blocks.nats[str(recipe(CONTROL))].reshape(6, -1).sum(1)[:3]
    drawn = np.random.default_rng(1).integers(0, 3, (20_000, 3))
    ratios = (nats * factors[:3])[drawn].sum(1) / nats[drawn].sum(1) - 1
    # Ten sets of documents can be drawn, so quantiles of many draws are the same values.
    assert change[1:] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=1e-9)
    two = changes([found, found], best_pair(OURS), samples=20_000)["a"]
    assert two.value == pytest.approx(change.value)
    assert two.high - two.low < 0.9 * (change.high - change.low)


def test_excess_is_of_documents_worse_beyond_the_noise() -> None:
    factors = [1.05, 0.5, 1.0, 1.1, 1.0, 0.9]
    found = seen({recipe(CONTROL): EVEN, recipe(OURS): factors})
    nats = found.blocks.nats[str(recipe(CONTROL))].reshape(6, -1).sum(1)
    assert excess(found, OURS) == pytest.approx((0.05 * nats[0] + 0.1 * nats[3],) * 2)
    assert excess(found, CONTROL) == (0, 0)
    noisy = seen({recipe(CONTROL): EVEN, recipe(OURS): EVEN})
    noisy.blocks.nats[str(recipe(OURS))][:4] += [5.0, 4.0, -3.0, -1.0]
    assert excess(noisy, OURS) == pytest.approx((0, 5))


def test_ratios_need_a_rival_that_harms() -> None:
    harmless = seen({recipe(name): EVEN for name in METHODS})
    assert interference_ratios([harmless])["every"] == dict.fromkeys(asked.RIVALS)
    assert interference_ratios([seen({recipe(CONTROL): EVEN, recipe(OURS): EVEN})]) == {
        "beyond_noise": {},
        "every": {},
    }


def test_forecasts_are_shares_saved() -> None:
    both = {recipe(CONTROL): EVEN, recipe(OURS): [0.9] * 3 + [1.02] * 3}
    checked = checked_forecasts(seen(both, forecast={"a": 0.13, "b": 0.0}))
    assert checked == {"a": (0.13, pytest.approx(0.1)), "b": (0.0, pytest.approx(-0.02))}
    assert forecast_error([checked]) == pytest.approx(0.05 / 0.12)
    assert ranks_domains_right(checked)
    turned = checked_forecasts(seen(both, forecast={"a": 0.0, "b": 0.01}))
    assert not ranks_domains_right(turned)
    assert checked_forecasts(seen(both)) is None
    assert forecast_error([]) is None


def test_whether_any_source_knows_more_than_the_control() -> None:
    found = seen({recipe(CONTROL): EVEN})
    nats = found.blocks.nats[str(recipe(CONTROL))].reshape(2, -1).sum(1)
    bpb = nats / math.log(2) / (3 * NUM_BLOCKS * BLOCK_BYTES)
    assert best_source_over_control(found, "a") == pytest.approx(0.5 / bpb[0] - 1)
    assert best_source_over_control(found, "b") == pytest.approx(1.5 / bpb[1] - 1)


def full(ours: Sequence[float], forecast: Mapping[str, float] | None = None) -> Seen:
    """All methods at the two rates of published models; every rival harms one document."""
    factors = {
        Recipe(method, lr, 2): [1.2, *EVEN[1:]]
        for method in ("min_ce", "avg_ce", "fusion_x")
        for lr in asked.REAL_RATES
    }
    for lr in asked.REAL_RATES:
        factors |= {
            Recipe(CONTROL, lr, 2): EVEN,
            Recipe(OURS, lr, 2): ours,
            Recipe(TODAY, lr, 2): [0.95] * 6,
        }
    return seen(factors, forecast=forecast)


def test_every_figure_and_its_goal() -> None:
    good, bad = [0.9] * 6, [1.02, *[0.9] * 2, 1.0, 1.0, 1.0]
    found = all_figures(
        {
            "demo": [full(good, {"a": 0.1, "b": 0.12}), full(good)],
            "real": [full(bad)],
            "real-large": [full(good)],
        },
        {"demo": "b", "spoiled-domain": "b"},
        (1.01, 1.2),
    )
    assert json.loads(json.dumps(found)) == found
    assert found["worst_domain"].keys() == {"demo", "real"}
    assert found["worst_domain"]["demo"]["value"] == pytest.approx(-0.1)
    assert found["worst_domain"]["real"]["domain"] == "b"
    assert found["mean_gain_kept"] == pytest.approx(2)
    assert found["mean_gain_real"].keys() == {"45000", "150000"}
    assert found["mean_gain_real"]["150000"]["0.0001"] == pytest.approx(
        {"value": -0.1, "low": -0.1, "high": -0.1}
    )
    # ours harms the first document by a tenth of what rivals do, in one of three runs that count
    assert found["interference_ratio"] == pytest.approx(
        dict.fromkeys(("min_ce", "avg_ce", "fusion_x"), 0.02 / 0.2 / 3)
    )
    assert found["interference_ratio_every"] == found["interference_ratio"]
    assert found["forecast_error"] == pytest.approx(0.02 / 0.2)
    assert found["forecast_ranks_right"][1] == 1
    assert found["settings"]["real-large"][OURS]["recipes"] == [str(Recipe(OURS, 1e-4, 2))]
    assert set(found["best_source_over_control"]) == {"demo"}
    met = {name: state for name, _, _, state in bench.goals(found)}
    assert met["worst_domain demo"] is True
    assert met["worst_domain real"] is True
    assert met["mean_gain_real 45000 0.0001"] is False  # its interval is not clear of zero
    assert met["mean_gain_real 150000 0.0002"] is True
    assert met["interference_ratio fusion_x"] is True
    assert (met["mean_gain_kept"], met["step_ratio"], met["forecast_error"]) == (True, True, True)
    table = bench.goals_table(found)
    assert "worst_domain demo" in table
    assert "missed" in table
    assert "fusion_x" in bench.settings_table(found)


def test_without_gain_nothing_is_said_to_be_kept() -> None:
    both = {recipe(CONTROL): EVEN, recipe(OURS): [0.9] * 6, recipe(TODAY): EVEN}
    assert gain_kept([seen(both)]) is None
    assert gain_kept([]) is None
    assert worst({"a": Change(0.1, 0, 0.2), MEAN: Change(1, 1, 1)})[0] == "a"


def test_step_times_leave_the_first_steps_out() -> None:
    lines = [json.dumps({"step": 0, "valid_bpb": {}})]
    lines += [json.dumps({"step": i, "seconds": 100 if i <= 3 else i}) for i in range(1, 8)]
    assert median_step(lines) == 5.5
    assert median_step(lines[:3]) == 100


# --------------------------------------------------------------------------------------- a toy pass


def test_toy_pass_and_resume(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    sample_texts: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = eval_run.make_run(
        tmp_path / "data",
        tiny_models,
        sample_texts,
        train={
            **{"valid_split": "test", "batch_segments": 4, "micro_batch_segments": 4},
            **{"asn": {"pretrain_steps": 2, "hidden_size": 8}, "trackers": []},
        },
        evaluate={"bootstrap_samples": 200},
    )
    content = yaml.safe_load((tmp_path / "data" / "run.yaml").read_text())
    data = Data(Path(run.folder), tmp_path / "work", 0, content)
    grid = ((1e-2, 1), (1e-3, 1))
    setting = Setting("demo", (data,), ("code", "prose"), grid, grid, (CONTROL, OURS))
    calls: list[list[str]] = []

    def in_process(words: Sequence[str]) -> None:
        calls.append(list(words))
        command, rest = (train, words[1:]) if words[0] == "fuse_train" else (main, words[1:])
        with pytest.raises(SystemExit) as ended:
            command.main(list(rest))
        assert ended.value.code == 0

    monkeypatch.setattr(recipes, "run_module", in_process)
    kept = tmp_path / "kept"
    first = bench.measure([setting], kept, quick=True)
    trainings = sorted((tmp_path / "work" / "trainings").glob("*/*"))
    assert len(trainings) == 4
    for folder in trainings:
        assert {path.name for path in folder.iterdir()} >= {
            "recipe.json",
            "scores.json",
            "valid.json",
        }
        assert not (folder / "final").exists()
        assert not (folder / "checkpoints").exists()
    assert first["step_ratio"] > 0
    assert first["seconds_ratio"] > 0
    methods = first["settings"]["demo"]
    assert set(methods) == {CONTROL, OURS}
    assert set(methods[OURS]["changes"]) == {*sample_texts, MEAN}
    ours = min(
        (recipes.mean(recipes.best_evaluation(json.loads((f / "valid.json").read_text()))[1]), f)
        for f in trainings
        if f.name.startswith(OURS)
    )[1]
    assert ours.name.startswith(methods[OURS]["recipes"][0].replace(" ", "-").replace("=", "-"))

    calls.clear()
    (trainings[0] / "valid.json").unlink()  # stopped before it was finished
    (kept / trainings[0].relative_to(tmp_path) / "valid.json").unlink()
    again = bench.measure([setting], kept, quick=True, with_steps=False)
    assert [words[0] for words in calls] == ["logitfuse", "fuse_train"]
    assert (again["step_ratio"], again["seconds_ratio"]) == (None, None)
    timed = {"step_ratio": None, "seconds_ratio": None}
    assert again == first | timed

    calls.clear()
    for folder in (tmp_path / "work", Path(run.folder)):  # another machine
        folder.rename(folder.with_name(f"{folder.name}-gone"))
    elsewhere = bench.measure([setting], kept, quick=True, with_steps=False)
    assert not calls, "what is whole in --kept needs neither models nor stores"
    assert elsewhere == first | timed
    Path(run.folder).with_name(f"{Path(run.folder).name}-gone").rename(run.folder)
    record = kept / data.work.name / "text.json"
    record.write_text(record.read_text().replace('"plan_fingerprint":"', '"plan_fingerprint":"0'))
    with pytest.raises(click.ClickException, match=r"text\.json is of another plan than .*--kept"):
        TestText(data, kept).score(tmp_path)
    assert sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) < 50_000
