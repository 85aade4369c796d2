"""Inputs that are the beginning of others: one pass of a causal model over the longest serves them all.

Turns of a chat are segments of their own, and each has all that was said before it as its context: a
chat of n turns would be read n times over. What a causal model says of a token depends on what stands
before it alone, so a turn whose input begins the next turn's needs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def prefix_groups(inputs: Sequence[npt.NDArray[np.integer[Any]]]) -> list[list[int]]:
    """Inputs put together with the longest that they begin.

    Sorted, whatever begins with an input stands right behind it: so looking at neighbours is enough.

    Args:
        inputs: Token ids of each.

    Returns:
        Indices into `inputs`, every one once: groups in the order of their longest input, which stands
        first in its group.
    """
    as_bytes = [np.ascontiguousarray(ids, ">u4").tobytes() for ids in inputs]
    groups: list[list[int]] = []
    for i in sorted(range(len(inputs)), key=lambda i: (as_bytes[i], -i), reverse=True):
        if groups and as_bytes[groups[-1][-1]].startswith(as_bytes[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return sorted(groups)
