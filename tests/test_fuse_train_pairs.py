"""Pairwise fusion: a training for each pair, each a run of its own, merged at the end."""

from __future__ import annotations

import os
import shutil
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse_train.config import TrainSection
from fuse_train.loop.objective import FusionObjective
from fuse_train.pairs import pair_runs
from fuse_train.publish.done import read_done
from fuse_train.run import open_inputs, output_folder, train_run
from launch.summary import pair_folders
from launch.training_status import read_trainings
from store_schema.errors import ConfigError, MismatchError, Stopped
from tests.aligned_factory import make_run
from tests.command import call, ok
from tests.test_fuse_train_run import same, weights, with_train

PAIRWISE = {
    "selector": "min_ce",
    "pairwise": {"pivot": "code", "merge": {"method": "linear"}},
    "max_steps": 3,
    "eval_every": None,
    "checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    made = make_run(folder, train=PAIRWISE)
    return folder, made, train_run(made)


def test_each_pair_is_trained_alone_and_the_models_are_merged(trained) -> None:
    folder, _, outcomes = trained
    assert [outcome.name for outcome in outcomes] == [
        "with prose",
        "with facts",
        "fused",
        "control",
    ]
    parts = [load_file(folder / f"run/pairs/{name}/final/model.safetensors") for name in
             ("prose", "facts")]  # fmt: skip
    merged = weights(folder / "run/final")
    for name, tensor in merged.items():
        mean = (parts[0][name].double() + parts[1][name].double()) / 2
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-8)
    assert not same(parts[0], parts[1])
    AutoModelForCausalLM.from_pretrained(folder / "run/final")
    AutoTokenizer.from_pretrained(folder / "run/final")
    record = read_done(folder / "run/final")
    assert (record.label, record.num_steps) == ("fused", 6)
    assert not (folder / "run/pairs/prose/control").exists()


def test_a_pair_is_the_same_as_a_run_of_these_two_sources(trained, tmp_path) -> None:
    folder, made, _ = trained
    two = {name: made.sources[name] for name in ("code", "facts")}
    alone = with_train(made, pairwise=None, control=False).model_copy(
        update={"sources": two, "run_dir": str(tmp_path), "data_dir": made.folder}
    )
    train_run(alone)
    assert same(weights(tmp_path / "final"), weights(folder / "run/pairs/facts/final"))


def test_pairs_have_the_run_s_own_alignment_of_another_run_s_data(trained, tmp_path) -> None:
    folder, made, _ = trained
    shutil.copytree(folder / "run/plan", tmp_path / "data/plan")
    shutil.copytree(folder / "run/aligned", tmp_path / "own/aligned")
    own = with_train(made, control=False).model_copy(
        update={"run_dir": str(tmp_path / "own"), "data_dir": str(tmp_path / "data")}
    )
    train_run(own)
    assert same(weights(tmp_path / "own/final"), weights(folder / "run/final"))
    shutil.move(tmp_path / "own/aligned", tmp_path / "elsewhere")
    named = own.model_copy(update={"aligned_dir": str(tmp_path / "elsewhere")})
    assert not any(outcome.fresh for outcome in train_run(named))


def test_status_and_submit_know_the_pairs(trained, tmp_path) -> None:
    _, made, _ = trained
    states = {t.label: (t.state, t.step) for t in read_trainings(made, datetime.now(UTC))}
    assert states == {"with prose": ("done", 3), "with facts": ("done", 3), "control": ("done", 3)}
    folders = pair_folders(made)
    assert folders == {name: Path(pair.folder) for name, pair in pair_runs(
        made, made.section("train", TrainSection)).items()}  # fmt: skip
    remote = made.model_copy(update={"run_dir": "s3://bucket/x"})
    runs = pair_runs(remote, made.section("train", TrainSection))
    assert {name: output_folder(pair) for name, pair in runs.items()} == pair_folders(remote)


def test_again_nothing_is_done(trained) -> None:
    _, made, _ = trained
    assert [outcome.fresh for outcome in train_run(made)] == [False] * 4
    with pytest.raises(MismatchError):  # another merge is not put over it
        train_run(with_train(made, pairwise={"pivot": "code", "merge": {"method": "sce"}}))


def test_stopped_in_the_second_pair_and_gone_on_with(trained, tmp_path, monkeypatch) -> None:
    folder, _, _ = trained
    made = make_run(tmp_path, train=PAIRWISE)
    original, seen = FusionObjective.forward, []

    def counted(self, batch, totals):
        seen.append(batch)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, totals)

    monkeypatch.setattr(FusionObjective, "forward", counted)
    with pytest.raises(Stopped):
        train_run(made)
    assert read_done(tmp_path / "run/pairs/prose/final") is not None
    assert read_done(tmp_path / "run/pairs/facts/final") is None
    fresh = [outcome.fresh for outcome in train_run(made)]
    assert fresh == [False, True, True, True]
    assert same(weights(tmp_path / "run/final"), weights(folder / "run/final"))


def test_a_folder_with_a_training_of_all_sources_is_left_alone(tmp_path) -> None:
    made = make_run(tmp_path, train=PAIRWISE)
    step = tmp_path / "run/checkpoints/step-2"
    step.mkdir(parents=True)
    with pytest.raises(MismatchError, match="without pairs are in the run's folder"):
        train_run(made)
    assert step.is_dir()
    assert not (tmp_path / "run/pairs").exists()


def test_one_pair_by_the_command(trained, tmp_path) -> None:
    make_run(tmp_path, train=PAIRWISE)
    file = str(tmp_path / "run.yaml")
    assert "with facts: step 3 of 3" in ok("train", "run", file, "--pair", "facts")
    assert not (tmp_path / "run/final").exists()
    assert not (tmp_path / "run/control").exists()
    result = call("train", "run", file, "--pair", "code")
    assert result.exit_code == 2
    assert "expected prose, facts, got code" in result.stderr
    plain = ["run", file, "--pair", "facts", "--set", "train.pairwise=null"]
    assert "train.pairwise" in call("train", *plain).stderr


def test_refused(trained) -> None:
    _, made, _ = trained
    for pivot in ("nobody", "target"):
        wrong = with_train(made, pairwise={"pivot": pivot})
        with pytest.raises(ConfigError, match=r"train\.pairwise\.pivot"):
            pair_runs(wrong, wrong.section("train", TrainSection))
    one = made.model_copy(update={"sources": {"code": made.sources["code"]}})
    with pytest.raises(ConfigError, match="two sources or more"):
        pair_runs(one, one.section("train", TrainSection))


def test_what_pairwise_is_no_part_of_keeps_its_fingerprint(trained) -> None:
    _, made, _ = trained
    section = made.section("train", TrainSection)
    assert "pairwise" not in TrainSection().content()
    assert "pairwise" in section.content()
    assert section.control_section().pairwise is None
    assert open_inputs(made, section).samples.sources == ("code", "prose", "facts")
