"""A segment as tokens of one model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """A segment as tokens of one model.

    Args:
        context_ids: Tokens before the text (BOS, or the rendered prompt), which have no rows in a
            store.
        token_ids: [N] uint32 tokens of the text, with one row each in a store.
        byte_ends: [N] uint32 byte after each token, in the text's UTF-8 bytes.
        ends_turn: Whether the last token is the one that ends a chat turn, which has a row but no
            bytes.
    """

    context_ids: tuple[int, ...]
    token_ids: npt.NDArray[np.uint32]
    byte_ends: npt.NDArray[np.uint32]
    ends_turn: bool = False

    @property
    def input_ids(self) -> list[int]:
        """All input tokens of the model: context and text."""
        return [*self.context_ids, *self.token_ids.tolist()]

    @property
    def text_only(self) -> EncodedSegment:
        """The same without the token that ends the turn."""
        if not self.ends_turn:
            return self
        ids, ends = self.token_ids[:-1], self.byte_ends[:-1]
        return EncodedSegment(self.context_ids, ids, ends)


def token_lengths(
    byte_ends: npt.NDArray[np.uint32], token_offsets: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """[N] bytes of each token.

    Args:
        byte_ends: [N] byte after each token, within its segment.
        token_offsets: [D+1] where each segment's tokens begin; None for a single segment.
    """
    ends = byte_ends.astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    if token_offsets is not None:
        starts = token_offsets[:-1][np.diff(token_offsets) > 0]
        lengths[starts] = ends[starts]
    return lengths
