"""Models that see later text are refused: by their config before the plan, by what they do after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.engines.registry import open_engine
from extract.run import run_source
from extract.scoring.causality import require_causal
from launch.work import Part
from store_schema.config import ModelRef, load_run
from store_schema.errors import ModelError
from store_schema.model.causal_config import require_causal_config
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.command import ok, refused
from tests.engine_contract import encoded_samples, spec_of
from tests.extract_runs import plan_run, write_run
from tests.tiny import tiny_model, tiny_tokenizer


def samples(folder: Path) -> list[EncodedSegment]:
    return encoded_samples(SegmentTokenizer.load(ModelRef(model=str(folder)), name="m"))


@pytest.fixture(scope="module")
def bidirectional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 as embedding models are made of it."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            initializer_range=0.3,
            use_bidirectional_attention=True,
        )
    )
    folder = tmp_path_factory.mktemp("bidirectional")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_what_a_model_does_shows(bidirectional: Path, tiny_models: dict[str, Path]) -> None:
    for folder, causal in ((bidirectional, False), *((p, True) for p in tiny_models.values())):
        spec = spec_of(folder, "transformers")
        engine = open_engine(spec)
        segments = samples(folder)
        if causal:
            require_causal(engine, spec, segments)
        else:
            with pytest.raises(ModelError, match="later text changes earlier predictions"):
                require_causal(engine, spec, segments)
            short = [EncodedSegment((), s.token_ids[:3], s.byte_ends[:3]) for s in segments]
            require_causal(engine, spec, short)  # too short to tell
            require_causal(engine, spec, [])
        engine.close()


def test_bfloat16_rounding_is_no_sign(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    spec = spec_of(folder, "transformers", dtype="bfloat16")
    require_causal(open_engine(spec), spec, samples(folder))


def test_nan_is_told_elsewhere(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    spec = spec_of(folder, "transformers")
    require_causal(open_engine(spec), spec, samples(folder))


def test_refused_before_the_plan_and_before_anything_is_scored(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    bidirectional: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {"both_ways": bidirectional, "target": tiny_models["target"]}
    path = write_run(tmp_path, models)
    ok("corpus", "build", path)
    line = refused("extract", "plan", path)
    assert "both_ways is no causal language model" in line
    assert "use_bidirectional_attention: true" in line
    assert not (tmp_path / "run/plan").exists()
    assert "both_ways is no causal" in refused("extract", "run", path)
    saying_nothing = "store_schema.model.model_check.require_causal_config"
    monkeypatch.setattr(saying_nothing, lambda *_, **__: None)
    ok("extract", "plan", path)
    with pytest.raises(ModelError, match="both_ways is not a causal language model"):
        run_source(load_run(path), "both_ways", Part())
    assert not list((tmp_path / "run/stores/both_ways").glob("commits/*"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"is_encoder_decoder": True}, "is_encoder_decoder: true"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention: all"),
        ({"is_causal": False}, "is_causal: false"),
        ({"architectures": ["ModernBertForMaskedLM"]}, "architectures: ModernBertForMaskedLM"),
        ({"use_bidirectional_attention": "vision"}, None),
        ({"use_bidirectional_attention": False, "is_causal": True}, None),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "architectures: Qwen2ForRewardModel"),
        ({"architectures": ["LlamaForTokenClassification", "LlamaForCausalLM"]}, None),
        ({"architectures": ["ChatGLMModel"]}, None),
        ({"architectures": ["FooForMany"], "auto_map": {"AutoModelForCausalLM": "foo.Foo"}}, None),
        ({"architectures": ["LlamaForCausalLM"]}, None),
        ({"architectures": ["GPT2LMHeadModel"]}, None),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, None),
        ({"architectures": None}, None),
        ({}, None),
    ],
)
def test_what_configs_say(tmp_path: Path, config: dict[str, Any], said: str | None) -> None:
    if said is None:
        require_causal_config(config, name="m", folder=tmp_path)
        return
    with pytest.raises(ModelError, match=said):
        require_causal_config(config, name="m", folder=tmp_path)


def test_damaged_and_foreign_folders_are_one_line_each(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    model = tiny_model(tmp_path / "m", tokenizer=tiny_tokenizer(vocab_size=300))
    models = {"m": model, "target": tiny_models["target"]}
    path = plan_run(write_run(tmp_path, models))
    weights = (model / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (model / "model.safetensors").write_bytes(pointer)
    assert "pointer of git-lfs" in refused("extract", "run", path)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pointer)
    assert "pointer of git-lfs" in refused("extract", "run", path)
    (model / "pytorch_model.bin").write_bytes(b"\x80 no pickle")  # found by the loader alone
    with pytest.raises(ModelError, match=r"cannot be loaded.*got \w+: "):
        open_engine(spec_of(model, "transformers"))
    (model / "pytorch_model.bin").unlink()
    (model / "model.safetensors").write_bytes(weights)
    (model / "config.json").rename(model / "adapter_config.json")
    (tmp_path / "run/plan/plan.json").unlink()
    for command in ("plan", "run"):  # also where there is no plan
        line = refused("extract", command, path)
        assert "folder has an adapter, not a model" in line
        assert "merge it into its base model" in line
    assert json.loads((model / "adapter_config.json").read_text())["model_type"] == "llama"
