"""Schedules are functions of the step's place in the run; options that cannot work are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fuse_train.config import TrainSection
from fuse_train.loss_config import ScheduleSection
from fuse_train.losses.loss_schedule import scheduled, weights_at
from tests.wrong_values import refuses


@pytest.mark.parametrize(
    ("kind", "end", "values"),
    [
        ("constant", None, [0.2, 0.2, 0.2, 0.2]),
        ("linear", 0.6, [0.2, 0.3, 0.4, 0.6]),
        ("linear", 0.0, [0.2, 0.15, 0.1, 0.0]),
        ("cosine", 0.6, [0.2, 0.2 + 0.4 * 0.14644660940672627, 0.4, 0.6]),
        ("hard_and_decay", None, [0.2, 0.4, 0.6, 1.0]),
    ],
)
def test_values_at_the_quarters(kind, end, values) -> None:
    schedule = ScheduleSection(kind=kind, end=end)
    got = [scheduled(0.2, schedule, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert got == pytest.approx(values)
    assert scheduled(0.2, None, 0.7) == 0.2


def test_each_schedule_moves_its_own_number() -> None:
    section = TrainSection(
        clm_weight=0.3,
        feedback_weight=0.1,
        asn={"threshold": 0.0},
        loss={
            "divergence": "kl",
            "source_share": 0.4,
            "source_share_schedule": {"kind": "linear", "end": 1},
            "clm_weight_schedule": {"kind": "hard_and_decay"},
            "feedback_schedule": {"kind": "linear", "end": 0},
            "threshold_schedule": {"kind": "cosine", "end": 0.2},
        },
    )
    first, middle, last = (weights_at(section, p) for p in (0.0, 0.5, 1.0))
    assert (first.clm_weight, middle.clm_weight, last.clm_weight) == pytest.approx((0.3, 0.65, 1.0))
    assert (first.feedback_weight, last.feedback_weight) == pytest.approx((0.1, 0.0))
    assert (first.threshold, middle.threshold, last.threshold) == pytest.approx((0.0, 0.1, 0.2))
    assert first.divergence.source_share == pytest.approx(0.4)
    assert last.divergence.source_share == pytest.approx(1.0)
    assert first.divergence.name == "kl"
    plain = weights_at(TrainSection(), 0.5)
    assert plain.threshold is None
    assert plain.divergence.source_share is None


@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "wasserstein"},
        {"jsd_beta": 0.0},
        {"jsd_beta": 1.0},
        {"source_temperature": 0},
        {"target_temperature": -1},
        {"source_share": 1.5},
        {"source_share_schedule": {"kind": "linear", "end": 1}},
        {"source_share": 0.4, "source_share_schedule": {"kind": "linear", "end": 1.5}},
        {"clm_weight_schedule": {"kind": "linear"}},
        {"clm_weight_schedule": {"kind": "linear", "end": 1.1}},
        {"clm_weight_schedule": {"kind": "hard_and_decay", "end": 0.5}},
        {"clm_weight_schedule": {"kind": "constant", "end": 0.5}},
        {"clm_weight_schedule": {"kind": "cosine", "end": -0.5}},
        {"threshold_schedule": {"kind": "linear", "end": 1}},
        {"threshold_schedule": {"kind": "hard_and_decay"}},
        {"feedback_schedule": {"kind": "steps"}},
        {"keep_share": 0},
        {"keep_share": 1.2},
        {"span_weight": -1},
        {"span_weight": float("nan")},
        {"span_temperature": 0},
        {"lambda": 0.3},
    ],
)
def test_options_that_cannot_be_are_refused(loss) -> None:
    refuses(TrainSection, {"loss": loss})


@pytest.mark.parametrize("beta", [0.01, 0.99])
def test_the_weight_of_jsd_may_be_anything_between(beta) -> None:
    assert TrainSection(loss={"divergence": "jsd", "jsd_beta": beta}).loss.options == beta


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "uld"])
def test_whole_divergences_need_the_tail(divergence) -> None:
    assert TrainSection(loss={"divergence": divergence}).loss.divergence == divergence
    for tail in ("drop", "renormalise"):
        with pytest.raises(ValidationError, match="needs tail: bucket"):
            TrainSection(tail=tail, loss={"divergence": divergence})


def test_the_control_has_none_of_it() -> None:
    section = TrainSection(loss={"clm_weight_schedule": {"kind": "linear", "end": 0.5}})
    control = section.control_section()
    assert weights_at(control, 1.0).clm_weight == 1.0
    assert control.loss == TrainSection().loss
