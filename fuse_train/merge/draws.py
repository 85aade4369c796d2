"""Random numbers that depend only on seed, tensor, model and element.

They come from a counter (Philox), so that neither the order of tensors nor the size of blocks changes
them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_PER_COUNT = 4
"""64-bit numbers that Philox gives for one value of its counter."""


def uniform(name: str, *, seed: int, model: int, start: int, count: int) -> torch.Tensor:
    """Numbers in [0, 1), float32 [count], of the elements from `start` on.

    Args:
        name: Name of the tensor.
        seed: Seed of the merge.
        model: Number of the model, from 0.
        start: Index of the first element.
        count: Number of elements.
    """
    digest = hashlib.sha256(f"{seed} {model} {name}".encode()).digest()
    source = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))
    counts, skipped = divmod(start, _PER_COUNT)
    source.advance(counts)
    raw = source.random_raw(skipped + count)[skipped:]
    return torch.from_numpy((raw >> np.uint64(40)).astype(np.float32)).mul_(2.0**-24)
