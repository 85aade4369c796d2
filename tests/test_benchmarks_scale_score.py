"""The benchmark of scoring with a large vocabulary, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scale_score import score_figures
from extract.head.bf16_dot import has_bf16_dot
from tests.tiny import SAMPLE_TEXTS, tiny_model, tiny_tokenizer


@pytest.mark.slow
def test_both_ways_take_turns_and_are_compared(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "model", "llama", tiny_tokenizer())
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(text for texts in SAMPLE_TEXTS.values() for text in texts) * 4)
    found = score_figures({"tiny": folder}, [text], rounds=1, tokens=600, threads=1)
    assert json.loads(json.dumps(found)) == found
    figures = {name: values["tiny"] for name, values in found.items()}
    assert figures["score_fused"] == has_bf16_dot()
    assert figures["score_ratio"] > 0
    assert 0 < figures["score_body_share"] < 1.5
    assert set(figures["score_tokens_per_s"]) == {"now", "before"}
    for name in ("entries", "labels"):
        assert figures[f"score_max_error_{name}_nats"] < 1e-4
    assert figures["score_missed_nats"] < 1e-4
