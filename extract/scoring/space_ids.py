"""Which ids end a word: what a stored `space_mass` is the mass of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from store_schema.text.vocabulary import Vocabulary

WHITE_SPACE = b" \t\n\r\v\f"


def space_initial_ids(vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    """Ids that cannot continue a word: bytes that begin with ASCII white space, or a special role.

    The probability of a chunk of text followed by the mass of such ids is the probability that the
    chunk stands there as a whole, and not as the beginning of longer words, whatever the tokenizer.
    Special tokens count, since text that ends, ends its last word too; ids that stand for nothing
    do not.

    Returns:
        [V] bool.

    Source: Minixhofer et al. 2025, "Universal Cross-Tokenizer Distillation via Approximate
    Likelihood Matching" (2503.20083), section 3.1: the set of bytes that pre-tokenizers never put
    inside a token, for which it names space, newline and tab; the authors' program takes special
    tokens as well. Departures: carriage return, vertical tab and form feed, which the common
    pre-tokenizers treat alike; and bytes are looked at, not the signs of one family of tokenizers,
    so that SentencePiece's word marks count. With tokenizers that join punctuation and newlines
    (".\\n\\n") newline is not strictly such a byte; the paper takes it all the same.
    """
    begins = [token[:1] in WHITE_SPACE and token != b"" for token in vocabulary.tokens]
    written = [spelling != b"" for spelling in vocabulary.written]
    ends_word: npt.NDArray[np.bool_] = np.array(begins, bool)
    ends_word |= vocabulary.special & np.array(written, bool)
    return ends_word
