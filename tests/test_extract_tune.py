"""`store tune`: the whole distribution is really whole, and the table follows from it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from extract.config import ExtractSection
from extract.scoring.sources import check_source
from extract.tune import _whole_rows, recommended, sample_segments, tune, whole_logprobs
from store_schema.config import load_run
from store_schema.plan.run_plan import open_plan
from tests import command
from tests.extract_runs import plan_run, write_run

call = partial(command.call, "store", "tune")


@pytest.fixture(scope="module")
def planned(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = {name: tiny_models[name] for name in ("code", "target")}
    path = write_run(
        tmp_path_factory.mktemp("tune"), models, extract={"engine": "transformers", "top_k": 64}
    )
    return plan_run(path)


def test_whole_rows_are_the_models_softmax(planned: Path, tiny_models: dict[str, Path]) -> None:
    run = load_run(planned)
    plan = open_plan(run)
    checked = check_source(run, "code", plan)
    segments = sample_segments(plan, checked.tokenizer, 200)
    model = AutoModelForCausalLM.from_pretrained(tiny_models["code"], dtype=torch.float32).eval()
    for segment, dense in _whole_rows(checked.spec, segments[:3]):
        found = whole_logprobs(dense, checked.tokenizer.vocab_size)
        with torch.inference_mode():
            logits = model(torch.tensor([segment.input_ids])).logits[0, :-1]
        wanted = torch.log_softmax(logits[:, : found.shape[1]].double(), -1)[-len(found) :]
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5)
        np.testing.assert_allclose(np.exp(found.astype(float)).sum(1), 1, atol=1e-5)


def test_sample_is_spread_over_the_plan(planned: Path) -> None:
    run = load_run(planned)
    plan = open_plan(run)
    tokenizer = check_source(run, "code", plan).tokenizer
    few = sample_segments(plan, tokenizer, 2 * 128)
    assert len(few) == 2
    every = sample_segments(plan, tokenizer, 10**6)
    assert len(every) == plan.record.num_segments
    assert all(len(s.token_ids) == len(s.byte_ends) <= 128 for s in every)


def test_smaller_stores_are_further_off_and_the_rule_picks_the_smallest(planned: Path) -> None:
    found = tune(load_run(planned), "code", num_positions=600)
    by_name = {str(m.choice): m for m in found}
    sizes = [m.bytes_per_position for m in found]
    assert sizes == sorted(sizes)
    exact, tiny = by_name["exact"], by_name["tiny"]
    assert exact.fidelity.total_variation < tiny.fidelity.total_variation
    assert exact.fidelity.gradient_angle_degrees < tiny.fidelity.gradient_angle_degrees
    assert exact.bytes_per_position > 2 * tiny.bytes_per_position
    assert recommended(found, 0.0).choice == exact.choice
    assert recommended(found, 1.0) is found[0]
    assert exact.fidelity.entries_per_row == ExtractSection(top_k=64).top_k


def test_command_prints_a_section_that_loads(planned: Path) -> None:
    result = call(planned, "--source", "code", "--positions", "300")
    assert result.exit_code == 0, result.output
    assert result.output.count("<- recommended") == 1
    section = result.output[result.output.index("store:\n") :].strip().splitlines()[1:]
    overrides = [f"store.{line.strip().replace(': ', '=')}" for line in section]
    assert load_run(planned, tuple(overrides)).sections["store"]
    parsed = json.loads(
        call(planned, "--source", "code", "--positions", "300", "--json").stdout.splitlines()[-1]
    )
    assert parsed["choices"][parsed["recommended"]]["bytes_per_position"] > 0


def test_what_cannot_be_tuned_is_told(planned: Path) -> None:
    result = call(planned, "--source", "nobody")
    assert result.exit_code == 2
    assert "no such source" in result.output
    result = call(planned, "--source", "code", "--set", "extract.estimator=sampled")
    assert result.exit_code == 2
    assert "only one encoding" in result.output
