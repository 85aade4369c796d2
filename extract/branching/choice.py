"""Which entries of a shard get a branch: a pure function of its arrays.

An entry's gain is its probability times the chance that the target's tokenizer goes on past the
entry's end: only then does it matter what the source would say next. The chance is counted on text
(`past_ends`). For an entry that the text itself goes on from, it is 1.

Shapes: N positions, E entries, V ids, B branches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from extract.branch_config import BranchOptions
from store_schema.compiled import compiled
from store_schema.layout import Arrays
from store_schema.text.vocabulary import Vocabulary


def choose_branches(
    arrays: Arrays, chance_E: npt.NDArray[np.float64], options: BranchOptions
) -> npt.NDArray[np.int64]:
    """The entries of a shard that get a branch: those of the largest gain within the budget.

    Args:
        arrays: A source store's arrays of the shard.
        chance_E: [E] chance that the target's tokenizer goes on past an entry's end.
        options: The budget.

    Returns:
        [B] indices of entries, rising; never a position's own token. Of equal gains the first is
        taken.
    """
    counts_N = np.diff(arrays["entry_offsets"])
    labels_E = np.repeat(arrays["token_ids"], counts_N)
    masses_E = np.exp(arrays["entry_logprobs"].astype(np.float64))
    gains_E = masses_E * chance_E
    wanted_E = (masses_E >= options.min_mass) & (gains_E > 0) & (arrays["entry_ids"] != labels_E)
    wanted = np.flatnonzero(wanted_E)
    budget = int(options.per_position * len(counts_N))
    best = wanted[np.argsort(-gains_E[wanted], kind="stable")[:budget]]
    return np.sort(best)


def chances(
    arrays: Arrays, chance_V: npt.NDArray[np.float64], vocabulary: Vocabulary
) -> npt.NDArray[np.float64]:
    """[E] chance that the target's tokenizer goes on past each entry's end.

    Args:
        arrays: A source store's arrays of the shard.
        chance_V: [V] the chance of each token in running text.
        vocabulary: Of the source.
    """
    chance_E = chance_V[arrays["entry_ids"].astype(np.int64)]
    goes_on_E = _text_goes_on(
        arrays["token_offsets"],
        arrays["token_ids"].astype(np.int64),
        arrays["entry_offsets"],
        arrays["entry_ids"].astype(np.int64),
        np.frombuffer(b"".join(vocabulary.tokens), np.uint8),
        np.concatenate(([0], np.cumsum(vocabulary.lengths))),
    )
    return np.where(goes_on_E, 1.0, chance_E)


@compiled
def _text_goes_on(
    token_offsets: Any, token_ids: Any, entry_offsets: Any, entry_ids: Any, data: Any, starts: Any
) -> Any:
    """[E] bool, whether the text from a position on begins with the entry's bytes and goes on.

    Args:
        data: The bytes of the vocabulary's tokens, end to end.
        starts: [V+1] where each token begins in them.
    """
    goes_on_E = np.zeros(len(entry_ids), np.bool_)
    for d in range(len(token_offsets) - 1):
        last = token_offsets[d + 1]
        for row in range(token_offsets[d], last):
            for k in range(entry_offsets[row], entry_offsets[row + 1]):
                at, stop = starts[entry_ids[k]], starts[entry_ids[k] + 1]
                if at == stop:
                    continue
                agrees, token = True, row
                byte = starts[token_ids[token]]
                while agrees and at < stop:
                    while token < last and byte == starts[token_ids[token] + 1]:
                        token += 1
                        if token < last:
                            byte = starts[token_ids[token]]
                    agrees = token < last and data[at] == data[byte]
                    at += 1
                    byte += 1
                # Text is left after it: more of its last token, or a further one.
                ahead = token < last - 1 or (token < last and byte < starts[token_ids[token] + 1])
                goes_on_E[k] = agrees and ahead
    return goes_on_E
