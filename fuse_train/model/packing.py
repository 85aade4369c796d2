"""Test whether a model keeps the segments of a packed row apart.

transformers recognises the start of a segment by position ids that restart at 0. Not every architecture
and attention kernel does (recurrent ones cannot), so a model is tested, and refused if its segments
attend to each other.

Shape suffixes: N tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from fuse_train.model.heads import hidden_states
from store_schema.errors import ConfigError

PACKING_TOLERANCE = 1e-3
"""Largest difference between packed and single hidden states of a token, relative to their norm,"""
NARROW_TOLERANCE = 0.1
"""and where they are in 16 bits, as with `parallel: fsdp2` and `precision: bfloat16`. There rounding
makes a hundredth, and segments that attend to each other more than 1."""

_LENGTHS = (5, 3, 1, 6)


@torch.no_grad()
def check_packing(model: Any, *, where: str) -> None:
    """Compare hidden states of segments in shared rows with those of each alone.

    Two rows, because some kernels support packed text only in a batch of one.

    Raises:
        ConfigError: They differ.
    """
    was_training = model.training
    model.eval()
    try:
        vocab = int(model.config.get_text_config().vocab_size)
        tokens = torch.arange(2 * sum(_LENGTHS), device=model.device) * 7 % vocab
        rows = tokens.view(2, -1)
        positions = torch.cat([torch.arange(n, device=model.device) for n in _LENGTHS])
        packed = hidden_states(model, rows, positions.expand(2, -1))
        alone = torch.stack(
            [
                torch.cat([hidden_states(model, part[None])[0] for part in row.split(_LENGTHS)])
                for row in rows
            ]
        )
    except (TypeError, RuntimeError, AttributeError) as error:
        raise _refusal(where, f"{type(error).__name__}: {error}") from error
    finally:
        model.train(was_training)
    tolerance = NARROW_TOLERANCE if alone.dtype.itemsize == 2 else PACKING_TOLERANCE
    norm = alone.float().norm(dim=-1).clamp(min=1e-6)
    worst = float(((packed - alone).float().norm(dim=-1) / norm).max())
    if not worst <= tolerance:
        raise _refusal(where, f"hidden states that differ by {worst:.2g} of their norm")


def _refusal(where: str, got: str) -> ConfigError:
    return ConfigError(
        "model does not keep packed segments apart",
        where=where,
        got=got,
        hint="leave train.pack_tokens out",
    )
