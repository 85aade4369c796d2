"""Every constraint of the sections, broken once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from extract.config import CorpusSection, ExtractSection, GenerateSection, PlanSection
from store_schema.config import load_run
from store_schema.errors import ConfigError

SAMPLED = {"engine": "transformers", "estimator": "sampled"}

BAD: list[tuple[type, dict[str, Any], str]] = [
    (CorpusSection, {"inputs": [{"path": ""}]}, "at least 1 character"),
    (CorpusSection, {"inputs": [{"path": "a", "format": "csv"}]}, "auto"),
    (CorpusSection, {"inputs": [{"path": "a", "columns": {"prompt": "q"}}]}, "together"),
    (
        CorpusSection,
        {"inputs": [{"path": "a", "columns": {"text": "t", "messages": "m"}}]},
        "map one of",
    ),
    (
        CorpusSection,
        {"inputs": [{"path": "a", "domain": "d", "columns": {"domain": "d"}}]},
        "both as a constant and as a column",
    ),
    (CorpusSection, {"inputs": [{"path": "a", "domain": ""}]}, "at least 1 character"),
    (CorpusSection, {"splits": []}, "at least 1 item"),
    (CorpusSection, {"split_fractions": {"train": 0.5}}, "sum to 1"),
    (CorpusSection, {"split_fractions": {"train": 1.5, "test": -0.5}}, r"\[0, 1\]"),
    (CorpusSection, {"on_bad": "ignore"}, "error"),
    (PlanSection, {"max_tokens": 15}, "greater than or equal"),
    (PlanSection, {"max_tokens": 2**21}, "less than or equal"),
    (PlanSection, {"shard_tokens": 0}, "greater than or equal"),
    (PlanSection, {"assumed_tokens_per_s": 0}, "greater than 0"),
    (PlanSection, {"assumed_tokens_per_s": float("inf")}, "finite"),
    (ExtractSection, {"engine": "onnx"}, "vllm"),
    (ExtractSection, {"top_k": 0}, "greater than or equal"),
    (ExtractSection, {"estimator": "full"}, "topk"),
    (ExtractSection, SAMPLED | {"draws": 0}, "greater than or equal"),
    (ExtractSection, SAMPLED | {"draws": 1025}, "less than or equal"),
    (ExtractSection, SAMPLED | {"sampled_head": -1}, "greater than or equal"),
    (ExtractSection, SAMPLED | {"sampled_head": 2**17 + 1}, "less than or equal"),
    (ExtractSection, {"estimator": "sampled", "engine": "vllm"}, "needs engine transformers"),
    (ExtractSection, {"estimator": "sampled", "quantization": "fp8"}, "quantization needs"),
    (ExtractSection, {"head_rows": 0}, "greater than or equal"),
    (ExtractSection, {"batch_tokens": 0}, "greater than or equal"),
    (ExtractSection, {"queue_mib": 0}, "greater than or equal"),
    (ExtractSection, {"max_num_batched_tokens": 1}, "greater than or equal"),
    (ExtractSection, {"tensor_parallel_size": 0}, "greater than or equal"),
    (ExtractSection, {"gpu_memory_utilization": 1}, "less than 1"),
    (ExtractSection, {"kv_cache_gib": 0}, "greater than or equal"),
    (ExtractSection, {"threads": 0}, "greater than or equal"),
    (ExtractSection, {"topk": 3}, "Extra inputs"),
    (GenerateSection, {"stop": ("",)}, "empty text"),
    (GenerateSection, {"stop": ("a\ud800b",)}, "lone surrogate"),
]


@pytest.mark.parametrize(("section", "values", "message"), BAD)
def test_constraint(section: type[CorpusSection], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**values)


def test_speed_and_place_are_not_content() -> None:
    sampling = {"estimator", "draws", "sampled_head"}
    shaping = {"engine", "top_k", "fp32_head", "quantization"}
    # Extras, no option any more, keep their place: stores were made with it.
    assert set(ExtractSection().content()) == shaping | sampling | {"extras"}
    assert set(PlanSection().content()) == {"max_tokens", "shard_tokens"}


def test_what_decides_the_draws_is_told_to_the_manifest() -> None:
    assert ExtractSection(draws=3).sampling_settings(seed=5) == {}
    assert ExtractSection(top_k=7).max_entries == 7
    section = ExtractSection(**SAMPLED, draws=3, sampled_head=2)
    assert section.max_entries == 5
    told = section.sampling_settings(seed=5)
    assert told == {"draws": 3, "draws_are": "systematic", "sampled_head": 2, "seed": 5}


def test_answers_need_no_entries() -> None:
    section = ExtractSection(**SAMPLED, draws=3).answering()
    assert (section.max_entries, section.sampling_settings(seed=5)) == (1, {})


def test_extras_are_no_option_any_more(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    run = {"name": "t", "sources": {"s": {"model": "m"}}, "target": {"model": "m"}}
    path.write_text(yaml.safe_dump(run | {"extract": {"extras": ["entropy"]}}))
    with pytest.raises(ConfigError, match=r"extract\.extras: unknown key"):
        load_run(path).section("extract", ExtractSection)


def test_transformers_loads_weights_as_they_are() -> None:
    with pytest.raises(ValidationError, match="quantization needs engine vllm"):
        ExtractSection(engine="transformers", quantization="fp8")


@pytest.mark.parametrize(
    ("values", "on_cpu", "fp32_head", "engine"),
    [
        ({}, False, True, "vllm"),
        ({}, True, True, "transformers"),
        ({}, True, False, "vllm"),
        ({"device": "cpu"}, False, False, "transformers"),
        ({"estimator": "sampled"}, False, False, "transformers"),
        ({"quantization": "fp8", "device": "cpu"}, True, True, "vllm"),
        ({"engine": "vllm"}, True, True, "vllm"),
        ({"engine": "transformers"}, False, False, "transformers"),
    ],
)
def test_the_engine_that_serves(
    values: dict[str, Any], on_cpu: bool, fp32_head: bool, engine: str
) -> None:
    settled = ExtractSection(**values).settled(on_cpu=on_cpu, fp32_head=fp32_head)
    assert settled.engine == engine
    assert settled.settled(on_cpu=not on_cpu, fp32_head=not fp32_head) == settled


def test_tokens_of_a_forward_pass() -> None:
    section = ExtractSection()
    assert [section.scored_tokens(on_cpu=on_cpu) for on_cpu in (True, False)] == [1024, 4096]
    assert section.answered_tokens == 4096
    told = ExtractSection(batch_tokens=7)
    assert told.scored_tokens(on_cpu=True) == told.scored_tokens(on_cpu=False) == 7
    assert told.answered_tokens == 7


@pytest.mark.parametrize(
    ("values", "loader"),
    [
        ({}, "auto"),
        ({"engine": "vllm"}, "vllm"),
        ({"engine": "transformers"}, "transformers"),
        ({"estimator": "sampled"}, "transformers"),
    ],
)
def test_what_the_run_file_alone_says_of_the_engine(values: dict[str, Any], loader: str) -> None:
    assert ExtractSection(**values).loader == loader
