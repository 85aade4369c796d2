"""One contract for every selector, and what each adds to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_train.config import TrainSection
from fuse_train.losses.losses import importance_cv2
from fuse_train.selectors import SELECTORS
from fuse_train.selectors.asn import SharedScorer, with_summary
from fuse_train.selectors.by_name import by_rule, learner
from fuse_train.selectors.features import FEATURES, HEDGE_START
from fuse_train.selectors.kind import LearnedKind, RuleKind, SearchedKind
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.kinds.hedge import HedgeSection
from fuse_train.selectors.selectors import Selector, SourceView, StaticSelector
from store_schema.errors import ConfigError, CorruptionError, MismatchError, MissingError
from tests.selector_views import build_selector, changed_from, made_sources, view_of

B, T, M = 3, 7, 3


def view(num_sources: int = M, seed: int = 0) -> SourceView:
    """Random figures; row (0, 0) is covered by nobody, row (0, 1) by source 1 alone."""
    g = torch.Generator().manual_seed(seed)
    covered = torch.rand(B, T, num_sources, generator=g) < 0.7
    covered[0, 0] = False
    covered[0, 1] = torch.arange(num_sources) == 1
    features = torch.randn(B, T, num_sources, len(FEATURES), generator=g)
    past = -4 * torch.rand(B, T, num_sources, generator=g)
    past[:, 0] = torch.nan
    past[1, 4, 0] = torch.nan
    return SourceView(covered, features, torch.rand(B, num_sources, generator=g), past)


def small(covered: torch.Tensor, bpb: torch.Tensor) -> SourceView:
    """A view of these alone."""
    past = torch.full(covered.shape, torch.nan)
    return SourceView(covered, torch.zeros(*covered.shape, 1), bpb, past)


NETWORKS = {
    "shared": ("asn", {}),
    "fusion-x": ("asn", {"preset": "fusion-x"}),
    "constant": ("constant", {}),
}
"""Each network that learns: its selector, and the options that choose it."""


def stirred(name: str = "asn", num_sources: int = M, **fields):
    """A selector that learns with no parameter at 0."""
    torch.manual_seed(1)
    kind = learner(name)
    made = kind.network(kind.section(**fields), num_sources)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def registered(name: str) -> Selector:
    """The selector of that name with the options that it has by default."""
    kind = SELECTORS[name]
    if isinstance(kind, LearnedKind):
        return stirred(name)
    if isinstance(kind, RuleKind):
        options = {"a": 0.2, "b": 0.8} if name == "static" else kind.default_options()
        return kind.make(options, ["a", "b", "c"])
    assert isinstance(kind, SearchedKind)
    logs = -np.random.default_rng(0).exponential(1.0, (20, M))
    return kind.search(kind.default_options(), logs, 0, None)


MADE: dict[str, Callable[[], Selector]] = {
    **{name: partial(registered, name) for name in SELECTORS.names()},
    "hedge": lambda: by_rule("hedge", rate=1.0, share=0.0),
    "hedge_shared": lambda: by_rule("hedge", rate=0.7, share=0.05),
    "asn_untrained": lambda: SharedScorer(AsnSection()),
    "asn_segment": lambda: stirred(granularity="segment"),
    "asn_past": stirred,
    "asn_threshold": lambda: stirred(threshold=0.6),
    "asn_top_p": lambda: stirred(cut="top_p", top_p=0.5),
    "asn_none": lambda: stirred(cut="none"),
    "fusion-x": lambda: stirred(preset="fusion-x"),
    "fusion-x_untrained": lambda: stirred(preset="fusion-x", untrained=True, pretrain_steps=0),
}
"""Every selector of the registry, and some with other options."""

ANY_SOURCES = [name for name, make in MADE.items() if not make().bound]


@pytest.mark.parametrize("name", MADE)
def test_contract(name) -> None:
    seen = view()
    weights = MADE[name]()(seen)
    assert weights.shape == seen.covered_BTM.shape
    assert weights.dtype == torch.float32
    assert bool((weights >= 0).all())
    assert bool((weights[~seen.covered_BTM] == 0).all())
    total = weights.sum(-1)
    torch.testing.assert_close(total, seen.covered_BTM.any(-1).float())
    assert weights[0, 1].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("name", MADE)
@given(seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=12, deadline=None)
def test_labels_change_no_weights_at_or_before_their_row(name, seed, data) -> None:
    """Nothing of label i, or of rows after i, is known at row i; unless it is marked hindsight."""
    selector = MADE[name]()
    if selector.hindsight:
        return
    sources = made_sources(10, M, seed)
    row = data.draw(st.integers(1, 9))
    row_known = data.draw(st.booleans())
    before = selector(view_of(sources))
    changed = [changed_from(a, row, seed + m, row_known=row_known) for m, a in enumerate(sources)]
    after = selector(view_of(changed))
    assert torch.equal(before[:, : row + 1], after[:, : row + 1])


@pytest.mark.parametrize("name", ["hedge", "asn_past"])
def test_labels_do_change_weights_after_their_row(name) -> None:
    sources = made_sources(10, M, 0)
    changed = [changed_from(a, 4, m, row_known=True) for m, a in enumerate(sources)]
    selector = MADE[name]()
    before, after = selector(view_of(sources)), selector(view_of(changed))
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("name", ANY_SOURCES)
@given(st.permutations(range(M)), st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_order_of_sources_does_not_matter(name, order, seed) -> None:
    sources = made_sources(8, M, seed)
    selector = MADE[name]()
    straight, turned = (
        selector(view_of(sources)),
        selector(view_of([sources[m] for m in order])),
    )
    torch.testing.assert_close(straight[..., order], turned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ANY_SOURCES)
@pytest.mark.parametrize("num_sources", [1, 2, 6])
def test_any_number_of_sources(name, num_sources) -> None:
    seen = view_of(made_sources(8, num_sources, 3))
    weights = MADE[name]()(seen)
    assert weights.shape == seen.covered_BTM.shape
    torch.testing.assert_close(weights.sum(-1), seen.covered_BTM.any(-1).float())


@pytest.mark.parametrize("name", ["uniform", "hedge", "asn", "asn_past", "asn_segment", "avg_ce"])
def test_a_source_that_covers_nothing_changes_nothing(name) -> None:
    selector, seen = MADE[name](), view()
    more = SourceView(
        torch.cat([seen.covered_BTM, torch.zeros(B, T, 1, dtype=torch.bool)], -1),
        torch.cat([seen.features_BTMF, torch.randn(B, T, 1, len(FEATURES))], 2),
        torch.cat([seen.source_bpb_BM, torch.full((B, 1), torch.inf)], 1),
        torch.cat([seen.past_logprobs_BTM, torch.full((B, T, 1), torch.nan)], 2),
    )
    torch.testing.assert_close(selector(more)[..., :3], selector(seen))
    torch.testing.assert_close(selector(more.of_sources([0, 1, 2])), selector(seen))


@pytest.mark.parametrize("name", SELECTORS.names())
def test_features_are_asked_for_by_those_that_look_at_them(name) -> None:
    kind, selector, seen = SELECTORS[name], registered(name), view()
    without = replace(seen, features_BTMF=seen.features_BTMF[..., :0])
    if kind.needs_features(kind.default_options()):
        assert not torch.equal(
            selector(seen), selector(replace(seen, features_BTMF=-seen.features_BTMF))
        )
    else:
        assert torch.equal(selector(without), selector(seen))


@pytest.mark.parametrize("name", SELECTORS.names())
def test_the_registry_says_what_the_selector_is(name) -> None:
    kind, selector = SELECTORS[name], registered(name)
    assert selector.learns == kind.learns == bool(list(selector.parameters()))
    assert selector.hindsight == kind.hindsight


def test_who_is_hindsight_and_who_is_bound() -> None:
    made = {name: make() for name, make in MADE.items()}
    hindsight = {name for name, selector in made.items() if selector.hindsight}
    others = {"asn_segment", "fusion-x", "fusion-x_untrained"}
    assert hindsight == {"min_ce", "avg_ce", "author"} | others
    assert {name for name, selector in made.items() if selector.bound} == {
        "static", "fusion-x", "fusion-x_untrained", "constant", "bayes",
    }  # fmt: skip


def test_uniform_and_static() -> None:
    seen = small(torch.tensor([[[True, True, False]]]), torch.ones(1, 3))
    assert by_rule("uniform")(seen).flatten().tolist() == [0.5, 0.5, 0.0]
    weights = StaticSelector([1.0, 3.0, 4.0])(seen).flatten().tolist()
    assert weights == [0.25, 0.75, 0.0]


def test_min_ce_takes_the_best_covered_source_and_the_first_of_equals() -> None:
    covered = torch.tensor([[[True, True, True], [True, False, True], [True, False, False]]])
    bpb = torch.tensor([[2.0, 1.0, 2.0]])
    weights = by_rule("min_ce")(small(covered, bpb))
    assert weights[0].tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]
    unknown = torch.tensor([[float("inf"), float("inf"), 5.0]])
    weights = by_rule("min_ce")(small(covered, unknown))
    assert weights[0].tolist() == [[0, 0, 1], [0, 0, 1], [1, 0, 0]]


def test_avg_ce_is_the_softmax_of_rewards() -> None:
    bpb = torch.tensor([[2.0, 0.5, math.inf]])
    weights = by_rule("avg_ce")(small(torch.ones(1, 2, 3, dtype=torch.bool), bpb))[0, 1].tolist()
    terms = [math.exp(r) for r in (2**-2.0, 2**-0.5, 0.0)]  # exp(-nats) = 2^-bits
    assert weights == pytest.approx([t / sum(terms) for t in terms])


def test_fusion_x_sees_rewards_alone_and_has_the_papers_shape() -> None:
    network, seen = stirred(preset="fusion-x"), view()
    shapes = [tuple(p.shape) for p in network.mlp.parameters() if p.ndim == 2]
    assert shapes == [(2 * M, M), (M, 2 * M), (M, M)]
    assert (network.cut, network.threshold) == ("threshold", 0.15)
    other = view(seed=5)
    same = SourceView(
        seen.covered_BTM, other.features_BTMF, seen.source_bpb_BM, other.past_logprobs_BTM
    )
    assert torch.equal(network(seen), network(same))
    rewards = 2.0**-seen.source_bpb_BM
    gates = network.mlp(rewards).softmax(-1)[2]
    full = seen.covered_BTM[2].all(-1)
    torch.testing.assert_close(network.gates(seen)[2][full], gates.expand(int(full.sum()), M))


def test_an_untrained_network_is_another_for_each_batch_and_the_same_when_it_comes_again() -> None:
    network = MADE["fusion-x_untrained"]()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    covered = torch.ones(1, 1, M, dtype=torch.bool)
    one, two = (small(covered, torch.full((1, M), bpb)) for bpb in (1.0, 1.001))
    first, other = network.gates(one), network.gates(two)
    assert not torch.allclose(first, other, atol=1e-2)  # not for what little the rewards differ
    assert torch.equal(network.gates(one), first)
    assert torch.equal(network.gates(two), other)
    assert torch.equal(torch.get_rng_state(), state)  # draws nothing that a training draws
    assert not any(p.requires_grad for p in network.parameters())
    assert not first.requires_grad


def test_constant_gate_varies_with_coverage_alone() -> None:
    gate, seen, other = stirred("constant"), view(), view(seed=7)
    same = SourceView(
        seen.covered_BTM, other.features_BTMF, other.source_bpb_BM, other.past_logprobs_BTM
    )
    assert torch.equal(gate(seen), gate(same))


def test_asn_drops_what_is_not_above_the_threshold() -> None:
    asn = stirred(threshold=0.3)
    gates = torch.tensor([[[0.5, 0.31, 0.19], [0.29, 0.28, 0.27], [0.0, 0.0, 0.0]]])
    weights = asn.keep(gates)
    assert weights[0, 0].tolist() == pytest.approx([0.5 / 0.81, 0.31 / 0.81, 0.0])
    assert weights[0, 1].tolist() == [1.0, 0.0, 0.0]
    assert weights[0, 2].tolist() == [0.0, 0.0, 0.0]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    asn = stirred(cut="top_p", top_p=0.6)
    gates = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.0, 0.0, 0.0], [0.4, 0.2, 0.4]]])
    weights = asn.keep(gates)
    assert weights[0, 0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert weights[0, 1].tolist() == [0.0, 1.0, 0.0]
    assert weights[0, 2].tolist() == [0.0, 0.0, 0.0]
    assert weights[0, 3].tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert stirred(cut="none").keep(gates)[0, 0].tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_untrained_asn_is_the_hedge_it_starts_from() -> None:
    rate, share = map(float, HEDGE_START.removeprefix("prior_hedge_").split("_"))
    seen = view_of(made_sources(12, M, 2))
    torch.testing.assert_close(
        SharedScorer(AsnSection(cut="none"))(seen), by_rule("hedge", rate=rate, share=share)(seen)
    )


@pytest.mark.parametrize("kind", ["shared", "fusion-x", "constant"])
def test_gradients_are_finite_where_nothing_is_covered(kind) -> None:
    name, chosen = NETWORKS[kind]
    asn, seen = stirred(name, cut="none", **chosen), view()
    asn(seen).square().sum().backward()
    for label, parameter in asn.named_parameters():
        assert parameter.grad is not None, label
        assert bool(parameter.grad.isfinite().all()), label


@pytest.mark.parametrize("kind", ["shared", "fusion-x", "constant"])
def test_a_step_down_the_feedback_gradient_balances_the_load(kind) -> None:
    name, chosen = NETWORKS[kind]
    asn, seen = stirred(name, cut="none", **chosen), view()
    with torch.no_grad():
        for parameter in asn.parameters():
            parameter *= 0.3  # not so sure that the softmax is flat

    def feedback() -> torch.Tensor:
        return importance_cv2(asn(seen).sum((0, 1)))

    before = feedback()
    before.backward()
    with torch.no_grad():
        for parameter in asn.parameters():
            parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)
    assert feedback().item() < before.item()


def test_summary_leaves_out_sources_that_do_not_cover() -> None:
    features = torch.tensor([[[[1.0], [3.0], [100.0]]]])
    covered = torch.tensor([[[True, True, False]]])
    summary = with_summary(features, covered)[0, 0, :2].tolist()
    assert summary == [[1.0, -1.0, 2.0], [3.0, 1.0, 0.0]]


@pytest.mark.parametrize("kind", ["shared", "fusion-x", "constant"])
def test_saves_and_loads(kind, tmp_path) -> None:
    name, chosen = NETWORKS[kind]
    asn = stirred(name, **chosen)
    asn.save(tmp_path)
    torch.manual_seed(9)
    other = stirred(name, **chosen)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load(tmp_path)
    assert torch.equal(asn(view()), other(view()))
    with pytest.raises(MissingError, match="nowhere"):
        other.load(tmp_path / "nowhere")
    weights = tmp_path / "selector.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptionError, match="changed since they were written"):
        other.load(tmp_path)
    weights.write_bytes(b"no")
    with pytest.raises(CorruptionError, match="unreadable"):
        other.load(tmp_path)
    (tmp_path / "selector.json").write_text('{"kind": 1}')
    with pytest.raises(CorruptionError, match="unreadable") as refused:
        other.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_selectors_of_other_shape_are_refused(tmp_path) -> None:
    stirred(hidden_size=8).save(tmp_path)
    with pytest.raises(MismatchError, match=r"hidden_size 9.*hidden_size 8"):
        SharedScorer(AsnSection(hidden_size=9)).load(tmp_path)
    with pytest.raises(MismatchError, match="kind constant"):
        learner("constant").network(AsnSection(), 3).load(tmp_path)
    stirred("constant").save(tmp_path)
    with pytest.raises(MismatchError, match=r"num_sources 4.*num_sources 3"):
        learner("constant").network(AsnSection(), 4).load(tmp_path)


def test_cut_is_no_part_of_what_was_trained(tmp_path) -> None:
    """A trained network may be asked with another threshold: gates are the same."""
    stirred().save(tmp_path)
    other = SharedScorer(AsnSection(cut="none"))
    other.load(tmp_path)
    assert torch.equal(other.gates(view()), stirred().gates(view()))


def test_static_weights_of_unknown_sources_are_refused() -> None:
    section = TrainSection(selector="static", static_weights={"a": 1.0, "typo": 2.0})
    with pytest.raises(ConfigError, match="typo"):
        build_selector(section, ["a", "b"])
    section = TrainSection(selector="static", static_weights={"a": 1.0})
    built = build_selector(section, ["a", "b", "c"])
    assert built(view())[0, 1].tolist() == [0.0, 1.0, 0.0]


def test_options_reach_the_selector() -> None:
    section = TrainSection(selector="hedge", hedge=HedgeSection(rate=0.5, share=0.25))
    hedge = build_selector(section, ["a"])
    assert torch.equal(hedge(view()), by_rule("hedge", rate=0.5, share=0.25)(view()))
    assert not torch.equal(hedge(view()), by_rule("hedge")(view()))
    with pytest.raises(TypeError, match="asn has to be trained"):
        by_rule("asn")
