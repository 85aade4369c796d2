"""Corrections of a model's generation_config.json, so that transformers saves it.

transformers loads combinations that it refuses to save: sampling flags without do_sample (vicuna 1.5,
early Llama 2), flags of beams without beams. Training does not use them and must not fail on them.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import Any

from store_schema.text.tokenizer import SegmentTokenizer

logger = logging.getLogger(__name__)

_NAMED = re.compile(r"^- `(\w+)`:", re.MULTILINE)


def correct_generation_config(model: Any, *, where: str) -> None:
    """Change what transformers would refuse to save, and warn once.

    Sampling flags without do_sample mean sampling, so do_sample is set, as transformers' message
    proposes; flags that are still refused are unset; if that is not enough, only the ids of special
    tokens are kept.

    Args:
        model: Model whose `generation_config` is changed in place.
        where: Name of the model, for the warning.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    refused = _refusal(config)
    if refused is None:
        return
    sampled = config.do_sample is True
    config.do_sample = True
    still = _refusal(config)
    changes = [] if sampled else ["do_sample: true"]
    if not sampled and still is not None and _named(still) == _named(refused):
        config.do_sample, changes = None, []  # it was not about sampling
    for name in _named(still or ""):
        setattr(config, name, None)
        changes.append(f"no {name}")
    if _refusal(config) is not None:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = type(config)(**{name: getattr(config, name) for name in ids})
        changes = ["token ids alone are kept"]
    _warn_once(where, ", ".join(changes), " ".join(refused.split())[:200])


def name_turn_end(model: Any, tokenizer: SegmentTokenizer) -> None:
    """Make generation stop where a chat's turn ends: at the token of the chat template.

    Args:
        model: Model whose `generation_config` is changed in place.
        tokenizer: The model's.
    """
    config, end = getattr(model, "generation_config", None), tokenizer.contexts.turn_end
    if config is None or end is None:
        return
    named = config.eos_token_id
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if end not in ids:
        config.eos_token_id = [*ids, end]


def _refusal(config: Any) -> str | None:
    """Message with which transformers would refuse to save it; None if it would not."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


def _named(refused: str) -> list[str]:
    return _NAMED.findall(refused)


@cache
def _warn_once(where: str, changes: str, refused: str) -> None:
    logger.warning(
        "generation_config.json of %s could not be saved as it is (%s): saved with %s",
        where,
        refused,
        changes,
    )
