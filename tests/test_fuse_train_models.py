from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fuse_train.model.identity import identity
from fuse_train.model.models import load_model, own_dtype
from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.model.class_config import transformers_config
from tests.tiny import tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _lfs(place: Path) -> None:
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_text(POINTER)


def _no_pickle(place: Path) -> None:
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(b"<html>")


def _adapter(place: Path) -> None:
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def _config(**changes: object):
    def change(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _lfs,
        _no_pickle,
        _adapter,
        _config(hidden_size="wide"),
        _config(num_attention_heads=0),
        _config(rope_scaling=[1]),
        _config(model_type="not_yet_known", auto_map=None),
        _config(hidden_size=32),
    ],
)
def test_whatever_a_folder_makes_libraries_raise_is_one_error(tmp_path, damage) -> None:
    folder = tiny_model(tmp_path)
    damage(folder)
    with pytest.raises(ModelError) as told:
        load_model(ModelRef(model=str(folder)), where="target")
    assert str(folder) in told.value.line()


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"model_type": 3}', '{"model_type": "llama", "vocab_size": []}']
)
def test_configs_that_cannot_be_read(tmp_path, content) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config"):
        transformers_config(ModelRef(model=str(tmp_path)), of="target")


def test_one_dtype_has_one_identity(tmp_path) -> None:
    folder = str(tiny_model(tmp_path))
    auto = identity(ModelRef(model=folder))
    assert auto["dtype"] == "float32"
    for name in ("fp32", "float", "torch.float32", "FLOAT32"):
        assert identity(ModelRef(model=folder, dtype=name)) == auto
    assert identity(ModelRef(model=folder, dtype="bf16"))["dtype"] == "bfloat16"
    assert own_dtype(ModelRef(model=folder, dtype="half")) == torch.float16
    assert own_dtype(ModelRef(model=folder)) == torch.float32
