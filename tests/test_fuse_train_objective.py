"""The whole step: parts add up whatever the batch is cut into, and gradients go where they should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fuse_train.config import TrainSection
from fuse_train.data.stream import SampleStream, StreamOptions
from fuse_train.inputs import open_inputs
from fuse_train.loop.objective import FusionObjective, StepTotals, importance
from fuse_train.losses.loss_schedule import weights_at
from fuse_train.losses.losses import row_coefficients, with_tail_policy, with_temperature
from fuse_train.losses.span_likelihood import SpanBatch
from fuse_train.selector_fit.selector_training import known_rows, new_selector
from fuse_train.selectors.asn import AdaptiveSelector
from fuse_train.selectors.by_name import learner
from store_schema.errors import ConfigError
from tests.aligned_factory import make_run
from tests.dense_loss import dense_total
from tests.selector_views import build_selector

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


def step(run, batches, section, progress=0.0):
    """Loss and all gradients of one step over some micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    asn = section.selector == "asn"
    selector = (
        new_selector(section.asn, learner("asn"), 0) if asn else build_selector(section, SOURCES)
    )
    if isinstance(selector, AdaptiveSelector):
        torch.manual_seed(5)
        for layer in (selector.score, selector.direct):
            torch.nn.init.normal_(layer.weight, std=0.3)
    objective = FusionObjective(model, selector, section, SOURCES)
    objective.at_progress(progress)
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


@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "kl", "source_temperature": 2.0},
        {"divergence": "reverse_kl", "target_temperature": 1.5},
        {"divergence": "jsd", "jsd_beta": 0.2},
        {"divergence": "uld"},
        {"source_share": 0.3, "source_share_schedule": {"kind": "linear", "end": 0.9}},
        {"clm_weight_schedule": {"kind": "hard_and_decay"}},
    ],
)
def test_options_reach_the_loss(run, opened, loss) -> None:
    """Value and the target's gradient of a step equal the dense lines of what was asked for."""
    section = TrainSection(clm_weight=0.4, feedback_weight=0.0, selector="uniform", loss=loss)
    (batch,) = batches_of(opened, 10)
    got, grads = step(run, [batch], section, progress=0.5)
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    at, now = batch.label_rows(), weights_at(section, 0.5)
    hidden = model.base_model(batch.input_ids_BL).last_hidden_state
    hidden = hidden[at[0], batch.predicted_by_BT[at]]
    weights = build_selector(section, SOURCES)(batch.sources.view)[at].double()
    clm, fusion = row_coefficients(weights, batch.sources.covered_BTM[at], now.clm_weight)
    rows = with_tail_policy(batch.sources.rows(at), "bucket")
    rows = with_temperature(rows, section.loss.source_temperature)
    total = dense_total(
        hidden, model.lm_head.weight, batch.labels_BT[at], clm, rows, fusion, now.divergence
    )
    (total / len(at[0])).backward()
    assert got == pytest.approx(float(total.detach()) / len(at[0]), rel=1e-6)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            grads[f"model.{name}"], parameter.grad, rtol=1e-5, atol=1e-6 * scale
        )


@pytest.mark.parametrize("reference", ["pool", "code"])
def test_only_rows_of_large_excess_are_trained_on(run, opened, reference) -> None:
    section = TrainSection(
        selector="uniform", loss={"keep_share": 0.25, "keep_reference": reference}
    )
    (batch,) = batches_of(opened, 10)
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    objective = FusionObjective(model, build_selector(section, SOURCES), section, SOURCES)
    seen = {}

    def watch(_, __, out):
        out.last_hidden_state.register_hook(lambda grad: seen.update(grad=grad))

    model.base_model.register_forward_hook(watch)
    loss, _ = objective(batch, StepTotals(batch.num_labels, 0))
    loss.backward()
    at = batch.label_rows()
    trained = seen["grad"][at[0], batch.predicted_by_BT[at]].abs().sum(-1) > 0
    known = ~batch.sources.label_logprobs_BTM[at].isnan()
    known = known[:, SOURCES.index(reference)] if reference != "pool" else known.any(-1)
    assert int(trained[known].sum()) == round(0.25 * int(known.sum()))
    assert bool(trained[~known].all())


def test_unknown_reference_is_refused() -> None:
    section = TrainSection(loss={"keep_share": 0.5, "keep_reference": "nobody"})
    with pytest.raises(ConfigError, match="expected pool, code, prose, facts, got nobody"):
        FusionObjective(torch.nn.Linear(1, 1), None, section, SOURCES)


