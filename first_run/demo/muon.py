"""Muon, the optimizer of the demo's matrices, in a precision that is fast on the machine at hand.

torch's own works in bfloat16 always, which a CPU without AMX emulates: with AVX2 alone one update of
a matrix of 256 x 688 took 350 ms in bfloat16, 12 ms in float32.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; the update's scale as in Liu et
al. 2025, "Muon is scalable for LLM training".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose matrix is brought near an orthogonal one before it is applied."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        """Take the matrices.

        Args:
            params: Matrices alone.
            lr: Learning rate, on AdamW's scale (update's root mean square 0.2).
            momentum: Of the running mean of gradients.
            weight_decay: Decoupled.
            dtype: Of the iteration.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["mean"] = torch.zeros_like(param)
                mean = state["mean"].lerp_(param.grad, 1 - group["momentum"])
                update = orthogonal(param.grad.lerp(mean, group["momentum"]).to(self.dtype))
                scale = 0.2 * math.sqrt(max(param.shape))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with about the same singular vectors and singular values between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
