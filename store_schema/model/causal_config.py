"""Refuse models that are not causal language models by their own config: those that attend to later
tokens, or were trained for another task. They give no distribution of a token given those before it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from store_schema.errors import ModelError

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_FOR_A_TASK = re.compile("For[A-Z]|Reward|EncoderModel$")
"""Class names of other tasks than language modelling; a plain `...Model` may be anything."""


def require_causal_config(config: Mapping[str, Any], *, name: str, folder: Path) -> None:
    """Refuse encoders, encoder-decoders, models with bidirectional attention, and models whose class
    name is of another task (classifier, reward model).

    A config that does not tell passes: engines test the model's outputs too.

    Args:
        config: config.json, with the values of its text part on top.
        name: The model's name in the run.
        folder: The model's folder.

    Raises:
        ModelError: It is no causal language model; names the config key.
    """
    reason = _non_causal_key(config)
    if reason is not None:
        raise ModelError(
            f"{name} is no causal language model",
            where=folder / "config.json",
            expected="a model that generates text from left to right",
            got=reason,
            hint="give the causal model of that family",
        )


def _non_causal_key(config: Mapping[str, Any]) -> str | None:
    """The config key, with its value, of a model that is not causal; None if there is none."""
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
