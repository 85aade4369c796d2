"""Tables from a source's vocabulary to the target's, for method `bytes`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from align.chain.continuation import Continuation
from align.chain.first_token import PieceTable
from align.chain.tail_tokens import TailTokens
from align.chain.trie import TargetTrie


class VocabularyMap(NamedTuple):
    """Which target tokens the bytes of each source token belong to; read by compiled code.

    Args:
        pieces: First target token at each byte of each source token.
        continuation: Target tokens of each whole source token in running text.
        trie: The target's vocabulary.
        target_lengths: [V] bytes of each target token.
        eos: EOS id of the source and of the target, -1 for none. The mass of one goes to the other.
        tail: Source tokens that a row's tail may hold inside the label.
        look_ahead: Whether to use the source's next row where the target might have written a longer
            token.
    """

    pieces: PieceTable
    continuation: Continuation
    trie: TargetTrie
    target_lengths: npt.NDArray[np.int64]
    tail: TailTokens
    eos: tuple[int, int] = (-1, -1)
    look_ahead: bool = True
