"""Splits: known names are one, and what later stages need is looked for before anything is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from extract.corpus.corpus import corpus_location, open_corpus
from store_schema.config import load_run
from store_schema.plan.run_plan import open_plan
from tests.command import ok, refused
from tests.extract_runs import files_of, write_jsonl, write_run

NO_MODELS = {"code": Path("m/code"), "target": Path("m/target")}
TRAIN: dict[str, Any] = {"train": {"selector": "uniform"}}


def documents(*splits: str) -> list[dict[str, str]]:
    return [
        {"id": f"{split}-{i}", "text": f"{split} {i}. " * 8, "domain": "d", "split": split}
        for split in splits
        for i in range(3)
    ]


def corpus_section(folder: Path, **more: Any) -> dict[str, Any]:
    return {"corpus": {"inputs": [{"path": str(folder / "docs.jsonl")}], **more}}


@pytest.mark.parametrize("name", ["validation", "val", "dev", "eval"])
def test_known_names_of_splits_are_taken_as_one(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "docs.jsonl", documents("training", name, "test", "junk"))
    path = write_run(tmp_path, NO_MODELS, **TRAIN)
    said = ok("corpus", "build", path)
    assert f"{name} taken as valid (3 documents)" in said
    assert "training taken as train (3 documents)" in said
    assert "left out, by split: junk 3" in said
    record = open_corpus(corpus_location(load_run(path)))
    assert {split: sum(n.values()) for split, n in record.documents.items()} == dict.fromkeys(
        ("train", "valid", "test"), 3
    )


def test_names_of_splits_wherever_they_stand(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", documents("train", "validation"))
    path = write_run(tmp_path, NO_MODELS)
    ok("corpus", "build", path)
    first = open_corpus(corpus_location(load_run(path))).corpus_fingerprint
    write_run(tmp_path, NO_MODELS, **corpus_section(tmp_path, splits=["train", "validation"]))
    ok("corpus", "build", path)
    assert open_corpus(corpus_location(load_run(path))).corpus_fingerprint == first
    rows = [{k: v for k, v in d.items() if k != "split"} for d in documents("train")]
    write_jsonl(tmp_path / "docs.jsonl", rows)
    fractions = corpus_section(tmp_path, split_fractions={"validation": 1.0})
    write_run(tmp_path, NO_MODELS, **fractions)
    assert "validation taken as valid (3 documents)" in ok("corpus", "build", path)
    inputs = [{"path": str(tmp_path / "docs.jsonl"), "split": "dev"}]
    write_run(tmp_path, NO_MODELS, corpus={"inputs": inputs})
    assert "dev taken as valid (3 documents)" in ok("corpus", "build", path)


def test_names_of_splits_as_they_are_or_as_the_user_says(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", documents("train", "validation", "held"))
    plain = {"splits": ["train", "validation"], "split_names": {}}
    path = write_run(tmp_path, NO_MODELS, **corpus_section(tmp_path, **plain))
    said = ok("corpus", "build", path)
    assert "taken as" not in said
    record = open_corpus(corpus_location(load_run(path)))
    assert list(record.documents) == ["train", "validation"]
    write_run(tmp_path, NO_MODELS, **corpus_section(tmp_path, split_names={"held": "test"}))
    said = ok("corpus", "build", path)
    assert "held taken as test" in said
    assert "left out, by split: validation 3" in said


@pytest.mark.parametrize(
    ("sections", "there", "missing"),
    [
        (TRAIN, ("train", "test"), "split valid, which train.valid_split needs"),
        (TRAIN, ("valid", "test"), "split train, which train.train_split needs"),
        ({"train": {"valid_split": "held"}}, ("train", "valid", "held"), "split held"),
        ({"evaluate": {"split": "test"}}, ("train", "valid"), "split test, which evaluate.split"),
        (
            {"evaluate": {"split": "dev"}},
            ("train", "valid"),
            "set evaluate.split to valid, the name",
        ),
    ],
)
def test_a_split_that_a_later_stage_needs_is_missed_at_once(
    tmp_path: Path, sections: dict[str, Any], there: tuple[str, ...], missing: str
) -> None:
    write_jsonl(tmp_path / "docs.jsonl", documents(*there))
    path = write_run(tmp_path, NO_MODELS, **sections)
    line = refused("corpus", "build", path)
    assert missing in line
    if "held" in there:
        assert "held (left out)" in line
    assert not (tmp_path / "run/corpus").exists()
    # Who only extracts is told, and gets the corpus.
    write_run(tmp_path, NO_MODELS)
    ok("corpus", "build", path)
    write_run(tmp_path, NO_MODELS, **sections)
    assert missing in refused("corpus", "build", path)  # also where nothing is to do


def test_what_nobody_asked_for_is_only_said(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", documents("train"))
    path = write_run(tmp_path, NO_MODELS)
    said = ok("corpus", "build", path).splitlines()
    assert "no text of split valid, which train.valid_split needs by default" in said
    assert "no text of split test, which evaluate.split needs by default" in said
    careless = {"train": {"keep_best": False, "fusion_gate": {"kind": "none"}}}  # no evaluations
    write_run(tmp_path, NO_MODELS, **careless)
    assert "train.valid_split" not in ok("corpus", "build", path)


def test_a_domain_that_training_will_miss_is_said(tmp_path: Path) -> None:
    rows = documents("train", "valid", "test")
    for row in rows:
        row["domain"] = "law" if row["split"] == "valid" else "code"
    write_jsonl(tmp_path / "docs.jsonl", rows)
    path = write_run(tmp_path, NO_MODELS, **TRAIN)
    assert "no text of law in split train" in ok("corpus", "build", path)
    write_run(tmp_path, NO_MODELS, train={"allow_partial": True})
    assert "no text of law" not in ok("corpus", "build", path)


def test_a_split_without_segments_is_missed_by_the_plan(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    rows = documents("train", "valid", "test")
    for row in rows:
        if row["split"] == "valid":  # its context leaves no room: all of it is dropped
            row["prompt"], row["response"] = "long " * 300, row.pop("text")
    write_jsonl(tmp_path / "docs.jsonl", rows)
    models = {name: tiny_models[name] for name in ("prose", "target")}
    path = write_run(tmp_path, models)
    ok("corpus", "build", path)
    write_run(tmp_path, models, **TRAIN)
    before = files_of(tmp_path / "run")
    line = refused("extract", "plan", path)
    assert "no text of split valid, which train.valid_split needs" in line
    assert files_of(tmp_path / "run") == before
    write_run(tmp_path, models)
    ok("extract", "plan", path)
    assert set(open_plan(load_run(path)).splits()) == {"train", "test"}
    write_run(tmp_path, models, **TRAIN)
    assert "train.valid_split" in refused("extract", "plan", path)
