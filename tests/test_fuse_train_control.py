"""Early stopping, trackers, the hub, compiling, and the arithmetic of a step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from fuse_train.config import TrainSection
from fuse_train.data.stream import SampleStream
from fuse_train.inputs import open_inputs, stream_options
from fuse_train.loop.objective import FusionObjective, StepTotals, cv2_slope
from fuse_train.loop.trackers import numbers, tracker_names
from fuse_train.publish.final import final_choice
from fuse_train.publish.hub import hub_card, push_final
from fuse_train.run import train_run
from fuse_train.selectors.by_name import by_rule
from store_schema.config import ModelRef
from store_schema.errors import ConfigError, MissingError, StorageError
from store_schema.model.models import with_folder
from tests.aligned_factory import make_run
from tests.test_fuse_train_run import lines_of, same, timeless, weights, with_train

SMALL = {"train": 1, "valid": 1}
QUICK = {"control": False, "selector": "uniform", "trackers": []}


class KilledError(BaseException):
    """Stands for kill -9."""


def test_killed_at_every_step_equals_uninterrupted(tmp_path, monkeypatch) -> None:
    """One kill after another, in each step once: the same bits, the same log, the same order."""
    settings = {
        "checkpoint_every": 2,
        "eval_every": 2,
        "control": False,
        "asn": {"pretrain_steps": 2},
    }
    whole = make_run(tmp_path / "whole", train=settings)
    train_run(whole)
    made = make_run(tmp_path / "made", train=settings)
    original = FusionObjective.forward

    for step in range(6):
        seen: list[int] = []

        def killed(self, batch, totals, seen=seen, step=step):
            done = len(lines_of(tmp_path / "made", "train")) - 1
            seen.append(done)
            if done == step:
                raise KilledError
            return original(self, batch, totals)

        with monkeypatch.context() as patched:
            patched.setattr(FusionObjective, "forward", killed)
            with pytest.raises(KilledError):
                train_run(made)
        assert seen[-1] == step
    train_run(made)
    for name in ("final", "checkpoints/step-000006"):
        assert same(weights(tmp_path / "made/run" / name), weights(tmp_path / "whole/run" / name))
    assert timeless(lines_of(tmp_path / "made", "train")) == timeless(
        lines_of(tmp_path / "whole", "train")
    )


def test_early_stopping_counts_evaluations_and_survives_a_kill(tmp_path, monkeypatch) -> None:
    """A rate that ruins the model: training ends after two evaluations without a better one."""
    ruinous = QUICK | {
        "lr": 3.0, "max_steps": 9, "eval_every": 1, "early_stopping_patience": 2,
        "checkpoint_every": 1,
    }  # fmt: skip
    whole = make_run(tmp_path / "whole", train=ruinous, shards=SMALL)
    (outcome,) = train_run(whole)
    lines = lines_of(tmp_path / "whole", "train")
    bpb = [sum(line["valid_bpb"].values()) for line in lines]
    best = min(range(len(bpb)), key=bpb.__getitem__)
    assert len(bpb) == best + 3 < 10
    assert outcome.record.num_steps == best + 2
    assert outcome.record.step == best
    assert lines[-1]["num_steps"] == lines[-1]["step"]  # told as finished
    made = make_run(tmp_path / "made", train=ruinous, shards=SMALL)
    with monkeypatch.context() as patched:

        def killed(*args, **kwargs):
            raise KilledError

        patched.setattr("fuse_train.training._finish", killed)
        with pytest.raises(KilledError):
            train_run(made)
    (again,) = train_run(made)
    assert again.record.num_steps == outcome.record.num_steps
    assert same(weights(again.folder), weights(outcome.folder))
    assert len(lines_of(tmp_path / "made", "train")) == len(lines)
    (other,) = train_run(
        with_train(
            make_run(tmp_path / "c", train=ruinous, shards=SMALL), early_stopping_patience=None
        )
    )
    assert other.record.num_steps == 9


def test_early_stopping_needs_evaluations(tmp_path) -> None:
    made = make_run(
        tmp_path,
        shards={"train": 1},
        train=QUICK | {"keep_best": False, "early_stopping_patience": 1},
    )
    with pytest.raises(ConfigError, match="early_stopping_patience to null"):
        train_run(made)


def test_tensorboard_gets_the_numbers_of_the_step_log(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = make_run(
        tmp_path, shards=SMALL, train=QUICK | {"trackers": None, "max_steps": 3, "eval_every": 2}
    )
    assert tracker_names(made.sections["train"]) == ["tensorboard"]
    train_run(made)
    folder = tmp_path / "run/logs/tensorboard/fused/made"
    events = EventAccumulator(str(folder)).Reload()
    lines = lines_of(tmp_path, "train")
    assert set(events.Tags()["scalars"]) == set().union(*map(numbers, lines))
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in lines[1:]]
    assert [event.step for event in events.Scalars("valid_bpb/code")] == [0, 2, 3]
    assert [event.value for event in events.Scalars("weights/code")] == pytest.approx(
        [1 / 3] * 3, abs=0.02
    )


def test_numbers_of_a_line() -> None:
    line = {"step": 3, "num_steps": 9, "loss": 1.5, "weights": {"a": 0.25}, "by": {"d": {"a": 1}}}
    assert numbers(line) == {"loss": 1.5, "weights/a": 0.25, "by/d/a": 1.0}
    assert tracker_names(TrainSection(trackers=())) == []


class Hub:
    """Stands for huggingface_hub.HfApi."""

    calls: list[tuple] = []  # noqa: RUF012
    refuses = False

    def create_repo(self, repo, *, private, exist_ok):
        if self.refuses:
            raise OSError("503 Service Unavailable")
        assert exist_ok
        self.calls.append(("create", repo, private))
        return SimpleNamespace(repo_id=f"me/{repo}" if "/" not in repo else repo)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        names = sorted(p.name for p in Path(folder_path).iterdir())
        kept = [name for name in names if name not in ignore_patterns]
        self.calls.append(("folder", repo_id, kept))

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self.calls.append((path_in_repo, repo_id, path_or_fileobj.decode()))


def test_final_folder_is_pushed_once(tmp_path, monkeypatch) -> None:
    hub = type("Fresh", (Hub,), {"calls": []})
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    made = make_run(tmp_path, shards=SMALL, train=QUICK | {"max_steps": 1, "control": True})
    train_run(made)
    assert hub.calls == []
    pushed = with_train(made, push_to_hub="me/fused")
    monkeypatch.setattr(hub, "refuses", True)
    with pytest.raises(StorageError, match="hub refused the model in me/fused"):
        train_run(pushed)
    monkeypatch.setattr(hub, "refuses", False)
    assert not any(outcome.fresh for outcome in train_run(pushed))
    create, folder, card = hub.calls
    assert create == ("create", "me/fused", True)
    assert "model.safetensors" in folder[2]
    assert "tokenizer.json" in folder[2]
    assert not {"README.md", "run.yaml"} & set(folder[2])
    front = yaml.safe_load(card[2].split("---")[1])
    assert front["base_model"] == ["made/code", "made/prose", "made/facts"]  # no local folder
    train_run(pushed)
    assert len(hub.calls) == 3
    record = json.loads((tmp_path / "run/pushed.json").read_text())
    assert record["repo"] == "me/fused"
    push_final(tmp_path / "run/final", "me/other", private=False, fingerprint=record["fingerprint"])
    assert len(hub.calls) == 6


def test_card_without_models_of_the_hub() -> None:
    card = "---\nlibrary_name: transformers\nbase_model:\n- /models/a\n- ./b\n---\n\n# Title\n---\n"
    assert hub_card(card) == "---\nlibrary_name: transformers\n---\n\n# Title\n---\n"


@pytest.mark.slow
def test_compiled_training_is_the_same_training(tmp_path) -> None:
    made = [
        make_run(
            tmp_path / name, shards=SMALL, train=QUICK | {"max_steps": 1, "torch_compile": backend}
        )
        for name, backend in (("plain", None), ("compiled", "eager"))
    ]
    plain, compiled = (train_run(run)[0] for run in made)
    expected = weights(plain.folder)
    for name, tensor in weights(compiled.folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
    assert plain.record.fingerprint == compiled.record.fingerprint


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adafactor", "lr_scheduler_type": "linear"},
        {"optim": "sgd", "lr_scheduler_type": "constant"},
    ],
)
def test_other_optimizers_and_schedules_train(tmp_path, settings) -> None:
    made = make_run(tmp_path, shards=SMALL, train=QUICK | settings | {"lr": 0.01, "max_steps": 4})
    train_run(made)
    bpb = [
        sum(line["valid_bpb"].values())
        for line in lines_of(tmp_path, "train")
        if "valid_bpb" in line
    ]
    assert bpb[-1] < bpb[0]
    rates = [line["lr"] for line in lines_of(tmp_path, "train")[1:]]
    linear = [0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3]
    assert rates == pytest.approx(
        linear if settings["lr_scheduler_type"] == "linear" else [0.01] * 4
    )


def test_first_step_has_the_first_rate_of_the_warm_up(tmp_path) -> None:
    made = make_run(
        tmp_path, shards=SMALL, train=QUICK | {"warmup_ratio": 0.5, "max_steps": 8, "lr": 0.008}
    )
    train_run(made)
    rates = [line["lr"] for line in lines_of(tmp_path, "train")[1:]]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008])
    assert rates[4] > rates[5] > rates[6] > rates[7] > 0.0008


def gradients(objective, batches, labels) -> list[torch.Tensor]:
    objective.zero_grad()
    for batch in batches:
        loss, _ = objective(batch, StepTotals(labels, labels))
        loss.backward()
    return [p.grad.clone() for p in objective.parameters() if p.grad is not None]


def test_uneven_micro_batches_divide_by_the_labels_of_the_whole_step(tmp_path) -> None:
    """8 segments as one batch, as 3 + 3 + 2, and one by one: the same gradient."""
    from transformers import AutoModelForCausalLM

    made = make_run(tmp_path, shards=SMALL)
    section = made.sections["train"]
    inputs = open_inputs(made, section)
    stream = SampleStream(inputs.samples, stream_options(made, section), inputs.domains)
    model = AutoModelForCausalLM.from_pretrained(made.target.model).double()
    objective = FusionObjective(model, by_rule("uniform"), section)
    (whole,) = stream.step_batches(0)
    labels = whole.num_labels
    expected = gradients(objective, [whole], labels)
    for size, count in ((3, 3), (1, 8)):
        parts = stream.step_batches(0, micro_batch_segments=size)
        assert len(parts) == count
        assert len({part.num_labels for part in parts}) > 1
        assert sum(part.num_labels for part in parts) == labels
        for ours, right in zip(gradients(objective, parts, labels), expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-8)
    averaged = [  # what is wrong: each micro-batch divided by its own labels
        sum(parts) / 3
        for parts in zip(
            *(
                gradients(objective, [part], part.num_labels)
                for part in stream.step_batches(0, micro_batch_segments=3)
            ),
            strict=True,
        )
    ]
    assert not all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(averaged, expected, strict=True))


def test_feedback_pulls_towards_balance() -> None:
    """A step against the slope of CV^2 takes from the source that has the most weight."""
    importance_M = torch.tensor([8.0, 3.0, 1.0])
    slope_M = cv2_slope(importance_M)
    assert slope_M[0] > 0 > slope_M[2]
    after_M = importance_M - 0.5 * slope_M / slope_M.abs().max()

    def cv2(x: torch.Tensor) -> float:
        return float(x.var(correction=0) / x.mean() ** 2)

    assert cv2(after_M) < cv2(importance_M)
    torch.testing.assert_close(cv2_slope(torch.ones(3)), torch.zeros(3))


def test_a_resumed_stream_reads_only_what_its_step_needs(tmp_path) -> None:
    made = make_run(tmp_path, segments_per_shard=4, shards={"train": 8, "valid": 1})
    section = made.sections["train"].model_copy(update={"shuffle_shards": 2})
    inputs = open_inputs(made, section)
    loads = []
    original = inputs.samples.load

    class Counted:
        def __getattr__(self, name):
            return getattr(inputs.samples, name)

        def load(self, position, *, with_sources):
            loads.append(position)
            return original(position, with_sources=with_sources)

    stream = SampleStream(Counted(), stream_options(made, section), inputs.domains)
    stream.step_batches(1001)
    assert len(loads) == 2  # the window of two shards that holds the step, of 250 epochs


def test_epochs_deal_shards_in_another_order() -> None:
    from fuse_train.data.order import SampleOrder

    order = SampleOrder([3] * 12, seed=0, window_shards=1)
    epochs = [
        list(dict.fromkeys(ref.shard for ref in order.samples(epoch * 36, 36)))
        for epoch in range(3)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)


def test_what_the_run_file_says_of_the_target_holds_for_its_checkpoints(tmp_path) -> None:
    ref = ModelRef(
        model="hub/name", revision="abc", dtype="bfloat16", trust_remote_code=True, bos="never"
    )
    there = with_folder(ref, tmp_path)
    assert (there.model, there.revision) == (str(tmp_path), None)
    assert (there.trust_remote_code, there.bos, there.dtype) == (True, "never", "bfloat16")


def test_final_weights_are_read_with_the_run_files_flags(tmp_path, monkeypatch) -> None:
    import fuse_train.model.target as place

    made = make_run(tmp_path, shards=SMALL, train=QUICK | {"max_steps": 1})
    seen, original = [], place.load_model

    def spied(ref, **options):
        seen.append(ref)
        return original(ref, **options)

    monkeypatch.setattr(place, "load_model", spied)
    ref = made.target.model_copy(update={"trust_remote_code": True})
    train_run(made.model_copy(update={"target": ref}))
    assert len(seen) == 2
    assert all(ref.trust_remote_code for ref in seen)


def test_weights_that_were_deleted_are_missed(tmp_path) -> None:
    from fuse_train.loop.checkpoint import BestRecord, TrainState

    state = TrainState(
        fingerprint="f", step=4, next_sample=32, best=BestRecord(step=2, bpb={"x": 1.0})
    )
    with pytest.raises(MissingError, match="best-000002"):
        final_choice(state, tmp_path, keep_best=True)
    with pytest.raises(MissingError, match="step-000004"):
        final_choice(state, tmp_path, keep_best=False)
    start = state.model_copy(update={"best": BestRecord(step=0, bpb={"x": 1.0})})
    assert final_choice(start, tmp_path, keep_best=True).folder is None
