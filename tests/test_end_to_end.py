"""The whole path in miniature: every command of the README, on tiny models, then all of them again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command import ok
from tests.run_file import write_run_file
from tests.tiny import SAMPLE_TEXTS

pytestmark = pytest.mark.usefixtures("quick_processes")

PYTHON = sys.executable
"""One that has not loaded anything: see `quick_processes`."""

STAGES = [
    ("corpus", "build"),
    ("extract", "plan"),
    ("extract", "run"),
    ("align", "run"),
    ("eval", "pool"),
    ("train", "run"),
    ("eval", "run"),
    ("report",),
]


def write_run(folder: Path, models: dict[str, Path]) -> Path:
    """A run file over a small corpus of three domains and three splits."""
    documents = [
        {"id": f"{domain}-{split}-{i}", "text": text * 3, "domain": domain, "split": split}
        for domain, texts in SAMPLE_TEXTS.items()
        for split in ("train", "valid", "test")
        for i, text in enumerate(texts)
    ]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return write_run_file(
        folder,
        {name: {"model": str(path), "dtype": "float32"} for name, path in models.items()},
        name="tiny",
        corpus={"inputs": [{"path": str(folder / "text.jsonl")}]},
        plan={"max_tokens": 96, "shard_tokens": 600},
        extract={"engine": "transformers", "top_k": 16, "device": "cpu"},
        train={
            "epochs": 2,
            "batch_segments": 8,
            "micro_batch_segments": 4,
            "eval_every": 5,
            "asn": {"pretrain_steps": 10},
        },
        evaluate={"bootstrap_samples": 200, "device": "cpu"},
    )


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("end_to_end")
    config = write_run(folder, tiny_models)
    return config, run_all(config)


def run_all(config: Path) -> dict[str, str]:
    """Output of every stage by its name."""
    said = {}
    for stage in STAGES:
        said[" ".join(stage)] = ok(*stage, config)
    return said


@pytest.mark.slow
def test_the_summary_holds_what_programs_read(finished: tuple[Path, dict[str, str]]) -> None:
    config, _ = finished
    summary = json.loads((config.parent / "run/report/summary.json").read_text())
    sources = {"code", "prose", "facts"}
    assert set(summary["bpb"]) == {"target_before", "clm_control", "fused"} | sources
    for values in [*summary["bpb"].values(), *summary["pool_bpb"].values()]:
        assert set(values) >= set(SAMPLE_TEXTS)
    assert {"uniform", "min_ce", "asn"} <= set(summary["pool_bpb"])
    assert set(summary["coverage"]) == sources
    # prose has no BOS: what its first token covers, here up to 97 spaces, has nothing before it
    assert summary["coverage"]["code"] == summary["coverage"]["facts"] == 1.0
    assert 0.7 < summary["coverage"]["prose"] < 1.0
    assert {"corpus", "plan", "extract", "align", "pool", "train", "evaluate"} <= set(
        summary["seconds"]
    )
    assert summary["peak_rss_bytes"] > 1 << 20


@pytest.mark.slow
def test_training_brought_both_down(finished: tuple[Path, dict[str, str]]) -> None:
    config, _ = finished
    bpb = json.loads((config.parent / "run/report/summary.json").read_text())["bpb"]
    mean = {name: sum(values[d] for d in SAMPLE_TEXTS) for name, values in bpb.items()}
    assert mean["clm_control"] < mean["target_before"]
    assert mean["fused"] < mean["target_before"]


@pytest.mark.slow
def test_the_final_model_loads_with_plain_transformers(
    finished: tuple[Path, dict[str, str]],
) -> None:
    config, _ = finished
    final = config.parent / "run/final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = torch.tensor([tokenizer("def add(a, b):").input_ids])
    assert torch.isfinite(model(input_ids=ids).logits).all()
    card = (final / "README.md").read_text()
    assert "base_model" in card


@pytest.mark.slow
def test_a_second_run_of_everything_does_nothing(finished: tuple[Path, dict[str, str]]) -> None:
    config, _ = finished
    folder = config.parent / "run"
    kept = ("corpus", "plan", "stores", "aligned", "selector", "final", "control")

    def times() -> dict[str, int]:
        return {
            str(path): path.stat().st_mtime_ns
            for part in kept
            for path in (folder / part).rglob("*")
            if path.is_file()
        }

    before = times()
    said = run_all(config)
    assert times() == before
    for stage in ("corpus build", "extract plan", "extract run", "align run", "train run"):
        assert "nothing to do" in said[stage], stage


@pytest.mark.slow
def test_a_stage_with_nothing_to_do_loads_no_heavy_library(
    finished: tuple[Path, dict[str, str]],
) -> None:
    """It is then known from files alone: importing these takes longer than all else."""
    config, _ = finished
    code = "import sys; from logitfuse import main\ntry: main()\nfinally: print(*sys.modules)"
    for stage in [*STAGES, ("status",)]:
        words = [*stage, str(config)]
        # Once to find what transformers says about the models' files, with an empty cache.
        subprocess.run([sys.executable, "-m", "logitfuse", *words], check=True, capture_output=True)
        again = subprocess.run([PYTHON, "-c", code, *words], capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        *said, loaded = again.stdout.splitlines()
        assert stage == ("status",) or "nothing to do" in "".join(said), stage
        modules = set(loaded.split())
        assert {"logitfuse", "store_schema.config"} <= modules
        assert not {"torch", "transformers", "accelerate", "vllm"} & modules, stage


@pytest.mark.slow
def test_one_extraction_serves_another_training(
    finished: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    config, _ = finished
    again = [
        "train", "run", str(config),
        "--set", f"run_dir={tmp_path / 'other'}", "--set", f"data_dir={config.parent / 'run'}",
        "--set", "train.selector=uniform", "--set", "train.control=false",
        "--set", "train.max_steps=3",
    ]  # fmt: skip
    ok(*again)
    assert (tmp_path / "other/final/model.safetensors").exists()
    assert not (tmp_path / "other/stores").exists()
