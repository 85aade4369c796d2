"""A model's generation_config.json, mended so that transformers saves it.

transformers loads combinations that it refuses to save: sampling flags without do_sample (vicuna 1.5,
early Llama 2), flags of beams without beams. They have no say in training; they must not end it either.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import Any

from store_schema.text.tokenizer import SegmentTokenizer

logger = logging.getLogger(__name__)

_NAMED = re.compile(r"^- `(\w+)`:", re.MULTILINE)


def mend_generation_config(model: Any, *, where: str) -> None:
    """Change what transformers would refuse to save, and say it once.

    Sampling flags without do_sample mean sampling, so do_sample is set, as the refusal itself
    proposes; flags that are refused still are unset; what cannot be mended leaves the ids of special
    tokens alone.

    Args:
        model: Whose `generation_config` is changed in place.
        where: The model, for the message.
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
    _say(where, ", ".join(changes), " ".join(refused.split())[:200])


def name_turn_end(model: Any, tokenizer: SegmentTokenizer) -> None:
    """Make generation stop where a chat's turn ends: at the token of the chat template.

    Args:
        model: Whose `generation_config` is changed in place.
        tokenizer: Of the model.
    """
    config, end = getattr(model, "generation_config", None), tokenizer.contexts.turn_end
    if config is None or end is None:
        return
    named = config.eos_token_id
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if end not in ids:
        config.eos_token_id = [*ids, end]


def _refusal(config: Any) -> str | None:
    """What transformers would say if it were saved now."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


def _named(refused: str) -> list[str]:
    return _NAMED.findall(refused)


@cache
def _say(where: str, changes: str, refused: str) -> None:
    logger.warning(
        "generation_config.json of %s could not be saved as it is (%s): saved with %s",
        where,
        refused,
        changes,
    )
