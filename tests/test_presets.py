"""Each preset from one line of a run file to an evaluated model, on toy models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from store_schema.config import load_run
from store_schema.papers import preset_names
from tests.command import call, ok
from tests.extract_runs import plan_run, write_jsonl
from tests.run_file import write_run_file

pytestmark = pytest.mark.usefixtures("quick_processes")

PROMPTS = [
    {
        "id": f"{split}-{n}",
        "prompt": f"What is {n} + {n + 1}?",
        "response": f"It is {2 * n + 1}.",
        "split": split,
        "domain": "sums",
    }
    for split, count in (("train", 8), ("valid", 2), ("test", 2))
    for n in range(count)
]
SMALL: dict[str, Any] = {  # what a toy needs smaller; all else is the preset's
    "plan": {"max_tokens": 96, "shard_tokens": 256},
    "extract": {"engine": "transformers"},
    "train": {"batch_segments": 4, "max_steps": 4, "eval_every": 2, "trackers": []},
}


@pytest.fixture
def models(chat_models: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in chat_models.items()}


def write_run(folder: Path, models: dict[str, str], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = write_jsonl(folder / "prompts.jsonl", PROMPTS)
    corpus = {"inputs": [{"path": str(prompts), "corpus": "given"}]}
    return write_run_file(folder, models, name=folder.name, corpus=corpus, **more)


def best_answers(folder: Path, models: dict[str, str]) -> Path:
    """What ProFuser's first run leaves: every source asked, the best answers chosen."""
    path = write_run(
        folder,
        models,
        plan=SMALL["plan"],
        extract=SMALL["extract"],
        generate={"max_tokens": 8, "temperature": 0.0},
        judge={"judges": [{"kind": "reference_overlap"}], "drop_cut": False},
    )
    plan_run(path)
    ok("extract", "generate", path)
    ok("judge", path)
    return folder / "run/judged/best.parquet"


@pytest.mark.parametrize("name", preset_names())
def test_one_line_and_the_way_to_the_end(name: str, models: dict[str, str], tmp_path: Path) -> None:
    path = write_run(tmp_path / "learn", models, preset=name, **SMALL)
    if name == "profuser":
        best = best_answers(tmp_path / "ask", models)
        content = yaml.safe_load(path.read_text())
        content["corpus"]["inputs"].append(
            {"path": str(best), "corpus": "best", "columns": {"author": "author"}}
        )
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    plan_run(path)
    ok("extract", "run", path)
    ok("align", "run", path)
    trained = ok("train", "run", path)
    found = json.loads(ok("eval", "run", "--json", path))
    run = load_run(path)
    others = set(run.sources) - {"base"}  # which is target_before
    assert set(found["bpb"]) == {"target_before", "clm_control", "fused", *others}
    final = Path(run.folder) / "final"
    AutoModelForCausalLM.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final).chat_template
    assert "fused: step" in trained
    if name == "fusechat":
        lines = [line for line in trained.splitlines() if line.startswith("with ")]
        assert len(lines) == len(run.sources) - 1
    assert "complete, nothing to do" in ok("train", "run", path)


def test_what_a_preset_is_can_be_read() -> None:
    listed = ok("preset", "list").splitlines()
    assert [line.split()[0] for line in listed] == list(preset_names())
    for name in preset_names():
        shown = ok("preset", "show", name)
        assert yaml.safe_load(shown)["train"]["fusion_gate"] == {"kind": "none"}
    result = call("preset", "show", "none")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no such preset")
