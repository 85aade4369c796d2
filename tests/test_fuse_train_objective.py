"""The whole step: parts add up whatever the batch is cut into, and gradients go where they should."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fuse_train.asn import AdaptiveSelector
from fuse_train.config import TrainSection
from fuse_train.objective import FusionObjective, StepTotals, importance
from fuse_train.run import open_inputs
from fuse_train.selector_training import known_rows, new_selector
from fuse_train.selectors import build_selector
from fuse_train.stream import SampleStream, StreamOptions
from tests.aligned_factory import make_run

SOURCES = ["code", "prose", "facts"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("objective"), shards={"train": 1, "valid": 1})


@pytest.fixture(scope="module")
def opened(run):
    return open_inputs(run, run.sections["train"])


def batches_of(opened, micro: int):
    options = StreamOptions(0, 10, micro, shuffle_shards=1, cache_gib=1.0)
    return SampleStream(opened.samples, options, opened.domains).step_batches(0)


def step(run, batches, section):
    """Loss and all gradients of one step over some micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    asn = section.selector == "asn"
    selector = new_selector(section.asn, 0) if asn else build_selector(section, SOURCES)
    if isinstance(selector, AdaptiveSelector):
        torch.manual_seed(5)
        for layer in (selector.score, selector.direct):
            torch.nn.init.normal_(layer.weight, std=0.3)
    objective = FusionObjective(model, selector, section)
    totals = StepTotals(
        sum(batch.num_labels for batch in batches),
        sum(known_rows(batch.sources) for batch in batches),
        sum(importance(selector, batch) for batch in batches)
        if isinstance(selector, AdaptiveSelector) and section.feedback_weight
        else None,
    )
    total = 0.0
    for batch in batches:
        loss, _ = objective(batch, totals)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in objective.named_parameters()}


@pytest.mark.parametrize("objective", ["pool", "fusion", "both"])
def test_accumulation_and_padding_do_not_matter(run, opened, objective) -> None:
    section = TrainSection(asn={"objective": objective}, feedback_weight=0.5)
    (_, whole), (_, parts), (_, ones) = (
        step(run, batches_of(opened, micro), section) for micro in (10, 4, 1)
    )
    for name, grad in whole.items():
        assert grad is not None, name
        assert bool((grad != 0).any()), name
        scale = float(grad.abs().max())
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(ones[name], grad, rtol=1e-4, atol=1e-5 * scale)


def test_loss_is_the_sum_of_its_terms(run, opened) -> None:
    batches = batches_of(opened, 10)
    (batch,) = batches
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    with torch.no_grad():
        logq = model(batch.input_ids_BL).logits.log_softmax(-1)
    expected, rows, sources = 0.0, 0, batch.sources
    uniform = TrainSection(clm_weight=0.4, feedback_weight=0.0, selector="uniform")
    loss, _ = step(run, batches, uniform)
    weights = build_selector(uniform, SOURCES)(sources.view)
    for b, i in zip(*(t.tolist() for t in batch.label_rows()), strict=True):
        q = logq[b, batch.predicted_by_BT[b, i]].exp()
        nll = -float(q[batch.labels_BT[b, i]].log())
        fusion, covered = 0.0, bool(sources.covered_BTM[b, i].any())
        for m in range(3):
            ids = sources.entry_ids_BTMK[b, i, m]
            p = sources.entry_probs_BTMK[b, i, m][ids >= 0].double()
            ids = ids[ids >= 0].long()
            ce = -float((p * q[ids].log()).sum())
            tail = float(sources.tail_BTM[b, i, m])
            ce -= tail * float((1 - q[ids].sum()).log()) if len(ids) else 0.0
            fusion += float(weights[b, i, m]) * ce
        expected += 0.4 * nll + 0.6 * fusion if covered else nll
        rows += 1
    assert loss == pytest.approx(expected / rows, rel=1e-5)


def test_pool_objective_leaves_the_asn_to_the_labels(run, opened) -> None:
    """With objective pool the target's gradient does not depend on the pool weight, nor the ASN's on
    the fusion loss."""
    batches = batches_of(opened, 10)
    base = {"feedback_weight": 0.0, "asn": {"objective": "pool"}}
    _, one = step(run, batches, TrainSection(**base, pool_weight=1.0))
    _, two = step(run, batches, TrainSection(**base, pool_weight=2.0, clm_weight=0.9))
    for name, grad in one.items():
        if name.startswith("selector"):
            torch.testing.assert_close(two[name], 2 * grad)


def test_ground_truth_alone_equals_the_models_own_loss(run, opened) -> None:
    (batch,) = batches_of(opened, 10)
    model = AutoModelForCausalLM.from_pretrained(run.target.model)
    objective = FusionObjective(model, None, TrainSection().control_section())
    loss, sums = objective(batch, StepTotals(batch.num_labels, 0))
    # Transformers shifts labels itself; the last label of the longest row is not in its inputs.
    full = torch.cat([batch.input_ids_BL, torch.zeros_like(batch.input_ids_BL[:, :1])], 1)
    labels = torch.full_like(full, -100)
    for b, i in zip(*(t.tolist() for t in batch.label_rows()), strict=True):
        labels[b, int(batch.predicted_by_BT[b, i]) + 1] = batch.labels_BT[b, i]
        full[b, int(batch.predicted_by_BT[b, i]) + 1] = batch.labels_BT[b, i]
    own = model(input_ids=full, labels=labels).loss.detach()
    assert float(loss.detach()) == pytest.approx(float(own), rel=1e-5)
    assert float(sums["clm"]) / batch.num_labels == pytest.approx(float(own), rel=1e-5)
