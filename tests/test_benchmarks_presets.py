"""`make bench-presets`: what it trains, and its figures from answers that are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from check_answer import right
from questions import TOPICS, by_split, questions

from benchmarks.presets_figures import Seen, points_apart, world_figures
from benchmarks.presets_variants import (
    BASE,
    CONTROL,
    CONTROL_ALL,
    INFERENCE,
    PROGRESSIVE,
    RIGHT_ALL,
    TRAINING,
    VARIANTS,
    override_words,
    real_world,
    toy_world,
)
from fuse_train.config import TrainSection
from store_schema.config import load_run


def test_every_variant_is_a_run_that_training_takes(tmp_path: Path) -> None:
    for world in toy_world(tmp_path, 1), real_world(tmp_path):
        world.write_run_files()
        for name, variant in VARIANTS.items():
            words = override_words(variant.train_section(100, 1e-3))
            overrides = [word for word in words if word != "--set"]
            run = load_run(world.teach_file(variant), overrides)
            section = run.section("train", TrainSection)
            assert run.seed == world.seed
            assert section.stages is not None
            assert sum(stage.steps or 0 for stage in section.stages) == 100
            assert section.lr == 1e-3
            assert not section.control
            assert (BASE in run.sources) == variant.base
            best = "ask-right" if variant.right else "ask"
            inputs = run.sections["corpus"].content()["inputs"]
            assert inputs[1]["path"] == str(world.folder / best / "judged/best.parquet")
            plain = name in (CONTROL, CONTROL_ALL, RIGHT_ALL)
            assert (section.clm_weight == 1) == plain
            assert (section.pairwise is not None) == name.startswith("pairwise")
        ask = yaml.safe_load(world.ask_file.read_text())
        again = yaml.safe_load(world.ask_right_file.read_text())
        assert again["judge"]["judges"] == [ask["judge"]["judges"][0] | {"min_score": 1}]
        assert set(ask["sources"]) < {*load_run(world.folder / "teach.yaml").sources, "x"}


def seen(right_of: list[float]) -> Seen:
    return Seen(right_of, ["a", "a", "b", "b"], {"a": 1.0, "b": 3.0}, 1e-3)


def test_points_are_means_of_domains_and_seeds() -> None:
    seeds = [
        {CONTROL: seen([0, 0, 0, 1]), PROGRESSIVE: seen([1, 0, 1, 1])},
        {CONTROL: seen([1, 1, 0, 0]), PROGRESSIVE: seen([1, 1, 0, 1])},
    ]
    found = points_apart(seeds, PROGRESSIVE, CONTROL)
    assert found["value"] == pytest.approx(100 * (0.5 + 0.25) / 2)
    assert (found["low_seed"], found["high_seed"]) == (25.0, 50.0)
    assert found["low"] < found["value"] < found["high"]
    nothing = points_apart(seeds, CONTROL, CONTROL)
    assert (nothing["value"], nothing["low"], nothing["high"]) == (0.0, 0.0, 0.0)
    assert seeds[0][CONTROL].accuracy == 0.25
    assert seeds[0][CONTROL].mean_bpb == 2.0


def test_profuser_is_held_against_the_better_single_mode() -> None:
    variants = {
        CONTROL: seen([0, 0, 0, 0]),
        INFERENCE: seen([1, 0, 0, 0]),
        TRAINING: seen([1, 1, 0, 0]),
        PROGRESSIVE: seen([1, 1, 1, 0]),
    }
    found = world_figures([variants])
    assert found["profuser_minus_control"]["value"] == 75.0
    assert found["profuser_minus_best_single_mode"]["value"] == 25.0
    assert found["variants"][TRAINING]["minus_control"]["value"] == 50.0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("level", TOPICS)
def test_no_question_is_asked_twice(level: str) -> None:
    found = list(questions(level, {"test": 30, "valid": 5, "train": 20}, 3))
    assert len({q.prompt for q in found}) == len(found) == 55 * len(TOPICS[level])
    assert len({q.id for q in found}) == len(found)
    assert [q.prompt for q in questions(level, {"test": 30}, 3)] == [
        q.prompt for q in by_split(found, "test")
    ]
    if level == "easy":
        assert len({(q.topic, q.final) for q in found}) == len(found)


def test_given_answers_are_right_and_those_to_other_questions_wrong() -> None:
    found = list(questions("full", {"test": 25}, 1))
    for question, other in zip(found, found[1:] + found[:1], strict=True):
        asked = {"domain": question.topic, "reference": question.answer}
        assert right(asked | {"answer": question.answer}) == 1.0
        assert right(asked | {"answer": "I do not know."}) == 0.0
        if question.topic == other.topic and question.final != other.final:
            assert right(asked | {"answer": other.answer}) == 0.0


@pytest.mark.parametrize(
    ("domain", "reference", "answer", "expected"),
    [
        ("sums", "The answer is 12.", "So it is 12 apples, that is **12**.", 1.0),
        ("sums", "The answer is 1200.", "1,200", 1.0),
        ("lists", "The answer is 1, 2, 3.", "Sorted: [1, 2, 3]", 1.0),
        ("lists", "The answer is 1, 2, 3.", "3, 2, 1", 0.0),
        ("words", "The answer is red tea.", "In reverse order they are:\nRed tea", 1.0),
        ("code", "def add(a, b):\n    return a + b", "def add(a, b):\n    return b + a", 1.0),
        (
            "code",
            "def add(a, b):\n    return a + b",
            "```python\ndef add(x, y): return x\n```",
            0.0,
        ),
        ("code", "def add(a, b):\n    return a + b", "def add(a, b) return", 0.0),
    ],
)
def test_answers_are_read_as_models_write_them(
    domain: str, reference: str, answer: str, expected: float
) -> None:
    assert right({"domain": domain, "reference": reference, "answer": answer}) == expected
