"""Group inputs that are prefixes of each other: a causal model needs one pass, over the longest.

Each turn of a chat is a segment with all previous turns as its context, so the beginning of a chat of n
turns would be run n times. A causal model's distribution of a token depends only on the tokens before
it, so a turn whose input is a prefix of the next turn's needs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def prefix_groups(inputs: Sequence[npt.NDArray[np.integer[Any]]]) -> list[list[int]]:
    """Group every input with the longest input that it is a prefix of.

    In sorted order an input directly precedes those that begin with it, so comparing neighbours is
    enough.

    Args:
        inputs: Token ids of each input.

    Returns:
        Groups of indices into `inputs`, each index once. The longest input is the first of its group,
        and groups are in the order of their first index.
    """
    as_bytes = [np.ascontiguousarray(ids, ">u4").tobytes() for ids in inputs]
    groups: list[list[int]] = []
    for i in sorted(range(len(inputs)), key=lambda i: (as_bytes[i], -i), reverse=True):
        if groups and as_bytes[groups[-1][-1]].startswith(as_bytes[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return sorted(groups)
