"""`logitfuse study` from a file to a page, on tiny models: data once, every row, gone on with."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fuse_eval.study.config import load_study
from fuse_eval.study.grid import cells_of, place_of, recipe_of
from fuse_eval.study.records import read_record
from fuse_eval.study.stages import one_at_a_time
from launch.signals import StopFlag
from store_schema.errors import ConfigError, Stopped
from tests.command import ok, refused
from tests.test_end_to_end import write_run
from tests.tiny import SAMPLE_TEXTS

pytestmark = pytest.mark.usefixtures("quick_processes")

PLAIN = {"train.selector": "uniform", "train.clm_weight": 1, "train.fusion_gate.kind": "none"}


def study_file(folder: Path, run: Path, **changed: Any) -> Path:
    """A study of four trained rows and two models as they are, on one seed."""
    content: dict[str, Any] = {
        "name": "tiny",
        "study_dir": str(folder / "study"),
        "results_dir": str(folder / "results"),
        "control": "control",
        "ours": "ours",
        "interference_against": "min_ce",
        "bootstrap_samples": 200,
        "settings": {
            "toy": {
                "run": str(run),
                "seeds": [0, 1],
                "tune": [{"train.lr": 0.001}, {"train.lr": 0.003}],
                "set": {"evaluate.pool_selectors": ["uniform"]},
                "tuned_as": {"min_ce": "ours"},
            },
            "less": {
                "like": "toy",
                "sources": ["prose", "facts"],
                "rows": ["control", "ours"],
                "tune": [{"train.lr": 0.003}],
            },
        },
        "rows": {
            "target before": {"model": "target", "group": "as they are"},
            "code": {"model": "code", "group": "as they are"},
            "control": {"says": "plain training", "set": PLAIN},
            "ours": {"set": {}},
            "min_ce": {"set": {"train.selector": "min_ce"}, "baseline": True},
            "without code": {"without_sources": ["code"], "tuned_as": "ours"},
        },
    }
    if "rows" in changed:
        del content["settings"]["less"], content["settings"]["toy"]["tuned_as"]
    content |= changed
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def studied(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> tuple[Path, str]:
    """A finished study, and what `run` printed."""
    folder = tmp_path_factory.mktemp("study")
    run = write_run(folder, tiny_models)
    content = yaml.safe_load(run.read_text())
    content["train"] |= {"max_steps": 4, "eval_every": 2}
    run.write_text(yaml.safe_dump(content))
    file = study_file(folder, run)
    return file, ok("study", "run", file)


def test_every_row_is_in_the_table_beside_the_control(studied: tuple[Path, str]) -> None:
    file, said = studied
    for title in ("plain training", "ours", "min_ce", "without code", "target before"):
        assert title in said
    record = json.loads((file.parent / "results/study.json").read_text())
    rows = record["settings"]["toy"]["rows"]
    assert set(rows) == set(load_study(file).rows)
    assert all(row["seeds"] == [0, 1] for row in rows.values())
    assert rows["target before"]["bpb"]["mean"] > rows["control"]["bpb"]["mean"]
    for name in ("ours", "min_ce", "without code"):
        change = rows[name]["against_control"]["mean"]
        assert change["low"] <= change["value"] <= change["high"]
        assert change["value"] == pytest.approx(sum(change["seeds"]) / 2)
    assert "ours_against" in rows["min_ce"]
    worst = record["settings"]["toy"]["worst_documents"]
    texts = {text for texts in SAMPLE_TEXTS.values() for text in texts}
    assert worst
    assert all(any(text.startswith(item["text"][:20]) for text in texts) for item in worst)


def test_weights_are_gone_and_scores_are_kept(studied: tuple[Path, str]) -> None:
    file, _ = studied
    study = load_study(file)
    for seed in (0, 1):
        for cell in cells_of(study, place_of(study, "toy", seed)):
            for recipe in cell.recipes:
                assert read_record(recipe.results) is not None
                assert not (recipe.folder / "final").exists()
                assert not (recipe.folder / "checkpoints").exists()


def test_seeds_share_data_where_nothing_names_the_seed(studied: tuple[Path, str]) -> None:
    file, _ = studied
    assert sorted(p.name for p in (file.parent / "study/toy").glob("data*")) == ["data"]


def test_all_trainings_have_the_precision_that_the_first_one_measured(
    studied: tuple[Path, str],
) -> None:
    file, _ = studied
    measured = (file.parent / "results/toy/data.precision.json").read_bytes()
    others = list((file.parent / "study").rglob("precision.json"))
    assert len(others) == 14
    assert all(path.read_bytes() == measured for path in others)


def test_a_row_that_is_tuned_as_another_takes_its_best_recipe(studied: tuple[Path, str]) -> None:
    file, _ = studied
    rows = json.loads((file.parent / "results/study.json").read_text())["settings"]["toy"]["rows"]
    assert rows["without code"]["tuning"] == rows["ours"]["tuning"]


def test_a_setting_like_another_has_its_data_and_its_plain_training(
    studied: tuple[Path, str],
) -> None:
    file, _ = studied
    record = json.loads((file.parent / "results/study.json").read_text())["settings"]
    assert set(record["less"]["rows"]) == {"control", "ours"}
    assert record["toy"]["rows"]["control"]["tuning"] == [{"train.lr": 0.003}] * 2
    assert record["less"]["rows"]["control"]["bpb"] == record["toy"]["rows"]["control"]["bpb"]
    assert record["less"]["rows"]["ours"]["bpb"] != record["toy"]["rows"]["ours"]["bpb"]
    less, more = (record[name]["pools"]["uniform"] for name in ("less", "toy"))
    assert less != more
    assert not (file.parent / "study/less/data").exists()


def test_settings_with_the_same_sources_have_the_same_pools(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("name: small\n")
    content = yaml.safe_load(study_file(tmp_path, run).read_text())
    content["settings"]["short"] = {"like": "toy", "tune": [{"train.text_share": 0.5}]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    study = load_study(path)
    toy, less, short = (place_of(study, n, 1).pool(tmp_path) for n in ("toy", "less", "short"))
    assert short == toy != less


def test_results_alone_are_shown(studied: tuple[Path, str], tmp_path: Path) -> None:
    file, said = studied
    content = yaml.safe_load(file.read_text())
    shutil.copytree(file.parent / "results", tmp_path / "results")
    content |= {"study_dir": str(tmp_path / "study"), "results_dir": str(tmp_path / "results")}
    other = tmp_path / "study.yaml"
    other.write_text(yaml.safe_dump(content, sort_keys=False))
    shown = ok("study", "run", other)  # all is done: nothing is made
    assert shown.splitlines()[:-1] == said.splitlines()[:-1]
    assert not list((tmp_path / "study").rglob("manifest.json"))


def test_again_nothing_is_trained(studied: tuple[Path, str]) -> None:
    file, said = studied
    logs = {path: path.stat().st_mtime_ns for path in file.parent.rglob("train_steps.jsonl")}
    assert len(logs) == 2 * (2 + 2 + 1 + 1 + 1)  # the control of `less` is that of `toy`
    assert ok("study", "run", file) == said
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    planned = ok("study", "plan", file)
    assert "8 of 8" in planned


def test_what_is_lost_is_trained_again_to_the_same_scores(studied: tuple[Path, str]) -> None:
    file, _ = studied
    study = load_study(file)
    cell = next(c for c in cells_of(study, place_of(study, "toy", 1)) if c.name == "control")
    folder = cell.recipes[0].results
    before = read_record(folder)
    shutil.rmtree(folder)
    shutil.rmtree(cell.recipes[0].folder)
    assert "7 of 8" in ok("study", "plan", file)
    ok("study", "run", file, "--setting", "toy", "--seed", "1")
    after = read_record(folder)
    assert before is not None
    assert after is not None
    assert after.valid == before.valid


def test_the_page_loads_nothing_and_says_the_verdict_first(studied: tuple[Path, str]) -> None:
    file, _ = studied
    page = (file.parent / "results/index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.index("verdict") < page.index("<table")
    assert "plain training" in page


def test_workers_share_the_trainings(tmp_path: Path, studied: tuple[Path, str]) -> None:
    file, _ = studied
    content = yaml.safe_load(file.read_text())
    content |= {"study_dir": str(tmp_path / "study"), "results_dir": None}
    shutil.copytree(file.parent / "study/toy/data", tmp_path / "study/toy/data")
    del content["settings"]["less"]
    content["settings"]["toy"]["seeds"] = [0]
    content["settings"]["toy"]["tune"] = [{}]
    other = tmp_path / "study.yaml"
    other.write_text(yaml.safe_dump(content))
    assert "other workers'" in ok("study", "run", other, "--worker", "0/2")
    assert "plain training" in ok("study", "run", other, "--worker", "1/2")


def test_processes_train_side_by_side_what_one_would(
    tmp_path: Path, studied: tuple[Path, str]
) -> None:
    file, _ = studied
    content = yaml.safe_load(file.read_text())
    content |= {"study_dir": str(tmp_path / "study"), "results_dir": None}
    shutil.copytree(file.parent / "study/toy/data", tmp_path / "study/toy/data")
    for setting in content["settings"].values():
        setting |= {"tune": [{"train.lr": 0.003}]}
    content["settings"]["toy"] |= {"seeds": [0], "rows": ["control", "ours", "without code"]}
    other = tmp_path / "study.yaml"
    other.write_text(yaml.safe_dump(content))
    said = ok("study", "run", other, "--processes", "3")
    assert "without code" in said
    assert "other workers'" not in said
    # The plain training that two settings share was done once.
    (shared,) = (tmp_path / "study").rglob("control-*/log.txt")
    assert shared.read_text().count("fused: step 4 of 4") == 1
    alone, together = (
        json.loads((folder / "study.json").read_text())["settings"]["toy"]["rows"]
        for folder in (file.parent / "results", tmp_path / "study")
    )
    assert together["ours"]["seeds"] == [0]
    assert together["control"]["num_tokens"] == alone["control"]["num_tokens"]
    refused_line = refused("study", "run", other, "--processes", "2", "--worker", "0/2")
    assert "goes without --worker" in refused_line


def test_a_worker_waits_for_another_one_at_the_same_training(tmp_path: Path) -> None:
    stop, order = StopFlag(), []

    def other() -> None:
        with one_at_a_time(tmp_path, stop):
            order.append("other")

    with one_at_a_time(tmp_path, stop):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.4)
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "other"]
    stop.ask(signal.SIGTERM)
    with pytest.raises(Stopped), one_at_a_time(tmp_path, stop):
        pass


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"control": "plain"}, "no row 'plain'"),
        ({"ours": "our"}, "no row 'our'"),
        ({"ours": "control"}, "ours is the control itself"),
        ({"rows": {"control": {"set": {"corpus.seed": 3}}}}, "rows differ in preset, align and"),
        ({"rows": {"control": {"model": "target"}}}, "so it needs one"),
        ({"rows": {"control": {}, "x": {"tuned_as": "y"}}}, "tuned as 'y'"),
        ({"rows": {"control": {}, "x": {"tuned_as": "z"}, "z": {"model": "code"}}}, "tuned as 'z'"),
        (
            {"rows": {"control": {"set": {"train.lr": 1}}}},
            "sets train.lr, which setting 'toy' tunes",
        ),
        (
            {"rows": {"control": {}, "x": {"sources": ["code"], "add_sources": ["prose"]}}},
            "it goes without add_sources",
        ),
        (
            {"rows": {"control": {}, "x": {"model": "code", "without_sources": ["a"]}}},
            "not trained",
        ),
        ({"split": 3}, "split"),
        ({"settings": {}}, "settings"),
        ({"settings": {"a": {}}}, "either `run` or `like`"),
        (
            {"settings": {"a": {"run": "r"}, "b": {"like": "c"}}},
            "'b' is like 'c', which has no run",
        ),
        ({"settings": {"a": {"run": "r"}, "b": {"like": "a", "seeds": [1]}}}, "seeds is that of"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    more: dict[str, Any] = {"ours": None, "interference_against": None} | changed
    file = study_file(tmp_path, tmp_path / "run.yaml", **more)
    with pytest.raises(ConfigError, match="study file refused") as caught:
        load_study(file)
    assert told in caught.value.line()


def test_a_row_has_the_settings_sources_with_some_added_and_some_left_out(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    rows = {
        "control": {"set": PLAIN},
        "all": {"add_sources": ["code"]},
        "fewer": {"without_sources": ["facts"]},
        "other": {"add_sources": ["code"], "without_sources": ["prose"]},
        "named": {"sources": ["facts", "code"]},
    }
    settings = {
        "two of three": {
            "run": str(write_run(tmp_path, tiny_models)),
            "sources": ["prose", "facts"],
        }
    }
    more: dict[str, Any] = {"ours": None, "interference_against": None}
    study = load_study(study_file(tmp_path, tmp_path, rows=rows, settings=settings, **more))
    place = place_of(study, "two of three", 0)
    found = {name: list(recipe_of(study, place, name, {}).run.sources) for name in rows}
    assert found == {
        "control": ["prose", "facts"],
        "all": ["code", "prose", "facts"],
        "fewer": ["prose"],
        "other": ["code", "facts"],
        "named": ["code", "facts"],
    }


def test_a_source_or_value_that_is_not_there_is_told_before_training(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    run = write_run(tmp_path, tiny_models)
    rows: dict[str, Any] = {"control": {"set": PLAIN}}
    more: dict[str, Any] = {"ours": None, "interference_against": None}
    for key in ("sources", "add_sources", "without_sources"):
        rows["x"] = {key: ["cod"]}
        file = study_file(tmp_path, run, rows=rows, **more)
        assert "expected one of code, prose, facts, got cod" in refused("study", "plan", file)
    rows["x"] = {"without_sources": ["code", "prose", "facts"]}
    file = study_file(tmp_path, run, rows=rows, **more)
    assert "no source is left" in refused("study", "plan", file)
    rows["x"] = {"set": {"train.selectr": "asn"}}
    file = study_file(tmp_path, run, rows=rows, **more)
    assert "did you mean selector?" in refused("study", "plan", file)
    rows["x"] = {"set": {"train.weight_decay": -1}}
    file = study_file(tmp_path, run, rows=rows, **more)
    assert "weight_decay" in refused("study", "run", file)
    assert "no such setting" in refused("study", "plan", file, "--setting", "tox")
    assert "study file not found" in refused("study", "plan", tmp_path / "none.yaml")
    assert "nothing to show yet" in refused(
        "study", "show", study_file(tmp_path, run, rows={"control": {"set": PLAIN}}, **more)
    )


def test_another_model_as_it_is_has_another_place(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    run = write_run(tmp_path, tiny_models)
    places = set()
    for model in ("target", "code", "prose", str(tiny_models["code"])):
        rows = {"control": {"set": PLAIN}, "x": {"model": model}}
        file = study_file(tmp_path, run, rows=rows, ours=None, interference_against=None)
        study = load_study(file)
        cells = cells_of(study, place_of(study, "toy", 0))
        places |= {cell.model_results for cell in cells if cell.name == "x"}
    assert len(places) == 4


def test_a_command_that_fails_says_its_last_line_and_where_its_log_is(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    run = write_run(tmp_path, tiny_models)
    settings = {
        "toy": {
            "run": str(run),
            "prepare": [["python", "-c", "import sys; sys.exit('no inputs today, {seed}')"]],
        }
    }
    more: dict[str, Any] = {"ours": None, "interference_against": None, "settings": settings}
    file = study_file(tmp_path, run, rows={"control": {"set": PLAIN}}, **more)
    told = refused("study", "run", file)
    assert "got no inputs today, 0" in told
    assert "log.txt has all it said" in told
