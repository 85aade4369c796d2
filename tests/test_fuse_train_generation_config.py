from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from fuse_train.model.generation_config import correct_generation_config


def mended(given: dict, where: str, caplog: pytest.LogCaptureFixture) -> tuple[dict, str]:
    config = GenerationConfig()
    for name, value in given.items():
        setattr(config, name, value)  # as a file is read: without the checks of a caller
    model = SimpleNamespace(generation_config=config)
    with caplog.at_level(logging.WARNING, "fuse_train.model.generation_config"):
        correct_generation_config(model, where=where)
        correct_generation_config(model, where=where)
    model.generation_config.validate(strict=True)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) <= 1
    return model.generation_config.to_diff_dict(), (said or [""])[0]


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        ({"temperature": 0.7, "do_sample": True}, {"temperature": 0.7, "do_sample": True}, ""),
        ({"max_new_tokens": 5}, {"max_new_tokens": 5}, ""),
        (
            {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2},
            {"temperature": 0.9, "top_p": 0.6, "do_sample": True, "eos_token_id": 2},
            "saved with do_sample: true",
        ),
        ({"length_penalty": 2.0, "eos_token_id": 2}, {"eos_token_id": 2}, "no length_penalty"),
        (
            {"top_k": 3, "length_penalty": 2.0},
            {"top_k": 3, "do_sample": True},
            "do_sample: true, no length_penalty",
        ),
        ({"output_scores": True, "top_k": 3, "do_sample": True}, {"top_k": 3}, "no output_scores"),
        ({"num_return_sequences": 4}, {"do_sample": True, "num_return_sequences": 4}, "do_sample"),
        (
            {"cache_implementation": "nothing known", "eos_token_id": 2},
            {"eos_token_id": 2},
            "token ids alone",
        ),
    ],
)
def test_mended_as_little_as_it_takes(given, kept, said, caplog) -> None:
    found, told = mended(given, f"m {sorted(given)}", caplog)
    assert kept.items() <= found.items()
    assert not {"output_scores", "length_penalty", "cache_implementation"} & (
        found.keys() - kept.keys()
    )
    assert said in told
    assert bool(said) == bool(told)


def test_models_without_one_are_left_alone() -> None:
    model = SimpleNamespace()
    correct_generation_config(model, where="m")
    assert model == SimpleNamespace()
