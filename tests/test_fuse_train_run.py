"""The train stage as a whole: what it leaves behind, and that no kill changes it."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse_train.cli import train
from fuse_train.config import TrainSection
from fuse_train.loop.objective import FusionObjective
from fuse_train.publish.done import read_done
from fuse_train.run import train_run
from launch.signals import StopFlag
from store_schema.errors import ConfigError, MismatchError, MissingError, ModelError, Stopped
from store_schema.text.tokenizer import SegmentTokenizer
from tests.aligned_factory import make_run

pytestmark = pytest.mark.usefixtures("quick_processes")
PLAIN = sys.executable
"""Loads everything by itself, as a user's does."""

TIMED = ("tokens_per_s", "seconds", "wait_seconds")
LOSS_KEYS = {"step", "num_steps", "loss", "clm", "lr", "grad_norm", *TIMED}
FUSED_KEYS = LOSS_KEYS | {
    *("fusion", "feedback", "pool", "uncovered", "weights"),
    *("weights_by_domain", "load_by_domain", "entropy_by_domain", "fusion_weights"),
    *("weight_spread", "weight_spread_by_domain"),
}


def lines_of(folder: Path, name: str) -> list[dict]:
    path = folder / "run" / "logs" / f"{name}_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def with_train(run, **changes):
    section = TrainSection.model_validate(run.sections["train"].model_dump() | changes)
    return run.model_copy(update={"sections": {"train": section}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of six steps."""
    folder = tmp_path_factory.mktemp("trained")
    run = make_run(folder)
    return folder, run, train_run(run)


def test_what_a_run_leaves(trained) -> None:
    folder, run, outcomes = trained
    assert [o.record.label for o in outcomes] == ["fused", "control"]
    assert all(o.fresh for o in outcomes)
    for name, keys in (("train", FUSED_KEYS), ("control", LOSS_KEYS)):
        lines = lines_of(folder, name)
        assert [line["step"] for line in lines] == list(range(7))
        scores = {"valid_bpb"} | ({"fusion_shares"} if name == "train" else set())
        assert set(lines[0]) == {"step"} | scores
        for line in lines[1:]:
            evaluated = scores if line["step"] % 3 == 0 else set()
            assert set(line) == keys | evaluated
        assert set(lines[3]["valid_bpb"]) == {"code", "prose", "facts"}
    fused = lines_of(folder, "train")[-1]
    assert sum(fused["weights"].values()) == pytest.approx(1.0, abs=1e-4)
    assert set(fused["weights_by_domain"]) == {"code", "prose", "facts"}
    for domain, load in fused["load_by_domain"].items():
        assert all(share >= fused["weights_by_domain"][domain][s] for s, share in load.items())
        assert 0 <= fused["entropy_by_domain"][domain] <= math.log(3) + 1e-6
        for name, spread in fused["weight_spread_by_domain"][domain].items():
            weight = fused["weights_by_domain"][domain][name]
            assert 0 < spread <= math.sqrt(weight * (1 - weight)) + 1e-4  # of values from 0 to 1
    assert fused["loss"] == pytest.approx(
        0.3 * fused["clm"] + 0.7 * fused["fusion"] + 0.01 * fused["feedback"] + fused["pool"],
        rel=0.05,  # rows that no source covers are ground truth alone
    )
    assert 0 <= fused["uncovered"] < 0.05
    first, last = lines_of(folder, "train")[0], lines_of(folder, "train")[-1]
    assert sum(last["valid_bpb"].values()) < sum(first["valid_bpb"].values())
    final = folder / "run" / "final"
    assert run.sections["train"].max_steps == outcomes[0].record.num_steps == 6
    assert sorted(p.name for p in final.iterdir()) == [
        "README.md", "config.json", "done.json", "generation_config.json", "model.safetensors",
        "run.yaml", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (folder / "run/selector/selector.safetensors").exists()


def test_final_folder_loads_plainly(trained) -> None:
    folder, run, _ = trained
    for final in (folder / "run/final", folder / "run/control/final"):
        model = AutoModelForCausalLM.from_pretrained(final)
        tokenizer = AutoTokenizer.from_pretrained(final)
        before = SegmentTokenizer.load(run.target, name="target")
        assert SegmentTokenizer(tokenizer, name="final").fingerprint == before.fingerprint
        assert model(**tokenizer("return x", return_tensors="pt")).logits.isfinite().all()
        front = yaml.safe_load((final / "README.md").read_text().split("---")[1])
        sources = [ref.model for ref in run.sources.values()] if final.parent.name == "run" else []
        assert front["base_model"] == [run.target.model, *sources]
        assert yaml.safe_load((final / "run.yaml").read_text())["name"] == "made"
    assert not same(weights(folder / "run/final"), weights(folder / "run/control/final"))


def test_a_target_with_more_ids_than_rows_keeps_both(tmp_path: Path) -> None:
    quick = {"control": False, "max_steps": 2, "eval_every": 1, "trackers": []}
    shards = {"train": 1, "valid": 1}
    run = make_run(tmp_path, train=quick, shards=shards, added=("<image>", "[PAD]"))
    (outcome,) = train_run(run)
    assert outcome.record.num_steps == 2
    final = tmp_path / "run/final"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(final),
        SegmentTokenizer.load(run.target.model_copy(update={"model": str(final)}), name="final"),
    )
    rows = model.get_input_embeddings().weight.shape[0]
    assert tokenizer.vocab_size == rows == len(AutoTokenizer.from_pretrained(final)) - 2
    assert tokenizer.beyond_rows == ("<image>", "[PAD]")
    assert tokenizer.fingerprint == SegmentTokenizer.load(run.target, name="t").fingerprint


def test_rerun_does_nothing_and_a_changed_config_is_refused(trained) -> None:
    folder, run, _ = trained
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*") if p.is_file()}
    again = train_run(run)
    assert not any(outcome.fresh for outcome in again)
    train_run(with_train(run, micro_batch_segments=3, log_every=1))
    assert {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*") if p.is_file()} == before
    with pytest.raises(MismatchError, match="another config"):
        train_run(with_train(run, clm_weight=0.9))
    with pytest.raises(MismatchError, match="another config"):
        train_run(run.model_copy(update={"seed": 1}))


def test_control_depends_on_nothing_of_the_sources(tmp_path, trained) -> None:
    folder, _, outcomes = trained
    other = make_run(tmp_path, train={"selector": "uniform", "tail": "drop", "clm_weight": 0.9})
    again = train_run(other)
    assert again[1].record.fingerprint == outcomes[1].record.fingerprint
    assert again[0].record.fingerprint != outcomes[0].record.fingerprint
    assert same(weights(tmp_path / "run/control/final"), weights(folder / "run/control/final"))
    assert not same(weights(tmp_path / "run/final"), weights(folder / "run/final"))


def test_lambda_one_is_the_control(tmp_path, trained) -> None:
    """Same start, tokens, order and optimizer: without fusion the two runs are one."""
    folder, _, _ = trained
    made = make_run(tmp_path, train={"selector": "uniform", "clm_weight": 1.0, "control": False})
    (outcome,) = train_run(made)
    control = weights(folder / "run/control/final")
    for name, tensor in weights(outcome.folder).items():
        torch.testing.assert_close(tensor, control[name], rtol=1e-5, atol=1e-6)


def test_best_weights_are_kept(tmp_path) -> None:
    """A rate that ruins the model: the final weights are those of the best evaluation."""
    settings = {"lr": 3.0, "selector": "uniform", "max_steps": 5, "control": False}
    made = make_run(tmp_path, train=settings | {"eval_every": 1, "checkpoint_every": 2})
    (outcome,) = train_run(made)
    bpb = {line["step"]: sum(line["valid_bpb"].values()) for line in lines_of(tmp_path, "train")}
    best = min(bpb, key=lambda step: (bpb[step], step))
    assert best < 5
    assert outcome.record.step == best
    assert sum(outcome.record.after.values()) == pytest.approx(bpb[best])
    start = weights(Path(made.target.model))
    assert same(weights(outcome.folder), start) == (best == 0)


def test_a_short_training_is_saved_on_the_way(tmp_path, capsys) -> None:
    """Without `checkpoint_every` a kill costs a tenth of the steps at most, and waits are announced."""
    train_run(make_run(tmp_path, train={"max_steps": 20, "control": False}))
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert saved == ["step-000018", "step-000020"]
    assert "evaluate fused untrained: " in capsys.readouterr().err


def wait_for_step(process: subprocess.Popen, log: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if log.exists() and log.read_bytes().count(b"\n") > step:
            return
        time.sleep(0.01)
    raise AssertionError("the stage did not come that far")


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch) -> None:
    """SIGTERM, then kill -9, then to the end: the same bits as one run without a stop."""
    monkeypatch.setattr(sys, "executable", PLAIN)
    settings = {"max_steps": 60, "checkpoint_every": 7, "eval_every": 10, "control": False}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = make_run(straight, train=settings)
    made = make_run(broken, train=settings)
    log = broken / "run/logs/train_steps.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "fuse_train", "run", str(broken / "run.yaml")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = start()
    wait_for_step(first, log, 10)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 75, (out, err)
    assert "rerun the same command" in err
    stopped_at = len(lines_of(broken, "train")) - 1
    assert (broken / f"run/checkpoints/step-{stopped_at:06d}").is_dir()
    second = start()
    wait_for_step(second, log, stopped_at + 12)
    second.kill()
    second.communicate()
    assert not (broken / "run/final").exists()
    train_run(made)
    train_run(whole)
    for name in ("final", "checkpoints/step-000060"):
        assert same(weights(straight / "run" / name), weights(broken / "run" / name)), name
    for name in ("optimizer.safetensors", "selector.safetensors"):
        inner = f"run/checkpoints/step-000060/trainer/{name}"
        assert (straight / inner).read_bytes() == (broken / inner).read_bytes(), name
    assert timeless(lines_of(broken, "train")) == timeless(lines_of(straight, "train"))


def test_stop_saves_a_checkpoint_and_resumes(tmp_path, monkeypatch, trained) -> None:
    folder, _, _ = trained
    made = make_run(tmp_path)
    original = FusionObjective.forward
    calls = []

    def counted(self, batch, totals):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, totals)

    monkeypatch.setattr(FusionObjective, "forward", counted)
    with pytest.raises(Stopped):
        train_run(made)
    saved = (tmp_path / "run/checkpoints").glob("step-*")
    assert max(path.name for path in saved) == "step-000002"
    train_run(made)
    assert same(weights(tmp_path / "run/final"), weights(folder / "run/final"))
    assert timeless(lines_of(tmp_path, "train")) == timeless(lines_of(folder, "train"))


def test_a_step_that_is_not_finite_is_not_taken(tmp_path, monkeypatch) -> None:
    made = make_run(tmp_path, train={"checkpoint_every": 1, "control": False})
    original, seen = FusionObjective.forward, []

    def poisoned(self, batch, totals):
        loss, sums = original(self, batch, totals)
        seen.append(batch.segment_ids)
        if len(seen) == 3:
            return loss * float("nan"), {k: v * float("nan") for k, v in sums.items()}
        return loss, sums

    monkeypatch.setattr(FusionObjective, "forward", poisoned)
    with pytest.raises(ModelError, match="not finite") as caught:
        train_run(made)
    assert "step 3" in caught.value.line()
    assert seen[2][0] in caught.value.line()
    assert (tmp_path / "run/checkpoints/step-000002").is_dir()
    assert not (tmp_path / "run/checkpoints/step-000003").exists()


def test_missing_inputs_are_told(tmp_path) -> None:
    made = make_run(tmp_path, shards={"train": 1})
    with pytest.raises(ConfigError, match="valid_split"):
        train_run(made)
    with pytest.raises(ConfigError, match="split"):
        train_run(with_train(made, train_split="nope"))
    (tmp_path / "run/aligned/code/manifest.json").unlink()
    with pytest.raises(MissingError, match="no store"):
        train_run(made)
    (tmp_path / "run/plan/plan.json").unlink()
    with pytest.raises(MissingError, match="no plan"):
        train_run(made)


def test_without_valid_split_and_without_best(tmp_path) -> None:
    plain = {"keep_best": False, "fusion_gate": {"kind": "none"}}
    made = make_run(tmp_path, shards={"train": 1}, train={"control": False, "max_steps": 2} | plain)
    (outcome,) = train_run(made)
    assert outcome.record.after is None
    assert outcome.record.step == 2
    assert "Not evaluated yet" in (outcome.folder / "README.md").read_text()


def test_accumulation_and_selector_file(tmp_path, trained) -> None:
    """Micro-batches change nothing but rounding; a selector can be given instead of pretrained."""
    folder, _, _ = trained
    settings = {"micro_batch_segments": 3, "control": False}
    made = make_run(tmp_path, train=settings)
    (outcome,) = train_run(made)
    reference = weights(folder / "run/final")
    for name, tensor in weights(outcome.folder).items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-3, atol=2e-4)
    given = with_train(
        made, asn={"start_from": str(folder / "run/selector"), "pretrain_steps": 0}
    ).model_copy(update={"run_dir": str(tmp_path / "run")})
    with pytest.raises(MismatchError):
        train_run(given)


def test_every_selector_and_tail_policy_trains(tmp_path) -> None:
    base = {"control": False, "max_steps": 1, "eval_every": None, "checkpoint_every": 1}
    made = make_run(tmp_path, shards={"train": 1, "valid": 1})
    cases = [
        {"selector": "min_ce", "tail": "drop"},
        {"selector": "static", "static_weights": {"code": 1.0}, "tail": "renormalise"},
        {"asn": {"objective": "both", "pretrain_steps": 2, "granularity": "segment"}},
        {"selector": "uniform", "append_eos": True, "gradient_checkpointing": True},
    ]
    for number, case in enumerate(cases):
        place = tmp_path / f"case{number}"
        place.mkdir()
        for part in ("plan", "aligned"):
            (place / part).symlink_to(tmp_path / "run" / part)
        run = with_train(made, **base, **case).model_copy(update={"run_dir": str(place)})
        (outcome,) = train_run(run)
        assert outcome.fresh
        assert read_done(place / "final") is not None


def test_bfloat16_products_with_float32_weights(tmp_path, trained) -> None:
    from accelerate.state import AcceleratorState

    folder, _, _ = trained
    made = make_run(tmp_path, train={"precision": "bfloat16", "control": False})
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        (outcome,) = train_run(made)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    got, exact = lines_of(tmp_path, "train"), lines_of(folder, "train")
    for ours, theirs in zip(got[1:], exact[1:], strict=True):
        assert ours["clm"] == pytest.approx(theirs["clm"], rel=0.02)
        assert ours["fusion"] == pytest.approx(theirs["fusion"], rel=0.02)
    assert {t.dtype for t in weights(outcome.folder).values()} == {torch.float32}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path) -> None:
    """Data parallel over gloo: sums and counts, so the same model up to rounding."""
    settings = {"micro_batch_segments": 3, "feedback_weight": 0.1, "control": False}
    one = make_run(tmp_path / "one", train=settings)
    make_run(tmp_path / "two", train=settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [sys.executable, *launcher, "-m", "fuse_train", "run", str(tmp_path / "two/run.yaml")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment |= {"TMPDIR": str(tmp_path)}  # torchrun leaves its logs there
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    train_run(one)
    expected = weights(tmp_path / "one/run/final")
    for name, tensor in weights(tmp_path / "two/run/final").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert [line["step"] for line in lines_of(tmp_path / "two", "train")] == list(range(7))


def test_table_of_the_command(trained, capsys) -> None:
    folder, _, _ = trained
    with pytest.raises(SystemExit) as ended:
        train.main(["run", str(folder / "run.yaml")])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.count("complete, nothing to do") == 2
    assert "bits per byte, valid" in out
    assert out.splitlines()[-1].startswith("mean")


def test_stop_flag_is_heeded_between_trainings(trained) -> None:
    flag = StopFlag()
    flag.ask(signal.SIGTERM)
    with pytest.raises(Stopped):
        flag.check()
