"""The fusion gate: what it measures on held-out text, and what the loss makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import AutoModelForCausalLM

from fuse_train.config import TrainSection
from fuse_train.data.stream import SampleStream, StreamOptions
from fuse_train.gate.held_out import HeldOutText, span_nats
from fuse_train.gate.mixture import mixture_nats, mixture_weight
from fuse_train.inputs import open_inputs
from fuse_train.loop.likelihood import row_nats
from fuse_train.loop.objective import FusionObjective, StepTotals
from fuse_train.loop.validation import load_valid
from fuse_train.run import train_run
from fuse_train.selector_fit.selector_training import split_batches
from fuse_train.selectors.by_name import by_rule
from store_schema.errors import ConfigError
from tests.aligned_factory import make_run
from tests.selector_views import build_selector
from tests.test_fuse_train_run import lines_of, same, timeless, weights, with_train

ONE_PROCESS = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
nats = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0.0, 60.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def scored(run):
    """Held-out text, the rows of the target as it is, and the domains of segments."""
    section = run.sections["train"]
    inputs = open_inputs(run, section)
    valid = load_valid(inputs.plan, inputs.plan.splits()["valid"], inputs.tokenizer, None)
    samples = open_inputs(run, section, "valid").samples
    held_out = HeldOutText.of(split_batches(samples, inputs.domains), valid.segment_ids)
    model = AutoModelForCausalLM.from_pretrained(run.target.model)
    rows = dict(zip(valid.segment_ids, row_nats(model, valid.encoded), strict=True))
    return held_out, rows, samples


# ---------------------------------------------------------------------------------- mixtures


@settings(deadline=None)
@given(nats, st.integers(0, 2**31))
def test_no_other_weight_scores_better(first: np.ndarray, seed: int) -> None:
    second = np.random.default_rng(seed).permutation(first) + 0.25 * first
    best = mixture_nats(first, second, mixture_weight(first, second)).sum()
    others = [mixture_nats(first, second, w).sum() for w in np.linspace(0.0, 1.0, 101)]
    assert best <= min(others) + 1e-9 * max(1.0, abs(best))


@settings(deadline=None)
@given(nats, st.integers(0, 2**31))
def test_the_two_may_change_places(first: np.ndarray, seed: int) -> None:
    second = np.random.default_rng(seed).permutation(first)
    there, back = mixture_weight(first, second), mixture_weight(second, first)
    one = mixture_nats(first, second, there).sum()
    assert one == pytest.approx(mixture_nats(first, second, 1.0 - back).sum(), rel=1e-9, abs=1e-9)


def test_weights_that_are_known() -> None:
    # Two spans, each known to one of the two alone: the truth is in the middle.
    assert mixture_weight(np.array([0.1, 9.0]), np.array([9.0, 0.1])) == pytest.approx(
        0.5, abs=1e-9
    )
    # -log((1 - w) / 2 + w / 4) three times and -log((1 - w) / 2 + 3 w / 4) five times: w = 1 / 2.
    halves, quarters = np.full(8, math.log(2)), np.array([math.log(4)] * 3 + [math.log(4 / 3)] * 5)
    assert mixture_weight(halves, quarters) == pytest.approx(0.5, abs=1e-9)
    assert mixture_weight(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == pytest.approx(
        0.0, abs=1e-9
    )
    assert mixture_weight(np.array([900.0, 2.0]), np.array([0.0, 1.0])) == pytest.approx(
        1.0, abs=1e-9
    )
    assert mixture_weight(np.empty(0), np.empty(0)) == mixture_weight(np.ones(3), np.ones(3)) == 0.5
    np.testing.assert_allclose(
        mixture_nats(np.array([math.log(2), 3.0]), np.array([math.log(4), 1.0]), 0.25),
        [-math.log(0.75 / 2 + 0.25 / 4), -math.log(0.75 * math.exp(-3) + 0.25 * math.exp(-1))],
    )


# ------------------------------------------------------------------------------ held-out text


def test_span_nats_are_sums_over_each_source_free_span(run, scored) -> None:
    held_out, rows, samples = scored
    found = span_nats(held_out.batches, by_rule("uniform"), rows, torch.device("cpu"))
    slow: dict[str, list[tuple[float, float]]] = {}
    for batch in split_batches(samples, held_out.batches[0].domains):
        sources = batch.sources
        for b, name in enumerate(batch.segment_ids):
            domain = batch.domains[int(batch.domains_B[b])]
            slow.setdefault(domain, [])
            starts = [t for t in range(len(rows[name])) if t == 0 or bool(sources.begins_BT[b, t])]
            for start, stop in zip(starts, [*starts[1:], len(rows[name])], strict=True):
                labels_TM = sources.label_logprobs_BTM[b, start:stop].double()
                target = rows[name][start:stop].sum()
                if (
                    labels_TM.isnan().any()
                    or np.isnan(target)
                    or not sources.covered_BTM[b, start].any()
                ):
                    continue
                weights_M = sources.covered_BTM[b, start].double()
                weights_M /= weights_M.sum()
                pool = -float(torch.log((weights_M * labels_TM.sum(0).exp()).sum()))
                slow[domain].append((float(target), pool))
    assert found.keys() == slow.keys() == {"code", "prose", "facts"}
    for domain, pair in found.items():
        assert pair.shape[1] == len(slow[domain]) > 50
        np.testing.assert_allclose(pair.T, slow[domain], rtol=1e-5, atol=1e-5)


def test_shares_fall_to_zero_where_the_target_knows_all(scored) -> None:
    held_out, rows, _ = scored
    selector = by_rule("uniform")
    now = held_out.shares(selector, rows, ONE_PROCESS)
    assert all(0.5 < share <= 1.0 for share in now.values()), "an untrained target adds little"
    sure = {name: np.where(np.isnan(own), own, 1e-6) for name, own in rows.items()}
    assert all(share < 1e-6 for share in held_out.shares(selector, sure, ONE_PROCESS).values())
    lost = {name: np.where(np.isnan(own), own, 50.0) for name, own in rows.items()}
    assert all(share > 1 - 1e-6 for share in held_out.shares(selector, lost, ONE_PROCESS).values())


def test_shares_are_those_of_all_processes_together(scored, monkeypatch) -> None:
    held_out, rows, _ = scored
    whole = held_out.shares(by_rule("uniform"), rows, ONE_PROCESS)
    names = list(rows)
    halves = [{n: rows[n] for n in names[start::2]} for start in (0, 1)]
    parts = [
        span_nats(held_out.batches, by_rule("uniform"), half, torch.device("cpu"))
        for half in halves
    ]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda part: parts)
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    shares = held_out.shares(by_rule("uniform"), halves[0], two)
    assert shares == pytest.approx(whole, abs=1e-9)


# ------------------------------------------------------------------------------------ the loss


def test_the_share_of_a_domain_moves_its_rows_to_ground_truth(run) -> None:
    opened = open_inputs(run, run.sections["train"])
    options = StreamOptions(0, 6, 6, shuffle_shards=1, cache_gib=1.0)
    (batch,) = SampleStream(opened.samples, options, opened.domains).step_batches(0)
    section = TrainSection.model_validate(
        {"selector": "uniform", "clm_weight": 0.25, "fusion_gate": {"kind": "held_out"}}
    )
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    objective = FusionObjective(model, build_selector(section, list(run.sources)), section)
    totals = StepTotals(batch.num_labels, 1)

    def loss(shares: dict[str, float], clm_weight: float = 0.25) -> tuple[float, torch.Tensor]:
        objective.section = section.model_copy(update={"clm_weight": clm_weight})
        objective.at_progress(0.0)
        objective.fusion_shares = shares
        model.zero_grad()
        value, _ = objective(batch, totals)
        value.backward()
        return float(value.detach()), model.get_input_embeddings().weight.grad.clone()

    every = dict.fromkeys(batch.domains, 1.0)
    assert loss({})[0] == loss(every)[0]
    # A share of 0.5 for all is lambda = 0.25 + 0.75 * 0.5, exact in float32.
    value, grad = loss(dict.fromkeys(batch.domains, 0.5))
    same_value, same_grad = loss({}, clm_weight=0.625)
    assert value == pytest.approx(same_value, rel=1e-12)
    torch.testing.assert_close(grad, same_grad, rtol=1e-9, atol=1e-14)
    # Linear in each domain's share, and the domains add up.
    full, full_grad = loss(every)
    none, none_grad = loss(dict.fromkeys(batch.domains, 0.0))
    moved, moved_grad = 0.0, torch.zeros_like(grad)
    present = {batch.domains[int(g)] for g in batch.domains_B}
    assert len(present) > 1
    for domain in present:
        value, grad = loss(every | {domain: 0.0})
        moved, moved_grad = moved + value - full, moved_grad + grad - full_grad
    assert full + moved == pytest.approx(none, rel=1e-9)
    torch.testing.assert_close(full_grad + moved_grad, none_grad, rtol=1e-6, atol=1e-12)


# --------------------------------------------------------------------------------- whole runs


def test_shares_are_measured_logged_and_used(tmp_path: Path, monkeypatch) -> None:
    true_shares, asked = HeldOutText.shares, []

    def shares(self, *given):
        """The measured ones are 1 all over, to a hair, for so weak a target."""
        asked.append(true_shares(self, *given))
        return {domain: 0.25 * share for domain, share in asked[-1].items()}

    monkeypatch.setattr(HeldOutText, "shares", shares)
    train_run(make_run(tmp_path / "gated"))
    assert [set(found) for found in asked] == [{"code", "prose", "facts"}] * 3
    lines = lines_of(tmp_path / "gated", "train")
    measured = [line["step"] for line in lines if "fusion_shares" in line]
    assert measured == [line["step"] for line in lines if "valid_bpb" in line] == [0, 3, 6]
    for line in lines:
        for share in line.get("fusion_shares", {}).values():
            assert 0.0 <= share <= 1.0
    assert not any("fusion_shares" in line for line in lines_of(tmp_path / "gated", "control"))
    train_run(make_run(tmp_path / "plain", train={"fusion_gate": {"kind": "none"}}))
    assert not any("fusion_shares" in line for line in lines_of(tmp_path / "plain", "train"))
    finals = [tmp_path / name / "run/final" for name in ("gated", "plain")]
    assert not same(*map(weights, finals))
    controls = [tmp_path / name / "run/control/final" for name in ("gated", "plain")]
    assert same(*map(weights, controls))


def test_a_resumed_run_goes_on_with_its_shares(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", train={"control": False})
    train_run(whole)
    run = make_run(tmp_path / "parts", train={"control": False, "checkpoint_every": 1})

    class Killed(BaseException):
        pass

    from fuse_train.loop import trainer

    plain, count = trainer.TrainingLoop._step, 0

    def step(self, *args):
        nonlocal count
        count += 1
        if count == 5:
            raise Killed
        return plain(self, *args)

    trainer.TrainingLoop._step = step
    try:
        with pytest.raises(Killed):
            train_run(run)
    finally:
        trainer.TrainingLoop._step = plain
    train_run(run)
    assert same(weights(tmp_path / "whole/run/final"), weights(tmp_path / "parts/run/final"))
    assert timeless(lines_of(tmp_path / "whole", "train")) == timeless(
        lines_of(tmp_path / "parts", "train")
    )


def test_without_evaluations_the_gate_is_refused(tmp_path: Path) -> None:
    run = with_train(make_run(tmp_path), valid_split="nowhere", keep_best=False)
    with pytest.raises(ConfigError, match="the fusion gate needs evaluations") as told:
        train_run(run)
    assert "train.fusion_gate.kind to none" in str(told.value)
