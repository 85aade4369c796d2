"""Model folders and hub names, and what a config says before anything is loaded."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.model.class_config import model_rows
from store_schema.model.models import (
    max_positions,
    model_config,
    resolve_model,
    resolve_tokenizer,
    resolved_dtype,
)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(ModelRef(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(ModelRef(model=str(tmp_path))) == tmp_path


@pytest.mark.parametrize("name", ["./gone", "/gone", "runs/demo/models/gone"])
def test_a_path_that_is_not_there_never_asks_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="model folder not found"):
        resolve_model(ModelRef(model=name))


@pytest.mark.parametrize(
    ("name", "gguf", "hint"),
    [
        ("model.safetensors", None, r"config\.json and weights: {folder}"),
        ("m.gguf", "m.gguf", r"remove gguf_file \(m\.gguf\), or give the folder .*: {folder}"),
        ("model.safetensors", "m.gguf", r"the folder with m\.gguf, such as {folder}"),
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_file_in_place_of_a_folder_is_told_what_to_give(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    gguf: str | None,
    hint: str,
    relative: bool,
) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    folder = "." if relative else str(tmp_path)
    ref = ModelRef(model=name if relative else str(tmp_path / name), gguf_file=gguf)
    for resolve in (resolve_model, partial(resolve_tokenizer, name="m"), model_rows):
        with pytest.raises(ModelError, match="is a file, not a model folder") as caught:
            resolve(ref)
        assert re.search(hint.format(folder=re.escape(folder)) + "$", caught.value.line())


def test_a_hub_name_is_taken_from_the_cache_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot(name: str, *, revision: str, local_files_only: bool, **_: object) -> str:
        asked.append((name, revision, local_files_only))
        if local_files_only and len(asked) == 1:
            raise LocalEntryNotFoundError("not in the cache")
        if not local_files_only:
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    ref = ModelRef(model="some/model", revision="abc")
    assert resolve_model(ref) == tmp_path
    assert asked == [("some/model", "abc", True), ("some/model", "abc", False)]
    assert resolve_model(ref) == tmp_path
    assert asked[2:] == [("some/model", "abc", True)]
    # A snapshot that was fetched for its tokenizer alone has no weights yet.
    (tmp_path / "model.safetensors").unlink()
    assert resolve_model(ref) == tmp_path
    assert asked[3:] == [("some/model", "abc", True), ("some/model", "abc", False)]


def test_a_hub_name_that_cannot_be_had_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelError, match="neither a folder nor available from the hub"):
        resolve_model(ModelRef(model="some/model"))


def test_config_of_a_model_with_several_parts(tmp_path: Path) -> None:
    parts = {"model_type": "x", "text_config": {"vocab_size": 7, "max_position_embeddings": 9}}
    (tmp_path / "config.json").write_text(json.dumps(parts))
    config = model_config(tmp_path)
    assert config["vocab_size"] == 7
    assert max_positions(config) == 9
    assert max_positions({"n_positions": 5}) == 5
    assert max_positions({"max_position_embeddings": None}) is None


def test_a_config_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid a\n")
    with pytest.raises(ModelError, match=r"pointer of git-lfs.*config\.json.*git lfs pull"):
        model_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="config"):
        model_config(tmp_path)


def test_dtype_is_never_left_to_an_engine() -> None:
    auto, given = ModelRef(model="m"), ModelRef(model="m", dtype="bfloat16")
    assert resolved_dtype(auto, {"dtype": "bfloat16"}) == "bfloat16"
    assert resolved_dtype(auto, {"torch_dtype": "torch.float16"}) == "float16"
    assert resolved_dtype(auto, {}) == "float32"
    assert resolved_dtype(given, {"dtype": "float32"}) == "bfloat16"


GEMMA_3_DEFAULT = 262_208


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ({"model_type": "llama", "vocab_size": 7}, 7),
        # The text part speaks for itself, whatever stands beside it.
        ({"model_type": "gemma3", "vocab_size": 9, "text_config": {"vocab_size": 7}}, 7),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 16}}, GEMMA_3_DEFAULT),
        ({"model_type": "gemma3", "vocab_size": 9, "text_config": {}}, GEMMA_3_DEFAULT),
        # transformers' own names for it.
        ({"model_type": "xlnet", "n_token": 11}, 11),
    ],
)
def test_rows_of_a_model(tmp_path: Path, config: dict[str, object], rows: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_rows(ModelRef(model=str(tmp_path))) == rows


def test_rows_that_nothing_tells(tmp_path: Path) -> None:
    ref = ModelRef(model=str(tmp_path))
    assert model_rows(ref) is None
    for config in ({}, {"model_type": "of nobody"}, {"model_type": "vit"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="has no vocab_size") as caught:
            model_rows(ref)
        assert "write vocab_size into it" in caught.value.line()


def test_rows_of_a_hub_model_need_its_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils

    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    asked = []

    def cached(name: str, file: str, *, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(transformers.utils, "cached_file", cached)
    assert model_rows(ModelRef(model="some/model", revision="abc")) == 5
    assert asked == [("some/model", "config.json", "abc")]
    monkeypatch.undo()
    with pytest.raises(ModelError, match="neither a folder nor available from the hub"):
        model_rows(ModelRef(model="some/model"))


def test_one_gguf_file_of_a_hub_repository_is_fetched_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from store_schema.model import models

    asked: list[dict[str, object]] = []

    def snapshot(_: str, **options: object) -> str:
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(models, "unpack", lambda file, dtype, tokenizer_folder: file)
    ref = ModelRef(model="some/model-GGUF", revision="abc", gguf_file="q4.gguf")
    assert resolve_model(ref) == tmp_path / "q4.gguf"
    patterns = asked[0]["allow_patterns"]
    assert isinstance(patterns, list)
    assert patterns[0] == "q4.gguf"
    assert asked[0]["revision"] == "abc"
    with pytest.raises(ModelError, match="model folder not found"):
        resolve_model(ModelRef(model="./gone", gguf_file="q4.gguf"))


def test_the_soft_cap_of_attention_is_kept(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    from fuse_train.model.models import load_model

    config = Gemma2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=1,
        attn_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        loaded, eager, fused = (
            model(input_ids=ids).logits
            for model in (
                load_model(ModelRef(model=str(tmp_path)), where="target"),
                AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"),
                AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa"),
            )
        )
    assert torch.equal(loaded, eager)
    assert (fused - eager).abs().max() > 0.01  # where this fails, the cap needs no care any more
