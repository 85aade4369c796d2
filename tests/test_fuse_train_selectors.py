"""One contract for every selector, and what each adds to it."""

from __future__ import annotations

import pytest
import torch

from fuse_train.asn import AdaptiveSelector, with_summary
from fuse_train.config import AsnSection, TrainSection
from fuse_train.features import FEATURES, PAST_FEATURES
from fuse_train.selectors import (
    MinCeSelector,
    SourceView,
    StaticSelector,
    UniformSelector,
    build_selector,
)
from store_schema.errors import ConfigError, MismatchError, MissingError

B, T, M = 3, 7, 3


def view(num_sources: int = M, seed: int = 0) -> SourceView:
    """Random figures; row (0, 0) is covered by nobody, row (0, 1) by source 1 alone."""
    g = torch.Generator().manual_seed(seed)
    covered = torch.rand(B, T, num_sources, generator=g) < 0.7
    covered[0, 0] = False
    covered[0, 1] = torch.arange(num_sources) == 1
    features = torch.randn(B, T, num_sources, len(FEATURES), generator=g)
    return SourceView(covered, features, torch.rand(B, num_sources, generator=g))


def stirred(**fields) -> AdaptiveSelector:
    """An ASN whose last layers are not zero."""
    torch.manual_seed(1)
    asn = AdaptiveSelector(AsnSection(**fields))
    torch.nn.init.normal_(asn.score.weight)
    torch.nn.init.normal_(asn.direct.weight)
    return asn


SELECTORS = {
    "uniform": UniformSelector,
    "static": lambda: StaticSelector([0.2, 0.8, 0.0]),
    "min_ce": MinCeSelector,
    "asn": stirred,
    "asn_untrained": lambda: AdaptiveSelector(AsnSection()),
    "asn_segment": lambda: stirred(granularity="segment"),
    "asn_past": lambda: stirred(features="past"),
    "asn_threshold": lambda: stirred(threshold=0.6),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_contract(name) -> None:
    seen = view()
    weights = SELECTORS[name]()(seen)
    assert weights.shape == seen.covered_BTM.shape
    assert weights.dtype == torch.float32
    assert bool((weights >= 0).all())
    assert bool((weights[~seen.covered_BTM] == 0).all())
    total = weights.sum(-1)
    torch.testing.assert_close(total, seen.covered_BTM.any(-1).float())
    assert weights[0, 1].tolist() == [0.0, 1.0, 0.0]


def test_uniform_and_static() -> None:
    seen = SourceView(
        torch.tensor([[[True, True, False]]]), torch.zeros(1, 1, 3, 1), torch.ones(1, 3)
    )
    assert UniformSelector()(seen).flatten().tolist() == [0.5, 0.5, 0.0]
    weights = StaticSelector([1.0, 3.0, 4.0])(seen).flatten().tolist()
    assert weights == [0.25, 0.75, 0.0]


def test_min_ce_takes_the_best_covered_source_and_the_first_of_equals() -> None:
    covered = torch.tensor([[[True, True, True], [True, False, True], [True, False, False]]])
    bpb = torch.tensor([[2.0, 1.0, 2.0]])
    weights = MinCeSelector()(SourceView(covered, torch.zeros(1, 3, 3, 1), bpb))
    assert weights[0].tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]
    unknown = torch.tensor([[float("inf"), float("inf"), 5.0]])
    weights = MinCeSelector()(SourceView(covered, torch.zeros(1, 3, 3, 1), unknown))
    assert weights[0].tolist() == [[0, 0, 1], [0, 0, 1], [1, 0, 0]]


def test_asn_drops_what_is_not_above_the_threshold() -> None:
    asn = stirred(threshold=0.3)
    gates = torch.tensor([[[0.5, 0.31, 0.19], [0.29, 0.28, 0.27], [0.0, 0.0, 0.0]]])
    weights = asn.keep(gates)
    assert weights[0, 0].tolist() == pytest.approx([0.5 / 0.81, 0.31 / 0.81, 0.0])
    assert weights[0, 1].tolist() == [1.0, 0.0, 0.0]
    assert weights[0, 2].tolist() == [0.0, 0.0, 0.0]


def test_asn_is_indifferent_to_order_and_number_of_sources() -> None:
    asn, seen = stirred(threshold=0.0), view()
    order = [2, 0, 1]
    turned = SourceView(
        seen.covered_BTM[..., order], seen.features_BTMF[:, :, order], seen.source_bpb_BM[:, order]
    )
    torch.testing.assert_close(asn(seen)[..., order], asn(turned))
    more = view(num_sources=5, seed=2)
    assert asn(more).shape == (B, T, 5)
    silent = SourceView(
        torch.cat([seen.covered_BTM, torch.zeros(B, T, 1, dtype=torch.bool)], -1),
        torch.cat([seen.features_BTMF, torch.randn(B, T, 1, len(FEATURES))], 2),
        torch.cat([seen.source_bpb_BM, torch.full((B, 1), torch.inf)], 1),
    )
    torch.testing.assert_close(asn(silent)[..., :3], asn(seen))


def test_asn_past_ignores_features_of_the_row() -> None:
    asn, seen = stirred(features="past"), view()
    changed = seen.features_BTMF.clone()
    changed[..., len(PAST_FEATURES) :] += 1.0
    other = SourceView(seen.covered_BTM, changed, seen.source_bpb_BM)
    assert torch.equal(asn(seen), asn(other))


def test_asn_gradients_are_finite_where_nothing_is_covered() -> None:
    asn, seen = stirred(), view()
    asn(seen).square().sum().backward()
    for parameter in asn.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


def test_summary_leaves_out_sources_that_do_not_cover() -> None:
    features = torch.tensor([[[[1.0], [3.0], [100.0]]]])
    covered = torch.tensor([[[True, True, False]]])
    summary = with_summary(features, covered)[0, 0, :2].tolist()
    assert summary == [[1.0, -1.0, 2.0], [3.0, 1.0, 0.0]]


def test_asn_saves_and_loads(tmp_path) -> None:
    asn = stirred(hidden_size=8)
    asn.save(tmp_path)
    other = AdaptiveSelector(AsnSection(hidden_size=8))
    other.load(tmp_path)
    assert torch.equal(asn(view()), other(view()))
    with pytest.raises(MismatchError, match="built otherwise"):
        AdaptiveSelector(AsnSection(hidden_size=9)).load(tmp_path)
    with pytest.raises(MissingError):
        other.load(tmp_path / "nowhere")


def test_static_weights_of_unknown_sources_are_refused() -> None:
    section = TrainSection(selector="static", static_weights={"a": 1.0, "typo": 2.0})
    with pytest.raises(ConfigError, match="typo"):
        build_selector(section, ["a", "b"])
    section = TrainSection(selector="static", static_weights={"a": 1.0})
    built = build_selector(section, ["a", "b", "c"])
    assert built(view())[0, 1].tolist() == [0.0, 1.0, 0.0]
