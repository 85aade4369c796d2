"""Right answers in a study: who is asked, what is kept, and the figures against the plain way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fuse_eval.study.answers import ANSWERS_FILE, AnswerRecord, read_answers
from fuse_eval.study.figures import MEAN, right_answers, setting_record
from fuse_eval.study.records import Gate, made_gate
from fuse_eval.study.report import markdown, text
from fuse_eval.study.results import SeedResult
from store_schema.errors import CorruptionError
from tests.command import ok, refused
from tests.extract_runs import write_jsonl, write_run
from tests.judge_runs import make_models
from tests.study_results import EVEN, seen, study_of, training
from tests.test_study import PLAIN

# ---- figures ---------------------------------------------------------------------------------------

DOMAINS = ("maths", "maths", "maths", "words", "words")


def answered(right: dict[str, tuple[float | None, ...]], seed: int = 0) -> SeedResult:
    """One seed at which rows answered five prompts."""
    ids = tuple(f"q{i}" for i in range(len(DOMAINS)))
    records = {
        row: AnswerRecord(document_ids=ids, domains=DOMAINS, right=values)
        for row, values in right.items()
    }
    return replace(seen(dict.fromkeys(right, EVEN), seed=seed), answers=records)


def test_shares_are_of_domains_and_changes_in_points() -> None:
    study = study_of("control", "ours", bootstrap_samples=20_000)
    found = answered({"control": (1, 0, 0, 1, 0), "ours": (1, 1, 0, 0, None)})
    told = right_answers([found], "ours", "control", study)
    assert told["share"] == pytest.approx({"maths": 2 / 3, "words": 0, MEAN: 1 / 3})
    change = told["against_control"]
    assert change["maths"]["value"] == pytest.approx(1 / 3)
    assert change["words"]["value"] == pytest.approx(-1 / 2)
    assert change[MEAN]["value"] == pytest.approx(-1 / 12)
    rng = np.random.default_rng(1)
    drawn = np.array([0.0, 1.0, 0.0])[rng.integers(0, 3, (20_000, 3))].mean(1)
    drawn += np.array([-1.0, 0.0])[rng.integers(0, 2, (20_000, 2))].mean(1)
    low, high = np.quantile(drawn / 2, [0.025, 0.975])
    assert (change[MEAN]["low"], change[MEAN]["high"]) == pytest.approx((low, high), abs=1e-9)
    alone = right_answers([found], "control", None, study)
    assert alone == {"share": pytest.approx({"maths": 1 / 3, "words": 1 / 2, MEAN: 5 / 12})}


def test_a_prompt_that_no_row_has_a_score_for_is_left_out() -> None:
    found = answered({"control": (1, None, 0, 1, 0), "ours": (1, None, 0, None, 0)})
    told = right_answers([found], "ours", "control", study_of("control", "ours"))
    assert told["share"] == pytest.approx({"maths": 1 / 2, "words": 0, MEAN: 1 / 4})


def test_tables_have_answers_and_gates() -> None:
    gate = Gate(weight={"a": 0.7, "b": 0.3}, spread={"a": 0.2, "b": 0.2}, spread_within={"a": 0.1})
    gate = gate.model_copy(update={"spread_within": {"a": 0.1, "b": 0.15}})
    study = study_of("control", "ours")
    found = answered({"control": (1, 0, 0, 1, 0), "ours": (1, 1, 0, 1, 0)})
    trainings = {"control": training("control"), "ours": training("ours")}
    trainings["ours"] = trainings["ours"].model_copy(update={"gate": gate})
    pool = {"pool_bpb": {"uniform": {"a": 1.5, "b": 2.0}}, "target_bpb": {"a": 3.0, "b": 3.0}}
    found = replace(found, trainings=trainings, pool=pool)
    record = {"settings": {"demo": setting_record(study, "demo", [found, found])}, "study": {}}
    row = record["settings"]["demo"]["rows"]["ours"]
    assert row["gate"]["spread_within"] == pytest.approx({"a": 0.1, "b": 0.15})
    assert "gate" not in record["settings"]["demo"]["rows"]["control"]
    for told in (text(study, record), markdown(study, record)):
        assert "58.3" in told  # of ours: (2/3 + 1/2) / 2
        assert "+16.7" in told
        assert "0.15" in told
        assert "1.75" in told  # the mean of the pool
    json.dumps(record, allow_nan=False)


def test_gates_are_those_of_the_last_quarter() -> None:
    def line(step: int, weight: float, spread: float) -> dict[str, Any]:
        both = {"a": weight, "b": 1 - weight}
        by_domain = {"x": {"a": 0.1, "b": 0.1}, "y": {"a": 0.3, "b": 0.3}}
        spreads = {"a": spread, "b": spread}
        return {
            "step": step,
            "weights": both,
            "weight_spread": spreads,
            "weight_spread_by_domain": by_domain,
        }

    early = [line(step, 0.9, 0.0) for step in range(6)]
    gate = made_gate([{"step": 0}, *early, line(6, 0.5, 0.2), line(7, 0.7, 0.4)])
    assert gate is not None
    assert gate.weight == pytest.approx({"a": 0.6, "b": 0.4})
    assert gate.spread == pytest.approx({"a": 0.3, "b": 0.3})
    assert gate.spread_within == pytest.approx({"a": 0.2, "b": 0.2})
    assert made_gate([{"step": 0}, {"step": 1, "loss": 2.0}]) is None
    assert made_gate([line(1, 0.9, 0.1)]) is not None


# ---- the command -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_processes")
def test_every_model_is_asked_once(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    write_jsonl(
        tmp_path / "docs.jsonl",
        [
            {
                "id": f"{split}-{n}",
                "prompt": f"What is {n} + 4?",
                "response": f"It is {n + 4}.",
                "domain": "sums",
                "split": split,
            }
            for split in ("train", "valid", "test")
            for n in range(6)
        ],
    )
    train = {"max_steps": 2, "eval_every": 1, "asn": {"pretrain_steps": 1}}
    run = write_run(
        tmp_path,
        models,
        corpus={"inputs": [{"path": str(tmp_path / "docs.jsonl")}]},
        plan={"max_tokens": 96, "shard_tokens": 200},
        extract={"engine": "transformers", "device": "cpu", "top_k": 8},
        generate={"max_tokens": 4},
        train=train,
        evaluate={"pool_selectors": ["uniform"], "bootstrap_samples": 200},
    )
    study = {
        "name": "asked",
        "study_dir": str(tmp_path / "study"),
        "control": "control",
        "ours": "ours",
        "bootstrap_samples": 200,
        "settings": {"toy": {"run": str(run), "answers": True}},
        "rows": {"before": {"model": "target"}, "control": {"set": PLAIN}, "ours": {}},
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    said = ok("study", "run", file)
    assert "right answers, %" in said
    rows = json.loads((tmp_path / "study/study.json").read_text())["settings"]["toy"]["rows"]
    assert set(rows["ours"]["right"]["share"]) == {"sums", "mean"}
    assert "against_control" in rows["before"]["right"]
    assert 0 < rows["ours"]["gate"]["weight"].popitem()[1] < 1
    kept = sorted((tmp_path / "study").rglob(ANSWERS_FILE))
    assert len(kept) == 3
    times = [path.stat().st_mtime_ns for path in kept]
    ok("study", "run", file)
    assert [path.stat().st_mtime_ns for path in kept] == times
    kept[0].write_bytes(kept[0].read_bytes()[:-9])
    with pytest.raises(CorruptionError, match=ANSWERS_FILE):
        read_answers(kept[0].parent)
    assert ANSWERS_FILE in refused("study", "show", file)
