"""Loss options through a whole training run, from the run file's section to the step log."""

from __future__ import annotations

import json

import pytest

from fuse_train.run import train_run
from launch.summary import logs_folder
from store_schema.errors import ConfigError
from tests.aligned_factory import make_run


def trained(folder, **train):
    """Lines of the step log of a run of 4 steps."""
    section = {"max_steps": 4, "control": False, "eval_every": None, "trackers": []} | train
    run = make_run(folder, train=section, shards={"train": 2, "valid": 1})
    train_run(run)
    log = logs_folder(run) / "train_steps.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["step"]]


def test_lambda_goes_to_one_and_the_sources_fade(tmp_path) -> None:
    lines = trained(
        tmp_path,
        selector="uniform",
        clm_weight=0.2,
        loss={"clm_weight_schedule": {"kind": "hard_and_decay"}},
    )
    assert len(lines) == 4
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["clm"], rel=1e-6)
    assert abs(lines[0]["loss"] - lines[0]["clm"]) > 0.05


def test_spans_of_the_store_reach_the_loss(tmp_path) -> None:
    lines = trained(tmp_path, selector="uniform", clm_weight=1.0, loss={"span_weight": 2.0})
    for line in lines:
        assert line["spans"] > 0
        assert line["loss"] == pytest.approx(line["clm"] + 2.0 * line["spans"], rel=1e-5)


def test_everything_at_once(tmp_path) -> None:
    lines = trained(
        tmp_path,
        loss={
            "divergence": "jsd",
            "source_temperature": 1.5,
            "target_temperature": 2.0,
            "source_share": 0.4,
            "source_share_schedule": {"kind": "linear", "end": 1},
            "feedback_schedule": {"kind": "linear", "end": 0.5},
            "threshold_schedule": {"kind": "cosine", "end": 0.3},
            "keep_share": 0.6,
            "keep_reference": "code",
            "span_weight": 0.5,
        },
    )
    assert len(lines) == 4
    assert all(line["fusion"] > 0 for line in lines)


def test_an_unknown_reference_is_told_before_the_first_step(tmp_path) -> None:
    with pytest.raises(ConfigError, match="reference is none of the sources"):
        trained(tmp_path, loss={"keep_share": 0.5, "keep_reference": "nobody"})
