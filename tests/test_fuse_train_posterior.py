"""The posterior gate: which token's label is the pool's, from the target's first reading of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fuse_train.config import TrainSection
from fuse_train.data.batch import Batch, collate
from fuse_train.data.stream import SampleStream, StreamOptions
from fuse_train.divergences.divergence import Divergence
from fuse_train.explain.segment import explain_segment
from fuse_train.gate.first_reading import READINGS_FILE, FirstReadings
from fuse_train.gate.held_out import HeldOutText
from fuse_train.inputs import open_inputs
from fuse_train.loop import trainer
from fuse_train.loop.checkpoint import step_folders
from fuse_train.loop.objective import FusionObjective, StepTotals, label_reference
from fuse_train.losses.losses import RowGate, head_loss, row_coefficients
from fuse_train.model.heads import Head
from fuse_train.run import train_run
from fuse_train.selectors.hedge import PROBABILITY_FLOOR
from store_schema.errors import CorruptionError
from tests.aligned_factory import make_run
from tests.command import call
from tests.selector_views import build_selector
from tests.test_fuse_train_losses import K, M, R, dense_reference, problem
from tests.test_fuse_train_run import lines_of, same, timeless, weights, with_train

ONE_PROCESS = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
SHARES = {"code": 0.3, "prose": 0.8, "facts": 0.5}


def gate_of(seed: int = 1) -> RowGate:
    """Some rows read before, some not; of some the pool does not know the label."""
    g = torch.Generator().manual_seed(seed)
    first, pool = (torch.rand(R, generator=g, dtype=torch.float64) * 6 for _ in range(2))
    first[torch.arange(R) % 3 == 0] = torch.nan
    pool[torch.arange(R) % 5 == 0] = torch.nan
    return RowGate(torch.randn(R, generator=g, dtype=torch.float64), pool, first)


# ------------------------------------------------------------------------------ the head's pass


def test_a_share_is_the_posterior_of_a_mixture() -> None:
    gate, nll = gate_of(), torch.full((R,), 1.5, dtype=torch.float64)
    for r, kept in enumerate(gate.kept(nll).tolist()):
        weight, pool = float(torch.sigmoid(gate.prior_logit_R[r])), float(gate.pool_nll_R[r])
        first = float(gate.first_nll_R[r])
        target = 1.5 if math.isnan(first) else first
        of_pool = weight * math.exp(-pool)
        expected = of_pool / (of_pool + (1 - weight) * math.exp(-target))
        assert kept == pytest.approx(0.0 if math.isnan(pool) else expected, rel=1e-9)
    sure = RowGate(torch.tensor([math.inf, -math.inf]), torch.zeros(2), torch.full((2,), 9.0))
    assert sure.kept(torch.zeros(2)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("policy", ["bucket", "drop"])
def test_value_and_gradients_equal_dense_reference(policy: str) -> None:
    hidden, weight, bias, labels, rows, weights_, covered = problem()
    if policy == "drop":
        rows = replace(rows, tail_RM=torch.zeros_like(rows.tail_RM))
    gate = gate_of()
    clm, fusion = row_coefficients(weights_, covered, 0.3)
    logq = (hidden @ weight.T + bias).log_softmax(-1)
    kept = gate.kept(-logq[torch.arange(R), labels].detach())
    moved = clm + (1 - kept) * fusion.detach().sum(-1)
    gated = fusion * kept[:, None]
    expected = dense_reference(hidden, weight, bias, labels, rows, gated, moved, policy)
    wrt = (hidden, weight, bias, weights_)
    expected_grads = torch.autograd.grad(expected, wrt)
    clm, fusion = row_coefficients(weights_, covered, 0.3)
    got = head_loss(hidden, Head(weight, bias), labels, clm, rows, fusion, chunk_rows=7, gate=gate)
    grads = torch.autograd.grad(got.total, wrt)
    assert got.total.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(got.kept_R, kept, rtol=1e-9, atol=1e-12)
    assert float(kept.std()) > 0.1, "a gate that is the same everywhere shows nothing"
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_at_a_temperature_the_gate_is_that_of_the_plain_label() -> None:
    hidden, weight, bias, labels, rows, weights_, covered = problem()
    head, gate = Head(weight, bias), gate_of()
    clm, fusion = row_coefficients(weights_.detach(), covered, 0.3)
    soft = Divergence(target_temperature=2.0)
    got = head_loss(hidden, head, labels, clm, rows, fusion, divergence=soft, gate=gate)
    kept = gate.kept(got.nll_R)
    by_hand = head_loss(
        hidden,
        head,
        labels,
        clm + (1 - kept) * fusion.sum(-1),
        rows,
        fusion * kept[:, None],
        divergence=soft,
    )
    assert got.total.item() == pytest.approx(by_hand.total.item(), rel=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got.total, (hidden, weight)),
        torch.autograd.grad(by_hand.total, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert rows.entry_ids_RMK.shape == (R, M, K)


# --------------------------------------------------------------------------------- the objective


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("posterior"))


@pytest.fixture
def parts(run):
    """An objective in float64 and a batch of several domains."""
    opened = open_inputs(run, run.sections["train"])
    options = StreamOptions(0, 6, 6, shuffle_shards=1, cache_gib=1.0)
    (batch,) = SampleStream(opened.samples, options, opened.domains).step_batches(0)
    section = TrainSection(selector="uniform", clm_weight=0.25)
    assert section.fusion_gate.kind == "posterior", "the default"
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    objective = FusionObjective(model, build_selector(section, list(run.sources)), section)
    objective.fusion_shares = SHARES
    return objective, batch, opened


def gate_at(objective: FusionObjective, batch: Batch) -> RowGate:
    at, sources = batch.label_rows(), batch.sources
    weights_RM = objective.selector.gates(sources.view)[at]
    logprobs_RM = sources.label_logprobs_BTM[at].clamp(min=PROBABILITY_FLOOR)
    gate = objective.row_gate(batch, at, weights_RM, logprobs_RM)
    pool_R = label_reference(weights_RM, logprobs_RM, None)
    torch.testing.assert_close(gate.pool_nll_R, pool_R, equal_nan=True)
    return gate


def test_a_first_reading_is_used_as_long_as_the_text_lasts(parts) -> None:
    objective, batch, _ = parts
    objective.readings = FirstReadings()
    at = batch.label_rows()
    assert gate_at(objective, batch).first_nll_R.isnan().all()
    totals = StepTotals(batch.num_labels, 1)
    before, _ = objective(batch, totals)
    assert gate_at(objective, batch).first_nll_R.isnan().all(), "not within the step"
    objective.readings.share(ONE_PROCESS)
    first = gate_at(objective, batch).first_nll_R
    logits = objective.model(input_ids=batch.input_ids_BL).logits.log_softmax(-1)
    position = batch.predicted_from(at)
    nll = -logits[position].gather(1, batch.labels_BT[at][:, None])[:, 0]
    torch.testing.assert_close(first.double(), nll, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.mul_(1.1)
    after, _ = objective(batch, totals)
    objective.readings.share(ONE_PROCESS)
    assert float(after.detach()) != float(before.detach())
    torch.testing.assert_close(gate_at(objective, batch).first_nll_R, first)


def test_labels_ahead_change_nothing_before_them(parts) -> None:
    """The share of a row knows its own label and those before it, as the loss on it does."""
    objective, _, opened = parts
    objective.readings = None
    sample = opened.samples.load(0, with_sources=True).sample(1)
    plain = collate([sample], opened.domains)
    half = plain.labels_BT.shape[1] // 2
    changed = plain.sources.label_logprobs_BTM.clone()
    changed[:, half:] -= 3.0
    ahead = replace(plain, sources=replace(plain.sources, label_logprobs_BTM=changed))
    first, second = (gate_at(objective, one) for one in (plain, ahead))
    row_R = plain.label_rows()[1]
    before, after = row_R < half, row_R >= half
    for name in ("pool_nll_R", "prior_logit_R"):
        torch.testing.assert_close(
            getattr(first, name)[before], getattr(second, name)[before], equal_nan=True
        )
    assert not torch.equal(first.pool_nll_R[after], second.pool_nll_R[after])


# ------------------------------------------------------------------------------------ the record


names = st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=6)


@settings(deadline=None)
@given(names, st.randoms(use_true_random=False))
def test_readings_come_back_from_disk(tmp_path_factory, ids: list[str], random) -> None:
    ids = [name.encode("utf-8", "replace").decode() for name in ids]
    readings, folder = FirstReadings(), tmp_path_factory.mktemp("readings")
    expected = {}
    for name in dict.fromkeys(ids):
        count = random.randrange(1, 5)
        nll = torch.tensor([random.uniform(0, 40) for _ in range(count)])
        batch = SimpleNamespace(
            labels_BT=torch.zeros((1, count)),
            predicted_by_BT=torch.arange(count)[None],
            segment_ids=(name,),
        )
        readings.note(batch, torch.nonzero(batch.predicted_by_BT >= 0, as_tuple=True), nll)
        readings.note(batch, torch.nonzero(batch.predicted_by_BT >= 0, as_tuple=True), nll)
        readings.share(ONE_PROCESS)
        expected[name] = (batch, nll)
    readings.save(folder)
    again = FirstReadings.load(folder, hint="")
    for name, (batch, nll) in expected.items():
        assert name in again
        at = torch.nonzero(batch.predicted_by_BT >= 0, as_tuple=True)
        got = again.of(batch, at)
        torch.testing.assert_close(got, nll, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got, readings.of(batch, at), rtol=0, atol=0)
    assert "never read" * 3 not in again


def test_what_a_process_reads_all_know(parts, monkeypatch) -> None:
    _, batch, _ = parts
    at = batch.label_rows()
    mine, theirs = FirstReadings(), FirstReadings()
    theirs.note(batch, at, torch.arange(len(at[0])).float())
    monkeypatch.setattr("accelerate.utils.gather_object", lambda part: [*part, dict(theirs._new)])
    mine.share(SimpleNamespace(num_processes=2))
    torch.testing.assert_close(mine.of(batch, at), torch.arange(len(at[0])).float())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    FirstReadings().save(tmp_path)
    assert not FirstReadings.load(tmp_path, hint="")._nats
    (tmp_path / READINGS_FILE).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CorruptionError, match="Parquet") as told:
        FirstReadings.load(tmp_path, hint="delete it")
    assert READINGS_FILE in str(told.value)
    assert not FirstReadings.load(tmp_path / "nowhere", hint="")._nats


# ------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations find that both add something; a target of random weights adds nothing."""
    monkeypatch.setattr(HeldOutText, "shares", lambda *_: dict(SHARES))


