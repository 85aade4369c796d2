"""States of a transformers model after an entry that is not the text's own token.

The keys and values of a segment's text are computed once. Its branches are then one more input of
single tokens: each has the place of the token that it stands for, and sees the text before that place
and itself. This takes an attention mask that not every architecture follows, so it is tried on the
first text. Where it does not give the model's own states, and where a layer sees only so many tokens
back, each branch is a text of its own, which takes far longer.

Shapes: B branches, T tokens of the text before the last branch, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from extract.engines.protocol import Branches, EngineMemoryError
from store_schema.model.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

PROBE_TOKENS = 16
"""Tokens of the first text on which the mask is tried."""

Forward = Callable[..., tuple[torch.Tensor, Any]]
"""Inputs of a transformers model to states [1, T, H] (or logits) and key-value cache."""


@dataclass(frozen=True, slots=True)
class BranchInput:
    """The branches of one segment.

    Args:
        ids_T: int64, tokens of the text, with its context.
        places_B: Index in it of the token that each branch stands for; at least 1.
        tokens_B: int64, the entries.
    """

    ids_T: npt.NDArray[np.int64]
    places_B: npt.NDArray[np.int64]
    tokens_B: npt.NDArray[np.int64]

    @classmethod
    def of(cls, branches: Branches) -> Self:
        """The input for a segment's branches."""
        segment = branches.segment
        places_B = branches.positions + len(segment.context_ids)
        return cls(np.array(segment.input_ids, np.int64), places_B, branches.token_ids)


class BranchStates:
    """Computes the states of branches with one loaded model."""

    def __init__(self, forward: Forward, model: Any, source: str) -> None:
        """Args:
        forward: Of the model.
        model: Has the config, device and dtype.
        source: Its name, for messages.
        """
        self._forward, self._source = forward, source
        self._device, self._dtype = model.device, model.dtype
        self._reach = attention_reach(model.config.get_text_config())
        self._together: bool | None = None

    def of(self, branches: Branches, most_tokens: int) -> torch.Tensor:
        """[B, H] states after each branch.

        Args:
            branches: Of one segment; at least one.
            most_tokens: Tokens of an input beside the text, at most.
        """
        given = BranchInput.of(branches)
        if self._together is None:
            self._together = self._agrees(given)
            if not self._together:
                logger.warning(
                    "%s: this model does not take branches together; each is a text of its own, "
                    "which is slow", self._source,
                )  # fmt: skip
        longest = int(given.places_B.max()) + 1
        if self._together and (self._reach is None or longest <= self._reach):
            return self._with_cache(given, most_tokens)
        return self._one_by_one(given, most_tokens)

    def _agrees(self, branches: BranchInput) -> bool:
        """Whether the mask gives what separate texts give, on the beginning of a text."""
        ids_T = branches.ids_T[:PROBE_TOKENS]
        token = branches.tokens_B[0]
        last = len(ids_T)
        places = np.array(sorted({max(last // 2, 1), max(last - 1, 1), last}), np.int64)
        probe = BranchInput(ids_T, places, np.full(len(places), token))
        own = self._one_by_one(probe, PROBE_TOKENS * len(places))
        try:
            ours = self._with_cache(probe, len(places))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            return False
        # As far as two batches of a dtype differ in the mean; single values of bfloat16 differ by more.
        error = (own.float() - ours.float()).abs().mean() / own.float().std().clamp(min=1e-6)
        return bool(error <= max(1e-4, 4 * torch.finfo(self._dtype).eps))

    def _with_cache(self, branches: BranchInput, most_tokens: int) -> torch.Tensor:
        text = branches.ids_T[: int(branches.places_B.max())]
        _, cache = self._forward(input_ids=self._sent(text[None]), use_cache=True)
        parts = []
        for start in range(0, len(branches.places_B), most_tokens):
            if start:
                cache.crop(-most_tokens)  # those of the part before
            part = slice(start, start + most_tokens)
            places = branches.places_B[part]
            sees = np.concatenate(
                [np.arange(len(text)) < places[:, None], np.eye(len(places), dtype=bool)], axis=1
            )
            hidden = torch.zeros(sees.shape, dtype=self._dtype)
            hidden[~torch.from_numpy(sees)] = torch.finfo(self._dtype).min
            states, _ = self._forward(
                input_ids=self._sent(branches.tokens_B[None, part]),
                position_ids=self._sent(places[None]),
                attention_mask=hidden[None, None].to(self._device),
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(states[0])
        return torch.cat(parts)

    def _one_by_one(self, branches: BranchInput, most_tokens: int) -> torch.Tensor:
        """Each branch as a text of its own, in padded batches."""
        longest = int(branches.places_B.max()) + 1
        size = max(most_tokens // longest, 1)
        parts = []
        for start in range(0, len(branches.places_B), size):
            places = branches.places_B[start : start + size]
            padded = np.zeros((len(places), longest), np.int64)
            for row, place, token in zip(padded, places, branches.tokens_B[start:], strict=False):
                row[:place] = branches.ids_T[:place]
                row[place] = token
            states, _ = self._forward(input_ids=self._sent(padded), use_cache=False)
            parts.append(states[torch.arange(len(places)), self._sent(places)])
        return torch.cat(parts)

    def _sent(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self._device)


def attention_reach(config: Any) -> int | None:
    """Tokens that every layer sees, itself included; None where all see the whole text.

    Args:
        config: The text part of a model's config.
    """
    found = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        found.append(getattr(config, "sliding_window", None))
    return min((int(size) for size in found if size), default=None)


@contextmanager
def memory_for(branches: Branches, source: str) -> Iterator[None]:
    """Turn memory running out on branches into an EngineMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EngineMemoryError(
            f"memory ran out on {len(branches.positions):,} branches of one segment",
            where=f"source {source}",
            hint="set a smaller extract.batch_tokens or extract.head_rows",
        ) from error
