"""`make bench-align-oracle` on models of a few thousand weights, from the command to its last line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from benchmarks import bench_align_oracle as bench
from benchmarks.oracle_pairs import OraclePair
from store_schema.config import ModelRef
from store_schema.text.tokenizer import SegmentTokenizer

TEXT = "the quick brown fox jumps over the lazy dog, 12 times"


def test_from_the_command_to_the_last_line(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(name: str) -> SegmentTokenizer:
        return SegmentTokenizer.load(ModelRef(model=str(tiny_models[name])), name=name)

    model = AutoModelForCausalLM.from_pretrained(tiny_models["code"]).eval()
    pair = OraclePair(loaded("code"), loaded("target"), model)
    monkeypatch.setattr(bench, "small_pair", lambda name, out: pair)
    monkeypatch.setattr(bench, "mixed_texts", lambda size: [TEXT])
    monkeypatch.setattr(bench, "segments_of", lambda domain, number: [TEXT] * number)
    monkeypatch.setattr(bench, "DOMAINS", ("prose",))
    # A model of random weights goes on in every way: a few rows of it are enough here.
    real = bench.truth_at
    monkeypatch.setattr(bench, "truth_at", lambda *given: real(*given, most_nodes=40))
    result = CliRunner().invoke(bench.main, ["--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "by kind of position" in result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert 0 < found["positions"]["demo"] <= 4
    assert set(found["oracle_kl_mean"]) >= {"bytes", "mined", "stats", *bench.BASELINES}
    assert all(math.isfinite(kl) and kl >= -1e-6 for kl in found["oracle_kl_mean"].values())
    assert found["oracle_kl_ratio"] == pytest.approx(
        found["oracle_kl_mean"][bench.BRANCHED] / found["oracle_kl_mean"]["bytes"]
    )
    assert found["oracle_kl_ratio_by_text"] == {"prose": pytest.approx(found["oracle_kl_ratio"])}
    best = found["oracle_kl_mean"][found["best_baseline"]]
    assert found["oracle_kl_vs_best_baseline"] == pytest.approx(
        found["oracle_kl_mean"]["bytes"] / best
    )
    assert 0 < found["remainder"] <= 1
    assert found["rows_asked"] > 1
