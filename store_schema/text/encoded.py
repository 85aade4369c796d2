"""A segment as one model reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """A segment as one model reads it.

    Args:
        context_ids: Tokens before the text: BOS, or the rendered prompt. Context, not rows.
        token_ids: [N] uint32 tokens of the text: one row each.
        byte_ends: [N] uint32 end of each token in the text's UTF-8 bytes.
        ends_turn: Whether the last token is the end of a chat's turn: a row as well, of no bytes.
    """

    context_ids: tuple[int, ...]
    token_ids: npt.NDArray[np.uint32]
    byte_ends: npt.NDArray[np.uint32]
    ends_turn: bool = False

    @property
    def input_ids(self) -> list[int]:
        """Everything the model is fed."""
        return [*self.context_ids, *self.token_ids.tolist()]

    @property
    def text_only(self) -> EncodedSegment:
        """The same without the end of a turn."""
        if not self.ends_turn:
            return self
        ids, ends = self.token_ids[:-1], self.byte_ends[:-1]
        return EncodedSegment(self.context_ids, ids, ends)
