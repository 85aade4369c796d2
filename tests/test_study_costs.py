"""What `study plan` says of costs: by hand, of models and text that are there, and of the examples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fuse_eval.study.config import load_study
from fuse_eval.study.grid import checked_places
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import plan_location
from tests.command import ok, refused
from tests.test_end_to_end import write_run
from tests.test_study import PLAIN, study_file

ROOT = Path(__file__).resolve().parent.parent
TOKENS, SIZES = 1_000_000, {"one": 10_000_000, "two": 20_000_000, "base": 5_000_000}


def hub_study(folder: Path, expected: Any, **of_setting: Any) -> Path:
    """Models of a hub and inputs that are not here; two seeds, two recipes, settings that share."""
    run = {
        "name": "far",
        "sources": {
            "one": {"model": "acme/one"},
            "two": {"model": "acme/two"},
            "base": {"model": "acme/target"},
        },
        "target": {"model": "acme/target"},
        "corpus": {"inputs": [{"path": str(folder / "absent.jsonl")}]},
        "extract": {"top_k": 32},
        "store": {"preset": "exact"},
        "generate": {"max_tokens": 7},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    pairs = {"train.selector": "min_ce", "train.pairwise": {"pivot": "base"}}
    study = {
        "name": "far",
        "study_dir": str(folder / "study"),
        "control": "control",
        "ours": "ours",
        "settings": {
            "base": {
                "run": str(folder / "run.yaml"),
                "seeds": [0, 1],
                "sources": ["one", "two"],
                "tune": [{"train.epochs": 1}, {"train.epochs": 3}],
                "expected": expected,
                **of_setting,
            },
            "less": {
                "like": "base",
                "rows": ["control", "ours"],
                "tune": [{"train.epochs": 1, "train.text_share": 0.5}],
            },
            "same": {"like": "base", "rows": ["control"], "tune": [{"train.epochs": 1}]},
        },
        "rows": {
            "before": {"model": "target"},
            "second": {"model": "two"},
            "control": {"set": PLAIN},
            "ours": {},
            "mined": {
                "tuned_as": "ours",
                "set": {"align.method": "mined", "align.max_entries": 10},
            },
            "pairs": {"tuned_as": "ours", "set": pairs, "sources": ["one", "two", "base"]},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def known() -> dict[str, Any]:
    return {"parameters": SIZES | {"target": SIZES["base"]}, "tokens": TOKENS, "prompts": 10}


def parts_of(costs: dict[str, Any], setting: str) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in costs["settings"][setting]["parts"]}


def test_costs_by_hand(tmp_path: Path) -> None:
    file = hub_study(tmp_path, known(), answers=True)
    told = json.loads(ok("study", "plan", file, "--json", "--tflops", "2", "--rate", "3"))
    costs = told["costs"]
    parts = parts_of(costs, "base")
    flops = 2e12 * 3600
    assert parts["extract two"]["bytes"] == TOKENS * (24 + 8 * 32)
    assert parts["extract two"]["gpu_hours"] == pytest.approx(
        max(2 * SIZES["two"] * TOKENS / flops, TOKENS / 50_000 / 3600)
    )
    assert [parts[f"extract {name}"]["times"] for name in SIZES] == [1, 1, 1]
    # The data's own alignment of three sources, and `mined` of two.
    assert parts["align"]["times"] == 5
    assert parts["align"]["bytes"] == TOKENS * (3 * (24 + 8 * 32) + 2 * (24 + 8 * 10))
    # At each seed: control and ours by both recipes; `mined` and each of two pairs by the longer one.
    passes = 2 * (4 + 4 + 3 + 2 * 3)
    assert parts["train"]["times"] == 2 * 6
    assert parts["train"]["tokens"] == pytest.approx(passes * 0.9 * TOKENS)
    hours = 6 * SIZES["base"] * passes * 0.9 * TOKENS / flops
    assert parts["train"]["gpu_hours"] == pytest.approx(hours)
    assert parts["train"]["bytes"] == 2 * SIZES["base"] * (3 * 12 + 2 * 4)  # of the pairs
    assert parts["score"]["times"] == 2 * 8
    assert parts["score"]["tokens"] == pytest.approx(16 * 0.05 * TOKENS)
    assert parts["answers"]["tokens"] == 16 * 10 * 7
    less = parts_of(costs, "less")
    assert set(less) == {"train", "score", "answers"}
    assert less["train"]["tokens"] == pytest.approx(2 * 2 * 0.9 * 0.5 * TOKENS)
    assert parts_of(costs, "same")["train"]["times"] == 0  # of `base` already
    every = sum(
        p["gpu_hours"] for name in costs["settings"] for p in parts_of(costs, name).values()
    )
    assert costs["gpu_hours"] == pytest.approx(every)
    assert costs["money"] == pytest.approx(3 * every)
    table = ok("study", "plan", file, "--tflops", "2", "--rate", "3")
    assert f"{3 * every:,.2f}" in table
    assert "not known" not in table
    assert max(map(len, table.splitlines())) <= 80


def test_what_is_shared_counts_for_a_setting_that_is_asked_for_alone(tmp_path: Path) -> None:
    file = hub_study(tmp_path, known())
    told = json.loads(ok("study", "plan", file, "--json", "--setting", "same", "--seed", "1"))
    parts = parts_of(told["costs"], "same")
    assert parts["train"]["times"] == 1
    assert parts["extract one"]["times"] == 1


def test_what_is_not_known_is_one_line(tmp_path: Path) -> None:
    expected = {"parameters": {"one": 1.0e7}, "tokens": TOKENS}
    told = ok("study", "plan", hub_study(tmp_path, expected))
    (line,) = [line for line in told.splitlines() if line.startswith("not known")]
    assert "two, base, target (base)" in line
    assert "one" not in line.split("(base)")[0].replace("known", "")
    costs = json.loads(ok("study", "plan", tmp_path / "study.yaml", "--json"))["costs"]
    assert parts_of(costs, "base")["extract one"]["gpu_hours"] > 0
    assert parts_of(costs, "base")["extract two"]["gpu_hours"] is None
    assert costs["money"] is None
    told = ok("study", "plan", hub_study(tmp_path, {}))
    assert "one, two, base, target, text (base)" in told
    wrong = {"parameters": {"one": 0}}
    assert "settings.base.expected.parameters.one" in refused(
        "study", "plan", hub_study(tmp_path, wrong)
    )


def test_models_and_text_that_are_there_are_counted_without_torch(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    file = study_file(tmp_path, write_run(tmp_path, tiny_models))
    code = (
        "import sys\nfrom logitfuse import main\n"
        f"sys.argv = ['logitfuse', 'study', 'plan', {str(file)!r}, '--json', '--tflops', '1e-6']\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    answer, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    costs = json.loads(answer)["costs"]
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()
    ]
    tokens = sum(len(text.encode()) for text in texts) / 4
    assert costs["settings"]["toy"]["text"] == ["rows"]
    assert costs["settings"]["toy"]["unknown"] == []
    from transformers import AutoModelForCausalLM

    for name in ("code", "prose"):
        model = AutoModelForCausalLM.from_pretrained(tiny_models[name])
        size = sum(weight.numel() for weight in model.parameters())
        part = parts_of(costs, "toy")[f"extract {name}"]
        assert part["tokens"] == pytest.approx(tokens)
        assert part["gpu_hours"] == pytest.approx(2 * size * tokens / 1e6 / 3600)
    study = load_study(file)
    data = checked_places(study, (), ())[0].data
    ok("corpus", "build", data.write())
    ok("extract", "plan", data.write())
    plan = Plan.open(plan_location(data.run.data_folder))
    costs = json.loads(ok("study", "plan", file, "--json"))["costs"]
    assert costs["settings"]["toy"]["text"] == ["planned"]
    by_split = {
        split: sum(shard.num_tokens["target"] for shard in shards)
        for split, shards in plan.splits().items()
    }
    context = plan.record.settings["context_tokens"]["target"]  # BOS
    exact = by_split["train"] * (1 + context / sum(by_split.values()))
    train = parts_of(costs, "toy")["train"]
    assert context > 0
    assert train["tokens"] == pytest.approx(2 * exact * train["times"])  # two epochs each


def test_the_example_of_a_cluster_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study("examples/study-cluster.yaml")
    places = checked_places(study, (), ())
    assert len(places) == 4
    rows = {"min_ce", "avg_ce", "fusion_x", "gold", "p_kl", "h_kl", "byte_prefix", "second alone"}
    assert rows <= {name for name, row in study.rows.items() if row.baseline}
    told = json.loads(ok("study", "plan", "examples/study-cluster.yaml", "--json"))["costs"]
    assert all(not found["unknown"] for found in told["settings"].values())
    assert told["money"] > 0
    for name, tasks in (("llama-3.2-1b", {"gsm8k", "mmlu"}), ("llama-2-7b", {"bbh"})):
        harness = study.setting(name).harness
        assert harness is not None
        assert tasks <= set(harness.tasks)
