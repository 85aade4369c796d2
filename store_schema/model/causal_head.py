"""What a causal model makes of its output layer's product: what its config says, and how far that goes.

A scale and a soft cap are read from the config: public architectures do no more. What else a model
does to its logits is seen where its own are compared with ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scale_and_cap(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """Factor on the logits, 1 for most models, and their bound, None for most: cap * tanh(x / cap).

    Args:
        config: Its text part, by name.
    """
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    caps = (config.get(name) for name in ("final_logit_softcapping", "logit_softcapping"))
    return scale, next((float(cap) for cap in caps if cap is not None), None)


def head_error(own: Any, ours: Any) -> float:
    """Largest difference of logits relative to the spread of the model's own; infinite where the shapes
    differ, NaN where a number is none.

    Args:
        own: Tensor of the model's own logits, float32 or better.
        ours: Of its last hidden states and its output layer, likewise.
    """
    if own.shape != ours.shape:
        return float("inf")
    return float((own - ours).abs().max() / own.std().clamp(min=1e-6))
