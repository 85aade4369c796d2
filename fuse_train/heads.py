"""A causal model seen as two parts: hidden states, and the head that makes logits of some rows.

Logits of a whole batch are never held: at 128k tokens of vocabulary they would be most of a GPU.
The price is to know what a model does between hidden state and logits. The two things that public
architectures do (a scale, a soft cap) are read from the config, and the result is compared with the
model's own logits once, so that an architecture with another habit is refused instead of mistrained.

Shape suffixes: B batch, L input positions, R rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from store_schema.errors import ModelError

PROBE_TOLERANCE = 1e-3
"""Largest difference between our logits and the model's own, relative to their spread."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last step of a model: logits = cap * tanh(scale * (h W^T + b) / cap).

    Args:
        weight_VH: Output embedding (tied or not).
        bias_V: Or None.
        scale: Factor on the logits, 1 for most models.
        softcap: Bound of the logits, None for most models.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Plain logits [R, V] of a few rows, in float32 or better."""
        weight_VH = self.weight_VH.to(hidden_RH.dtype)
        logits_RV = widen(hidden_RH @ weight_VH.T)
        if self.bias_V is not None:
            logits_RV = logits_RV + self.bias_V
        if self.scale != 1.0:
            logits_RV = logits_RV * self.scale
        if self.softcap is not None:
            logits_RV = self.softcap * torch.tanh(logits_RV / self.softcap)
        return logits_RV


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """float32 of anything smaller; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def head_of(model: Any, *, where: str) -> Head:
    """The head of a transformers causal model.

    Raises:
        ModelError: It has no linear output embedding.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise ModelError("model has no linear head", where=where, got=type(layer).__name__)
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(layer, "bias", None)
    return Head(weight, bias, scale, None if softcap is None else float(softcap))


def hidden_states(model: Any, input_ids_BL: torch.Tensor) -> torch.Tensor:
    """Final hidden states [B, L, H], what the head is applied to.

    Inputs are padded on the right and attention is causal, so no row that counts can see padding:
    no mask is given, which lets attention take its fast causal path.
    """
    output = model.base_model(input_ids=input_ids_BL, use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


@torch.no_grad()
def check_head(model: Any, *, where: str) -> None:
    """Compare logits through `hidden_states` and `head_of` with the model's own, on four tokens.

    Raises:
        ModelError: They differ: the model does something to its logits that is not known here.
    """
    was_training = model.training
    model.eval()
    try:
        ids = torch.arange(4, device=model.device)[None] % int(model.config.vocab_size)
        own = widen(model(input_ids=ids, use_cache=False).logits)[0]
        ours = head_of(model, where=where).logits(hidden_states(model, ids)[0])
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ModelError(
            "model cannot be used as hidden states and a head",
            where=where,
            got=f"{type(error).__name__}: {error}",
        ) from error
    finally:
        model.train(was_training)
    same_shape = own.shape == ours.shape
    worst = float((own - ours).abs().max() / own.std().clamp(min=1e-6)) if same_shape else None
    if worst is None or not worst <= PROBE_TOLERANCE:
        raise ModelError(
            "model treats its logits in a way that is not supported",
            where=where,
            expected="logits of base model and head, with logit_scale, logits_scaling or "
            "final_logit_softcapping of the config at most",
            got=f"relative difference {worst:.2g}" if same_shape else f"shape {tuple(own.shape)}",
            hint="train another architecture",
        )
