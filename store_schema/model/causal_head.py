"""From the output layer's product to a model's logits: a scale and a soft cap, read from its config.

Public architectures do nothing else. For any other model `head_error` shows that the logits computed
here differ from its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scale_and_cap(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """The factor of the logits (1 for most models), and their soft cap (None for most): logits x become
    cap * tanh(x / cap).

    Args:
        config: The text part of the model's config, as a dict.
    """
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    caps = (config.get(name) for name in ("final_logit_softcapping", "logit_softcapping"))
    return scale, next((float(cap) for cap in caps if cap is not None), None)


def head_error(own: Any, ours: Any) -> float:
    """Largest difference of two logit tensors, divided by the standard deviation of `own`; infinite if
    their shapes differ, NaN if one has a NaN.

    Args:
        own: The model's own logits, float32 or better.
        ours: Logits computed from its last hidden states and its output layer, float32 or better.
    """
    if own.shape != ours.shape:
        return float("inf")
    return float((own - ours).abs().max() / own.std().clamp(min=1e-6))
