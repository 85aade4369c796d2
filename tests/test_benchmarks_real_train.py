from __future__ import annotations

import pytest

from benchmarks import real_train
from fuse_train.loop.trainer import TrainingLoop


def test_both_sides_take_their_turns(tiny_models, monkeypatch) -> None:
    from accelerate.state import AcceleratorState

    setting = real_train.setting_of(tiny_models["target"], segments=2, tokens=33)
    assert setting.precision == "float32"
    steps, plain = [], TrainingLoop._step

    def noted(self: TrainingLoop, step: int, batches, asked: float):
        line = plain(self, step, batches, asked)
        steps.append((step, batches[0].num_labels, line["loss"]))
        return line

    monkeypatch.setattr(TrainingLoop, "_step", noted)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        found = real_train.timed(setting, rounds=2)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert [(step, labels) for step, labels, _ in steps] == [(n, 2 * 33) for n in range(3)]
    assert all(value > 0 for side in found for value in side)
    assert steps[0][2] == pytest.approx(steps[1][2], rel=0.1)
