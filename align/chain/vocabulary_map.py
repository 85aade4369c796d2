"""All that method `bytes` knows of two vocabularies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from align.chain.continuation import Continuation
from align.chain.first_token import PieceTable
from align.chain.trie import TargetTrie


class VocabularyMap(NamedTuple):
    """Where the bytes of each source token go; compiled code reads it as it is.

    Args:
        pieces: What the target begins with at each byte of each source token.
        continuation: Where a whole source token's mass goes in running text.
        trie: The target's vocabulary.
        target_lengths: [V] bytes of the target's tokens.
        eos: EOS of the source and of the target, -1 for none: where the source may end, so may the
            target.
        look_ahead: Ask the source's next row where the target might have written a longer token.
    """

    pieces: PieceTable
    continuation: Continuation
    trie: TargetTrie
    target_lengths: npt.NDArray[np.int64]
    eos: tuple[int, int] = (-1, -1)
    look_ahead: bool = True
