"""What only the last save needs is tried before the first step."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fuse_train.config import LoraSection
from fuse_train.publish import dry_save as module
from fuse_train.publish.done import read_done
from fuse_train.publish.dry_save import dry_save
from fuse_train.run import train_run
from store_schema.config import ModelRef
from store_schema.errors import MismatchError, ModelError, StorageError
from store_schema.text.tokenizer import SegmentTokenizer
from tests.aligned_factory import make_run
from tests.test_fuse_train_refusals import completed, refused
from tests.test_fuse_train_run import lines_of, weights, with_train

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TIED = LlamaConfig(**SHAPE, tie_word_embeddings=True)
GEMMA = Gemma3TextConfig(**SHAPE, num_key_value_heads=1, head_dim=8)
MODELS = {
    "tied llama": lambda: LlamaForCausalLM(TIED),
    "gemma 3": lambda: Gemma3ForCausalLM(GEMMA),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
    "experts": lambda: MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=3)
    ),
}
QUICK = {"control": False, "max_steps": 2, "eval_every": None, "trackers": []}
REF = ModelRef(model="made")


def tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (p.get_dtype(), p.get_shape()) for name, p in parts.items()}


@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_tried_is_what_will_be_written(tmp_path, name) -> None:
    model = MODELS[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tried = {}

    def write(place: Path, save_weights) -> None:
        save_weights(place)
        tried.update(tensors(place))

    dry_save(tmp_path, model, REF, torch.bfloat16, None, write)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    real = tensors(tmp_path)
    # Experts are numbered too, within their layer.
    assert tried == {k: v for k, v in real.items() if re.search(r"\d+|$", k)[0] in ("", "0")}
    assert any(".0." in k for k in tried)


def test_adapters_are_merged_and_left_as_they_are(tmp_path) -> None:
    from fuse_train.model.adapters import add_adapters

    model, lora = LlamaForCausalLM(TIED), LoraSection(r=2, targets=("q_proj",))
    peft = add_adapters(model, lora, 0)
    names = set(peft.state_dict())
    tried = {}
    dry_save(
        tmp_path,
        model,
        REF,
        torch.float16,
        lora,
        lambda place, save: (save(place), tried.update(tensors(place))),
    )
    assert set(peft.state_dict()) == names
    assert not [name for name in tried if "lora" in name or "base_layer" in name]
    assert tried["model.layers.0.self_attn.q_proj.weight"] == ("F16", [16, 16])


def test_large_tensors_are_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LARGEST_BYTES", 2 * 40 * 16 - 1)
    tried = {}
    dry_save(
        tmp_path,
        LlamaForCausalLM(TIED),
        REF,
        torch.bfloat16,
        None,
        lambda place, save: (save(place), tried.update(tensors(place))),
    )
    assert "model.embed_tokens.weight" not in tried
    assert "model.norm.weight" in tried


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (TypeError("Object of type set is not JSON serializable"), ModelError),
        (AttributeError("'NoneType' object has no attribute 'save'"), ModelError),
        (PermissionError(13, "Permission denied"), StorageError),
    ],
)
def test_whatever_is_raised_ends_in_one_line(tmp_path, raised, told) -> None:
    def write(place: Path, save_weights) -> None:
        raise raised

    with pytest.raises(told):
        dry_save(tmp_path, LlamaForCausalLM(TIED), REF, torch.bfloat16, None, write)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_the_first_step(
    tmp_path, monkeypatch
) -> None:
    made = make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})

    def fail(self: object, *_: object, **__: object) -> None:
        raise NotImplementedError("no way to save this")

    monkeypatch.setattr(SegmentTokenizer, "save_pretrained", fail)
    line = refused(tmp_path)
    assert "could not be saved, so training was not begun" in line
    assert made.target.model in line
    assert "no way to save this" in line
    assert not list((tmp_path / "run/logs").glob("*steps*"))
    assert [p.name for p in (tmp_path / "run").glob(".*.tmp")] == []


@pytest.mark.parametrize("lora", [None, {"r": 2, "targets": ["q_proj"]}])
def test_generation_config_that_transformers_refuses_is_mended(tmp_path, caplog, lora) -> None:
    run = make_run(tmp_path, train=QUICK | {"lora": lora}, shards={"train": 1, "valid": 1})
    given = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    (tmp_path / "target/generation_config.json").write_text(json.dumps(given))
    (outcome,) = train_run(run)
    saved = json.loads((outcome.folder / "generation_config.json").read_text())
    assert given.items() <= saved.items()
    assert saved["do_sample"] is True
    told = [r.getMessage() for r in caplog.records if "could not be saved as it is" in r.message]
    assert len(told) == 1
    assert "saved with do_sample: true" in told[0]


def test_short_names_of_dtypes_and_another_dtype_keep_the_training(tmp_path) -> None:
    run = make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    completed(tmp_path, "--set", "target.dtype=bf16")
    final = tmp_path / "run/final"
    assert {t.dtype for t in weights(final).values()} == {torch.bfloat16}
    before = (final / "done.json").read_bytes()
    completed(tmp_path, "--set", "target.dtype=torch.bfloat16")
    assert (final / "done.json").read_bytes() == before
    # Another dtype: the folder is not overwritten, and made from the checkpoints once it is gone.
    assert "another config" in refused(tmp_path, "--set", "target.dtype=half")
    final.rename(tmp_path / "old")
    completed(tmp_path, "--set", "target.dtype=half")
    assert {t.dtype for t in weights(final).values()} == {torch.float16}
    steps = [line["step"] for line in lines_of(tmp_path, "train") if "loss" in line]
    assert steps == [1, 2]
    assert read_done(final) is not None
    with pytest.raises(MismatchError):
        train_run(with_train(run, max_steps=3))


def test_a_wrong_dtype_is_refused_when_the_run_file_is_read(tmp_path) -> None:
    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    line = refused(tmp_path, "--set", "target.dtype=int8")
    assert "target.dtype: must be one of auto, bfloat16" in line
