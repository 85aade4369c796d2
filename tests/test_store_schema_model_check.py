"""What config.json and the heads of the weight files show before a weight is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.model.causal_model import load_causal_model
from store_schema.model.model_check import Loader, require_language_model, require_packages
from store_schema.model.weight_shapes import StoredTensor, stored_tensors
from tests.tiny import tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"llama": tiny_model(root / "a"), "gpt_neox": tiny_model(root / "b", "gpt_neox")}


@pytest.fixture
def folder(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["llama"], tmp_path / "m"))


def config(**changes: Any) -> Change:
    """None takes a key away."""

    def change(place: Path) -> None:
        content = json.loads((place / "config.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (place / "config.json").write_text(json.dumps(content))

    return change


def head(*added: str) -> Change:
    """The output head taken away, and others put in its place."""

    def change(place: Path) -> None:
        weights = load_file(place / "model.safetensors")
        del weights["lm_head.weight"]
        weights |= {name: torch.zeros(1, 64) for name in added}
        save_file(weights, place / "model.safetensors", {"format": "pt"})

    return change


def shards(place: Path) -> None:
    weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(names.values()):
        part = {name: weights[name] for name in weights if names[name] == file}
        save_file(part, place / file, {"format": "pt"})
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )


def both(*changes: Change) -> Change:
    def change(place: Path) -> None:
        for one in changes:
            one(place)

    return change


def check(folder: Path, loader: Loader = "auto", *, trust: bool = False) -> None:
    ref = ModelRef(model=str(folder), trust_remote_code=trust)
    require_language_model(ref, folder, name="m", loader=loader)


UNKNOWN = {"model_type": "llama9", "architectures": ["Llama9ForCausalLM"]}
CODE = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            config(vocab_size="400"),
            "cannot read the config of m.*vocab_size.*expected int, got str",
        ),
        (config(num_attention_heads="2"), "num_attention_heads.*expected int, got str"),
        (config(num_attention_heads=0), "cannot read the config of m"),
        (config(model_type=None), "cannot read the config of m.*model_type"),
        (config(**UNKNOWN), "does not know the model of m.*got model_type llama9"),
        (config(**UNKNOWN, auto_map=CODE), "code of its own.*trust_remote_code: true"),
        (
            config(vocab_size=500),
            r"do not fit.*lm_head.weight of \[500, 64\].*got \[400, 64\]",
        ),
        (config(vocab_size=None), r"lm_head.weight of \[32000, 64\].*got \[400, 64\]"),
        (config(hidden_size=66), r"lm_head.weight of \[400, 66\].*got \[400, 64\]"),
        (both(shards, config(hidden_size=66)), r"lm_head.weight of \[400, 66\].*got \[400, 64\]"),
        (config(architectures=["LlamaForSequenceClassification"]), "no causal language model"),
        (both(head("score.weight"), config(architectures=None)), r"reward model.*score\.weight"),
        (
            both(head("score.weight"), config(architectures=None, tie_word_embeddings=True)),
            r"no language model.*got score\.weight of \[1, 64\]",
        ),
        (head(), r"lacks 1 weights.*lm_head\.weight"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(folder: Path, change: Change, said: str) -> None:
    change(folder)
    with pytest.raises(ModelError, match=said) as told:
        check(folder)
    assert str(folder) in told.value.line()


@pytest.mark.parametrize(
    "change",
    [
        config(),
        shards,
        config(architectures=None),
        both(head(), config(tie_word_embeddings=True)),
        both(head("v_head.weight"), config(tie_word_embeddings=True)),
        lambda place: (place / "model.safetensors").unlink(),
        both(shards, lambda place: (place / "model-00002-of-00002.safetensors").unlink()),
        lambda place: (place / "model.safetensors").write_text(POINTER),
        lambda place: (place / "model.safetensors.index.json").write_text("[]"),
    ],
)
def test_language_models_pass_with_or_without_weights(folder: Path, change: Change) -> None:
    change(folder)
    check(folder)


def test_other_architectures_pass(made: dict[str, Path]) -> None:
    check(made["gpt_neox"])


def test_a_type_that_vllm_alone_may_know_is_left_to_it(folder: Path) -> None:
    config(**UNKNOWN)(folder)
    check(folder, "vllm")
    with pytest.raises(ModelError, match=r"extract\.engine: vllm"):
        check(folder, "auto")


def test_a_text_model_beside_others_passes(tmp_path: Path) -> None:
    """Gemma 3 as published: the config names no vocab_size, and towers have embeddings of their own."""
    rows, columns = 262_208, 8
    text = {"model_type": "gemma3_text", "hidden_size": columns, "num_hidden_layers": 1}
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    weights = {
        "language_model.model.embed_tokens.weight": torch.zeros(
            rows, columns, dtype=torch.bfloat16
        ),
        "vision_tower.vision_model.embeddings.position_embedding.weight": torch.zeros(3, 4),
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path)


def test_rows_beyond_the_config_that_a_class_has_by_design_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Llama 3.2 Vision, whose embedding has 8 rows more than vocab_size."""
    config(vocab_size=392)(folder)
    with pytest.raises(ModelError, match="do not fit"):
        check(folder)
    monkeypatch.setattr("store_schema.model.weight_shapes.load_causal_model", lambda *_, **__: None)
    check(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_package_that_quantised_weights_need_is_named(folder: Path, method: str) -> None:
    require_packages(folder, name="m")
    config(quantization_config={"quant_method": method, "bits": 4})(folder)
    check(folder)
    with pytest.raises(ModelError, match=r"lacks a package.*m in .*(optimum|gptqmodel)"):
        require_packages(folder, name="m")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lm_head.weight", "lm_head"),
        ("language_model.lm_head.weight", "lm_head"),
        ("model.language_model.embed_tokens.weight", "embed_tokens"),
        ("embed_tokens.weight", "embed_tokens"),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", "vision_tower"),
        ("model.layers.0.mlp.score.weight", "layers"),
        ("weight", ""),
    ],
)
def test_the_module_that_a_tensor_is_of(name: str, module: str) -> None:
    assert StoredTensor(name, "F32", (2, 3)).module == module


def test_shapes_are_those_of_the_weights(made: dict[str, Path]) -> None:
    weights = load_file(made["llama"] / "model.safetensors")
    found = {tensor.name: tensor.shape for tensor in stored_tensors(made["llama"])}
    assert found == {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (config(intermediate_size=130), r"do not fit.*mlp\.\w+\.weight of \[.*130.*and 5 more"),
        (head(), r"model of target lacks 1 weights.*lm_head\.weight"),
    ],
)
def test_loading_ends_in_one_line_without_a_table(
    folder: Path, change: Change, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder)
    with pytest.raises(ModelError, match=said):
        load_causal_model(ModelRef(model=str(folder)), of="target")
    assert "LOAD REPORT" not in caplog.text


def test_weights_that_nothing_asked_for_are_still_told_of(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"spare.weight": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        load_causal_model(ModelRef(model=str(folder)), of="target")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert ["spare.weight" in record.getMessage() for record in told] == [True]
