"""Every constraint of the selectors' settings, broken once, and the paper's preset."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fuse_train.config import TrainSection
from fuse_train.selectors.features import HEDGE_START
from fuse_train.selectors.kinds.asn import AsnSection
from tests.wrong_values import refuses


@pytest.mark.parametrize(
    "wrong",
    [
        {"selector": "best"},
        {"hedge": {"rate": 0}},
        {"hedge": {"rate": float("inf")}},
        {"hedge": {"share": -0.1}},
        {"hedge": {"share": 1.0}},
        {"bayes": {"trials": 0}},
        {"asn": {"preset": "fusellm"}},
        {"asn": {"cut": "top_k"}},
        {"asn": {"top_p": 0}},
        {"asn": {"top_p": 1.1}},
        {"asn": {"granularity": "document"}},
        {"asn": {"frozen": True}},
        {"asn": {"start": "here"}},
    ],
)
def test_wrong_values_are_refused(wrong) -> None:
    refuses(TrainSection, wrong)


def test_hedge_has_a_fixed_share_unless_told_otherwise() -> None:
    """The hedge that users compare with is the one that an untrained network is, but for the prior."""
    hedge = TrainSection().hedge
    assert f"prior_hedge_{hedge.rate:g}_{hedge.share:g}" == HEDGE_START


def test_preset_is_the_papers_and_given_fields_win() -> None:
    paper = AsnSection.model_validate({"preset": "fusion-x"})
    assert (paper.cut, paper.threshold, paper.objective) == ("threshold", 0.15, "fusion")
    assert paper.granularity == "segment"
    other = AsnSection.model_validate({"preset": "fusion-x", "threshold": 0.3})
    assert (other.threshold, other.objective) == (0.3, "fusion")
    assert AsnSection.model_validate(other.model_dump()) == other


def test_untrained_is_never_trained_and_leaves_other_fingerprints_alone() -> None:
    made = AsnSection.model_validate({"preset": "fusion-x", "untrained": True})
    assert made.pretrain_steps == 0
    assert AsnSection.model_validate(made.model_dump()) == made
    assert "untrained" not in AsnSection().model_dump()
    for wrong in (
        {},
        {"preset": "fusion-x", "pretrain_steps": 1},
        {"preset": "fusion-x", "start_from": "x"},
    ):
        with pytest.raises(ValidationError, match="untrained needs"):
            AsnSection.model_validate(wrong | {"untrained": True})


def test_control_is_the_same_whatever_selects() -> None:
    plain = TrainSection().control_section().content()
    for fields in (
        {"selector": "hedge", "hedge": {"share": 0.1}},
        {"selector": "bayes", "bayes": {"trials": 3}},
        {"asn": {"preset": "fusion-x"}},
    ):
        assert TrainSection.model_validate(fields).control_section().content() == plain
