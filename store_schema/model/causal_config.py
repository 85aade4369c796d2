"""Models whose own config says that they are no causal language models: they read what comes later, or
were made for another task. No distribution of theirs is one of a token given those before it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from store_schema.errors import ModelError

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_FOR_A_TASK = re.compile("For[A-Z]|Reward|EncoderModel$")
"""Classes are named for what they were trained to do; a plain `...Model` may be anything."""


def require_causal_config(config: Mapping[str, Any], *, name: str, folder: Path) -> None:
    """Refuse encoders, encoder-decoders, models with bidirectional attention, and those whose class
    is named for another task: classifiers, reward models.

    A config that says nothing of it passes: engines look at what the model does.

    Args:
        config: config.json, the text part put over it.
        name: Of the model in the run.
        folder: Of the model.

    Raises:
        ModelError: Names the key that says so.
    """
    said = _why(config)
    if said is not None:
        raise ModelError(
            f"{name} is no causal language model",
            where=folder / "config.json",
            expected="a model that generates text from left to right",
            got=said,
            hint="give the causal model of that family",
        )


def _why(config: Mapping[str, Any]) -> str | None:
    if config.get("is_encoder_decoder") is True:
        return "is_encoder_decoder: true"
    if config.get("use_bidirectional_attention") in (True, "all"):
        return f"use_bidirectional_attention: {config['use_bidirectional_attention']}".lower()
    if config.get("is_causal") is False:
        return "is_causal: false"
    named = config.get("architectures")
    architectures = [str(a) for a in named] if isinstance(named, list) else []
    if any(mark in a for a in architectures for mark in _GENERATES):
        return None
    own_code = config.get("auto_map")
    if isinstance(own_code, dict) and "AutoModelForCausalLM" in own_code:
        return None
    if any(_FOR_A_TASK.search(a) for a in architectures):
        return f"architectures: {', '.join(architectures)}"
    return None
