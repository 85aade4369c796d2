"""`train check` needs a target and a run file, nothing else, and refuses what training would."""

from __future__ import annotations

import json

import pytest
import yaml

from fuse_train.cli import train
from tests.tiny import tiny_model


@pytest.fixture
def made(tmp_path):
    target = tiny_model(tmp_path / "target")
    run = {
        "name": "x",
        "run_dir": str(tmp_path / "run"),
        "sources": {"a": {"model": "some/model"}},
        "target": {"model": str(target)},
        "corpus": {"inputs": [{"path": "given.jsonl", "corpus": "given"}, {"path": "rest.jsonl"}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def checked(folder, capsys, *settings: str) -> tuple[int, str, str]:
    options = [part for setting in settings for part in ("--set", setting)]
    with pytest.raises(SystemExit) as ended:
        train.main(["check", str(folder / "run.yaml"), *options])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return ended.value.code, told.out, told.err


@pytest.mark.parametrize("setting", ["train.seed_is_not_a_field=1", "target.dtype=b16"])
def test_the_run_file_itself(made, capsys, setting) -> None:
    assert checked(made, capsys, setting)[0] == 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.optim_kwargs={unheard_of: 1}", "do not fit optimizer"),
        ("train.lr_scheduler_kwargs={unheard_of: 1}", "lr_scheduler_kwargs"),
        ("train.lora={targets: [no_such_layer]}", "no such layers"),
        ("train.lora={targets: [lm_head]}", "not supported"),
        ("train.trackers=[trackio]", "not installed"),
        ("train={selector: static, static_weights: {b: 1}}", "unknown sources"),
        ("train.loss={keep_share: 0.5, keep_reference: b}", "none of the sources"),
        ("train.stages=[{weights: {best: 1, given: 1}}]", "no input has"),
    ],
)
def test_what_training_would_refuse(made, capsys, setting, said) -> None:
    code, _, err = checked(made, capsys, setting)
    assert code == 2
    assert said in err


def test_a_target_that_cannot_be_used(made, capsys) -> None:
    (made / "target/model.safetensors").write_bytes(b"")
    code, _, err = checked(made, capsys)
    assert code == 2
    assert "damaged or cut short" in err


@pytest.mark.parametrize(
    "setting",
    ["train.pack_tokens=64", "train.lora={r: 2}", "train.stages=[{weights: {given: 1}}]"],
)
def test_what_can_be_trained_passes_and_leaves_nothing(made, capsys, setting) -> None:
    given = {"temperature": 0.5}
    (made / "target/generation_config.json").write_text(json.dumps(given))
    code, out, err = checked(made, capsys, setting)
    assert code == 0, err
    assert out.startswith("train check: ")
    assert not (made / "run/final").exists()
    assert not list((made / "target").glob(".*"))