def with_spans(batch):
    """Spans of three rows each, of made-up probability, the same whatever the batch is cut into."""
    count = len(batch.segment_ids)
    rows = torch.arange(batch.labels_BT.shape[1])
    index = torch.where(batch.label_bytes_BT > 0, rows // 3, -1)[..., None].expand(-1, -1, 3)
    seeds = torch.tensor([sum(map(ord, name)) for name in batch.segment_ids]).view(count, 1, 1)
    nats = -(((index + 1) * 7 + seeds * 3) % 11).float() - 0.5
    return replace(batch, spans=SpanBatch(index.int(), nats))


def test_spans_add_their_loss_and_its_gradient(run, opened) -> None:
    """Against the whole objective by autograd; and the cut into micro-batches does not matter."""
    from tests.test_fuse_train_span_likelihood import reference

    plain = TrainSection(selector="uniform", feedback_weight=0.0)
    section = plain.model_copy(
        update={"loss": plain.loss.model_copy(update={"span_weight": 3.0, "span_temperature": 5.0})}
    )
    (batch,) = batches_of(opened, 10)
    batch = with_spans(batch)
    without, base = step(run, [batch], plain)
    whole, grads = step(run, [batch], section)
    parts, of_parts = step(run, [with_spans(b) for b in batches_of(opened, 3)], section)
    assert parts == pytest.approx(whole, rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    at = batch.label_rows()
    logq = model(batch.input_ids_BL).logits.log_softmax(-1)[at[0], batch.predicted_by_BT[at]]
    nll = -logq[torch.arange(len(at[0])), batch.labels_BT[at]]
    weights = build_selector(plain, SOURCES)(batch.sources.view)[at].double()
    spans = 3.0 * reference(nll, weights, batch.spans, at, 5.0) / len(at[0])
    spans.backward()
    assert whole - without == pytest.approx(float(spans.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = base[f"model.{name}"] + parameter.grad
        scale = float(expected.abs().max())
        for got in (grads, of_parts):
            torch.testing.assert_close(got[f"model.{name}"], expected, rtol=1e-4, atol=1e-5 * scale)


def test_threshold_schedule_sets_the_selectors(run) -> None:
    section = TrainSection(loss={"threshold_schedule": {"kind": "linear", "end": 0.5}})
    selector = new_selector(section.asn, learner("asn"), 0)
    objective = FusionObjective(torch.nn.Linear(1, 1), selector, section, SOURCES)
    objective.at_progress(0.5)
    assert selector.threshold == pytest.approx((section.asn.threshold + 0.5) / 2)


def test_prompts_are_context_and_have_no_loss(run, opened) -> None:
    """A response of 4 tokens after a prompt of 5: its mean cost, and no gradient for the prompt's words
    but through what the response reads."""
    from fuse_train.data.batch import collate
    from fuse_train.data.samples import DecodedShard
    from store_schema.plan.plan import Segment

    prompt, response = (7, 8, 9, 10, 11), np.array([20, 21, 22, 23])
    segment = Segment(0, "d#0", "d", "code", "train", 0, 4, True, '{"prompt": "x"}', "abcd")
    shard = DecodedShard(
        [segment], [prompt], np.array([0, 4]), response, np.arange(1, 5, dtype=np.uint32), (), None
    )
    batch = collate([shard.sample(0)], opened.domains)
    assert batch.num_labels == 4
    assert batch.predicted_by_BT.tolist() == [[4, 5, 6, 7]]
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    objective = FusionObjective(model, None, TrainSection().control_section())
    loss, _ = objective(batch, StepTotals(batch.num_labels, 0))
    full = torch.tensor([[*prompt, *response.tolist()]])
    logq = model(full).logits[0].log_softmax(-1)
    expected = -logq[torch.arange(4, 8), torch.from_numpy(response)].mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_batch_without_any_entry_is_ground_truth(run, opened) -> None:
    (batch,) = batches_of(opened, 10)
    sources = batch.sources
    uncovered = replace(
        batch,
        sources=replace(
            sources,
            entry_ids_BTMK=sources.entry_ids_BTMK[..., :0],
            entry_probs_BTMK=sources.entry_probs_BTMK[..., :0],
            tail_BTM=torch.ones_like(sources.tail_BTM),
            covered_BTM=torch.zeros_like(sources.covered_BTM),
        ),
    )
    plain = TrainSection(selector="uniform").control_section()
    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    alone, _ = FusionObjective(model, None, plain)(batch, StepTotals(batch.num_labels, 0))
    for name in ("cross_entropy", "jsd", "uld"):
        section = TrainSection(selector="uniform", loss={"divergence": name, "source_share": 0.5})
        objective = FusionObjective(model, build_selector(section, SOURCES), section, SOURCES)
        loss, _ = objective(uncovered, StepTotals(batch.num_labels, 0))
        assert float(loss.detach()) == pytest.approx(float(alone.detach()), rel=1e-9)
