"""LoRA: adapters alone are trained, resumed to the bit, merged into a plain final folder."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fuse_train.config import LoraSection
from fuse_train.loop.objective import FusionObjective
from fuse_train.model.adapters import add_adapters, check_lora, merged
from fuse_train.model.models import load_model
from fuse_train.run import train_run
from store_schema.config import ModelRef
from store_schema.errors import ConfigError, CorruptionError
from tests.aligned_factory import make_run
from tests.test_fuse_train_run import lines_of, same, timeless, weights, with_train

LORA = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
SETTINGS = {"control": False, "lora": LORA, "lr": 0.02, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run = make_run(folder, train=SETTINGS, shards={"train": 2, "valid": 1})
    (outcome,) = train_run(run)
    return folder, run, outcome


def test_final_folder_is_plain_and_holds_the_adapters_product(trained) -> None:
    from peft import PeftModel

    folder, run, outcome = trained
    final = weights(outcome.folder)
    base = load_file(f"{run.target.model}/model.safetensors")
    assert final.keys() == base.keys()
    touched = {n for n in base if not torch.equal(base[n], final[n])}
    assert touched
    assert {name.split(".")[-2] for name in touched} == set(LORA["targets"])
    adapter = folder / "run/adapter"
    assert sorted(p.name for p in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.target.model), adapter
    )
    ids = torch.arange(8)[None]
    ours = AutoModelForCausalLM.from_pretrained(outcome.folder)(ids).logits
    torch.testing.assert_close(again(ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert not list(outcome.folder.glob("adapter*"))


def test_checkpoints_hold_adapters_alone_and_the_loss_falls(trained) -> None:
    folder, _, _ = trained
    step = folder / "run/checkpoints/step-000006"
    assert not (step / "model.safetensors").exists()
    assert (step / "adapter_model.safetensors").exists()
    lines = lines_of(folder, "train")
    assert sum(lines[-1]["valid_bpb"].values()) < sum(lines[0]["valid_bpb"].values())


def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, trained) -> None:
    folder, _, outcome = trained
    made = make_run(tmp_path, train=SETTINGS, shards={"train": 2, "valid": 1})
    original, calls = FusionObjective.forward, []

    class KilledError(BaseException):
        pass

    def killed(self, batch, totals):
        calls.append(1)
        if len(calls) == 4:
            raise KilledError
        return original(self, batch, totals)

    monkeypatch.setattr(FusionObjective, "forward", killed)
    with pytest.raises(KilledError):
        train_run(made)
    train_run(made)
    assert same(weights(tmp_path / "run/final"), weights(outcome.folder))
    for name in ("adapter_model.safetensors", "trainer/optimizer.safetensors"):
        inner = f"run/checkpoints/step-000006/{name}"
        assert (tmp_path / inner).read_bytes() == (folder / inner).read_bytes()
    assert timeless(lines_of(tmp_path, "train")) == timeless(lines_of(folder, "train"))


def test_checkpointing_and_dropout_train_and_all_linear_leaves_the_head(tmp_path) -> None:
    lora = {"r": 2, "dropout": 0.1}
    made = make_run(
        tmp_path,
        shards={"train": 1, "valid": 1},
        train=SETTINGS | {"lora": lora, "gradient_checkpointing": True, "max_steps": 2},
    )
    (outcome,) = train_run(made)
    base, final = load_file(f"{made.target.model}/model.safetensors"), weights(outcome.folder)
    assert torch.equal(base["lm_head.weight"], final["lm_head.weight"])
    assert torch.equal(base["model.embed_tokens.weight"], final["model.embed_tokens.weight"])
    assert not torch.equal(
        base["model.layers.0.mlp.up_proj.weight"], final["model.layers.0.mlp.up_proj.weight"]
    )


def test_adapters_begin_as_nothing_and_depend_on_the_seed(tiny_models) -> None:
    ids = torch.arange(8)[None]
    ref = ModelRef(model=str(tiny_models["code"]))
    plain = load_model(ref, where="target")
    before = plain(ids).logits
    state = torch.random.get_rng_state()
    first = add_adapters(load_model(ref, where="target"), LoraSection(**LORA), seed=1)
    again = add_adapters(load_model(ref, where="target"), LoraSection(**LORA), seed=1)
    other = add_adapters(load_model(ref, where="target"), LoraSection(**LORA), seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first(ids).logits, before)
    a, b, c = (
        {n: p for n, p in m.named_parameters() if p.requires_grad} for m in (first, again, other)
    )
    assert same(a, b)
    assert not same(a, c)
    assert all("lora_" in name for name in a)
    assert torch.equal(merged(first)(ids).logits, before)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_adapters_on_head_or_embedding_are_refused(tiny_models, target) -> None:
    model = load_model(ModelRef(model=str(tiny_models["code"])), where="target")
    with pytest.raises(ConfigError, match="not supported"):
        add_adapters(model, LoraSection(targets=("q_proj", target)), seed=0)


def test_unknown_layers_are_refused(tiny_models) -> None:
    model = load_model(ModelRef(model=str(tiny_models["code"])), where="target")
    with pytest.raises(ConfigError, match="no such layers"):
        add_adapters(model, LoraSection(targets=("wheel",)), seed=0)


def test_damaged_adapters_are_named(trained, tmp_path) -> None:
    from fuse_train.model.adapters import load_adapters

    folder, run, _ = trained
    (tmp_path / "adapter_config.json").write_bytes(
        (folder / "run/adapter/adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    model = load_model(run.target, where="target")
    with pytest.raises(CorruptionError, match="adapters unreadable"):
        load_adapters(model, tmp_path, trainable=True)


def test_what_is_missing_is_told_before_any_work(tmp_path, monkeypatch) -> None:
    made = make_run(tmp_path, train=SETTINGS, shards={"train": 1, "valid": 1})
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ConfigError, match="QLoRA cannot run here") as caught:
            train_run(with_train(made, lora=LORA | {"four_bit": True}))
    assert "CUDA" in caught.value.line()
    assert not (tmp_path / "run/checkpoints").exists()
    monkeypatch.setattr("fuse_train.model.adapters.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install peft"):
        check_lora(LoraSection())
