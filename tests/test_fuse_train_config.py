"""Every constraint of the train section, broken once."""

from __future__ import annotations

import pytest

from fuse_train.config import TrainSection
from tests.wrong_values import refuses


@pytest.mark.parametrize(
    "wrong",
    [
        {"clm_weight": 1.1},
        {"clm_weight": -0.1},
        {"selector": "hedge_fund"},
        {"selector": "static"},
        {"selector": "static", "static_weights": {"a": -1.0}},
        {"selector": "static", "static_weights": {"a": 0.0}},
        {"tail": "ignore"},
        {"feedback_weight": -1},
        {"pool_weight": -1},
        {"asn": {"threshold": 1.0}},
        {"asn": {"hidden_size": 0}},
        {"asn": {"objective": "none"}},
        {"asn": {"granularity": "token"}},
        {"asn": {"features": "future"}},
        {"asn": {"lr": 0}},
        {"asn": {"pretrain_steps": -1}},
        {"asn": {"pretrain_batch_segments": 0}},
        {"lr": 0},
        {"min_lr_ratio": 1.5},
        {"warmup_ratio": 1.0},
        {"weight_decay": -1},
        {"max_grad_norm": 0},
        {"epochs": 0},
        {"max_steps": 0},
        {"batch_segments": 0},
        {"micro_batch_segments": 0},
        {"precision": "fp8"},
        {"train_split": ""},
        {"valid_split": ""},
        {"eval_every": 0},
        {"eval_segments": 0},
        {"control_overrides": {"lr": 0}},
        {"control_overrides": {"clm_weight": 0.5}},
        {"shuffle_shards": 0},
        {"cache_gib": -1},
        {"prefetch_batches": -1},
        {"head_chunk_rows": 0},
        {"log_every": 0},
        {"checkpoint_every": 0},
        {"save_total_limit": 0},
        {"optim": "adam"},
        {"optim_kwargs": [1]},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_kwargs": "fast"},
        {"lora": {"r": 0}},
        {"lora": {"alpha": 0}},
        {"lora": {"dropout": 1.0}},
        {"lora": {"targets": []}},
        {"lora": {"targets": "q_proj"}},
        {"lora": {"rank": 4}},
        {"early_stopping_patience": 0},
        {"pack_tokens": 0},
        {"torch_compile": "fast"},
        {"trackers": ["excel"]},
        {"push_to_hub": "a/b/c"},
        {"push_to_hub": ""},
        {"learning_rate": 1e-3},
    ],
)
def test_wrong_values_are_refused(wrong) -> None:
    refuses(TrainSection, wrong)


def test_control_has_nothing_of_the_sources() -> None:
    section = TrainSection(
        selector="min_ce", tail="drop", clm_weight=0.5, lr=1e-4, batch_segments=4,
        control_overrides={"lr": 2e-4},
    )  # fmt: skip
    control = section.control_section()
    assert (control.clm_weight, control.selector, control.lr) == (1.0, "uniform", 2e-4)
    assert control.batch_segments == 4
    assert TrainSection(push_to_hub="me/model").control_section().push_to_hub is None
    other = TrainSection(selector="asn", tail="bucket", clm_weight=0.9, lr=1e-4, batch_segments=4)
    assert control.content() == other.control_section().content() | {"lr": 2e-4}


def test_speed_settings_do_not_shape_content() -> None:
    plain = TrainSection().content()
    tuned = TrainSection(
        micro_batch_segments=1, head_chunk_rows=7, log_every=3, control=False, pack_tokens=64,
        torch_compile="inductor", trackers=(), push_to_hub="me/model", hub_private=False,
        allow_partial=True,
    )  # fmt: skip
    assert tuned.content() == plain
    shaped = ({"optim": "sgd"}, {"lora": {"r": 2}}, {"early_stopping_patience": 1})
    assert all(TrainSection.model_validate(given).content() != plain for given in shaped)
    assert TrainSection(lr=2e-3).content() != plain