def test_killed_in_a_later_pass_it_goes_on_to_the_same_weights(tmp_path: Path, mixed) -> None:
    options = {"control": False, "max_steps": None, "epochs": 3, "checkpoint_every": 1}
    shards = {"train": 2, "valid": 1}
    whole = make_run(tmp_path / "whole", shards=shards, train=options)
    train_run(whole)
    lines = lines_of(tmp_path / "whole", "train")
    steps = lines[-1]["step"]
    run = make_run(tmp_path / "parts", shards=shards, train=options)

    class Killed(BaseException):
        pass

    plain, count = trainer.TrainingLoop._step, 0

    def step(self, *args):
        nonlocal count
        count += 1
        if count == steps // 2 + 2:
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
    assert timeless(lines_of(tmp_path / "parts", "train")) == timeless(lines)
    newest = max(step_folders(tmp_path / "whole/run/checkpoints").items())[1]
    table = pq.read_table(newest / "trainer" / READINGS_FILE)
    inputs = open_inputs(whole, whole.sections["train"])
    planned = [s for shard in inputs.plan.splits()["train"] for s in inputs.plan.segments(shard)]
    assert sorted(table["segment_id"].to_pylist()) == sorted(s.segment_id for s in planned)
    in_words = call("train", "explain", tmp_path / "whole/run.yaml", "--segment", 0, "--json")
    assert '"first_reading": true' in in_words.stdout
    found = explain_segment(whole, segment="0")
    noted = dict(zip(table["segment_id"].to_pylist(), table["nats"].to_pylist(), strict=True))
    prior = found.fusion_share
    for p, first in zip(found.positions, noted[found.segment.segment_id], strict=True):
        if p.fused and p.pool_nats is not None:
            of_pool = prior * math.exp(-p.pool_nats)
            kept = of_pool / (of_pool + (1 - prior) * math.exp(-first))
            assert p.fusion_weight == pytest.approx((1 - found.clm_weight) * kept, rel=1e-3)
    assert len({round(p.fusion_weight, 6) for p in found.positions if p.fused}) > 3


def test_one_pass_keeps_no_readings(tmp_path: Path) -> None:
    options = {"control": False, "max_steps": None, "epochs": 1, "selector": "uniform"}
    run = make_run(tmp_path / "once", train=options)
    train_run(run)
    newest = max(step_folders(tmp_path / "once/run/checkpoints").items())[1]
    assert not (newest / "trainer" / READINGS_FILE).exists()
    assert not explain_segment(run, segment="0").first_reading
    other = make_run(tmp_path / "twice", train=options | {"fusion_gate": {"kind": "held_out"}})
    train_run(with_train(other, epochs=2))
    newest = max(step_folders(tmp_path / "twice/run/checkpoints").items())[1]
    assert not (newest / "trainer" / READINGS_FILE).exists()


def test_weights_in_the_log_are_means_over_covered_rows(tmp_path: Path, mixed) -> None:
    run = make_run(tmp_path, train={"control": False, "clm_weight": 0.25, "selector": "uniform"})
    train_run(run)
    logged = [line for line in lines_of(tmp_path, "train") if "fusion_weights" in line]
    assert logged
    values = [w for line in logged for w in line["fusion_weights"].values()]
    assert all(0.0 < weight < 0.75 for weight in values)
    assert len(set(np.round(values, 4))) > 3
