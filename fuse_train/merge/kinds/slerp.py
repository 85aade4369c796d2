"""Method slerp."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fuse_train.merge.kind import Block, MergeKind
from store_schema.config import StrictModel

if TYPE_CHECKING:
    import torch

_NEARLY_PARALLEL = 0.9995
_LEAST_NORM = 1e-8


class SlerpSection(StrictModel):
    """Method slerp."""

    t: float = Field(default=0.5, ge=0, le=1)
    """Share of the way from the first model (0) to the second (1)."""


class Slerp(MergeKind):
    """On the arc between two models, tensor by tensor.

    theta = (sin((1 - t) omega) theta_1 + sin(t omega) theta_2) / sin(omega), omega the angle between
    the two flat tensors. Where |cos(omega)| > 0.9995 the arc is taken for a line:
    theta = (1 - t) theta_1 + t theta_2.

    Source: Shoemake, SIGGRAPH 1985; on weights as in mergekit, whose bounds these are.
    """

    section = SlerpSection
    weighted = False
    fewest = most = 2
    paper = "Shoemake, SIGGRAPH 1985"

    def measure(self, blocks: Iterable[Block], options: Any) -> tuple[float, float]:
        """Factors of the two models."""
        dot, squares = 0.0, [0.0, 0.0]
        for block in blocks:
            a_E, b_E = block.models_KE.double()
            dot += float(a_E @ b_E)
            squares = [squares[0] + float(a_E @ a_E), squares[1] + float(b_E @ b_E)]
        norms = [math.sqrt(square) for square in squares]
        lengths = [norm if norm > _LEAST_NORM else 1.0 for norm in norms]
        cosine = max(-1.0, min(1.0, dot / (lengths[0] * lengths[1])))
        t = options.t
        if abs(cosine) > _NEARLY_PARALLEL:
            return 1 - t, t
        omega = math.acos(cosine)
        return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)

    def merge(self, block: Block, measured: tuple[float, float], options: Any) -> torch.Tensor:
        first, second = measured
        return first * block.models_KE[0] + second * block.models_KE[1]
