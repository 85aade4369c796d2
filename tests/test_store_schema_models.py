"""Model folders and hub names, and what a config says before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.models import max_positions, model_config, resolve_model, resolved_dtype


def test_a_folder_is_itself(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(ModelRef(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(ModelRef(model=str(tmp_path))) == tmp_path


@pytest.mark.parametrize("name", ["./gone", "/gone", "runs/demo/models/gone"])
def test_a_path_that_is_not_there_never_asks_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="model folder not found"):
        resolve_model(ModelRef(model=name))


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
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    ref = ModelRef(model="some/model", revision="abc")
    assert resolve_model(ref) == tmp_path
    assert asked == [("some/model", "abc", True), ("some/model", "abc", False)]
    assert resolve_model(ref) == tmp_path
    assert asked[2:] == [("some/model", "abc", True)]


def test_a_hub_name_that_cannot_be_had_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelError, match="neither a folder nor to be had from the hub"):
        resolve_model(ModelRef(model="some/model"))


def test_config_of_a_model_with_several_parts(tmp_path: Path) -> None:
    parts = {"model_type": "x", "text_config": {"vocab_size": 7, "max_position_embeddings": 9}}
    (tmp_path / "config.json").write_text(json.dumps(parts))
    config = model_config(tmp_path)
    assert config["vocab_size"] == 7
    assert max_positions(config) == 9
    assert max_positions({"n_positions": 5}) == 5
    assert max_positions({"max_position_embeddings": None}) is None


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


def test_one_gguf_file_of_a_hub_repository_is_fetched_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from store_schema import models

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
