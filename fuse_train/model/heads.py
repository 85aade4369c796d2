"""A causal model as two parts: hidden states, and the head that computes logits of some rows.

Logits of a whole batch are never in memory: at 128k tokens of vocabulary they would fill most of a GPU.
So this code must know what a model does between hidden state and logits
(`store_schema.model.causal_head`). The result is compared with the model's own logits once, so that an
unknown architecture is refused instead of trained wrongly.

Shape suffixes: B batch, L input positions, R rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from store_schema.errors import ModelError
from store_schema.model.causal_head import head_error, scale_and_cap

PROBE_TOLERANCE = 1e-3
"""Largest accepted `head_error`, beyond what rounding to the model's dtype explains."""

_ROUNDINGS = 4
"""A model's own logits in half precision are rounded after the product, scale, quotient and tanh."""

CHUNK_BYTES_CPU = 32 << 20
"""Float32 logits of a chunk on a CPU: about its last-level cache (benchmarks/bench_train.py)."""

CHUNK_BYTES_DEVICE = 512 << 20
"""The same on a GPU: enough rows to fill it."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last step of a model: logits = cap * tanh(scale * (h W^T + b) / cap).

    Args:
        weight_VH: Output embedding (tied or not).
        bias_V: Bias, None for most models.
        scale: Factor on the logits, 1 for most models.
        softcap: Bound of the logits, None for most models.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def part(self, ids: slice, dtype: torch.dtype) -> Head:
        """The head of some tokens alone, its weight in a dtype."""
        bias_V = None if self.bias_V is None else self.bias_V[ids]
        return Head(self.weight_VH[ids].to(dtype), bias_V, self.scale, self.softcap)

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


def default_chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows whose logits are in memory at one time, if the run file does not set them."""
    size = CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES_DEVICE
    return max(16, size // (4 * vocab_size))


def plain_model(model: Any) -> Any:
    """The transformers model inside a peft wrapper (adapters stay in its layers), or the model."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def head_of(model: Any, *, where: str) -> Head:
    """The head of a transformers causal model, also inside a peft wrapper.

    A head that peft trains whole (`modules_to_save`) is a plain matrix. Adapters on the head are
    refused: its weight alone would not include them.

    Raises:
        ModelError: No linear output embedding, adapters on it, or a weight spread over processes.
    """
    layer = plain_model(model).get_output_embeddings()
    if hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        raise ModelError(
            "the head has an adapter",
            where=where,
            expected="a plain head, frozen or trained whole",
            got=type(layer).__name__,
            hint="leave lm_head out of the adapter's targets, or train it whole (modules_to_save)",
        )
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        got = type(layer).__name__
        if isinstance(weight, torch.Tensor):
            got += f", weight {weight.dtype} of shape {tuple(weight.shape)}"
        hint = "a quantised or sharded head must be a plain matrix when the loss is computed"
        raise ModelError("model has no linear head", where=where, got=got, hint=hint)
    if hasattr(weight, "placements"):
        raise ModelError(
            "the head's weight is spread over processes",
            where=where,
            hint="leave the head out of what is sharded, or gather it around the forward pass",
        )
    config = vars(model.config.get_text_config())
    return Head(weight, getattr(layer, "bias", None), *scale_and_cap(config))


def hidden_states(
    model: Any, input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """Final hidden states [B, L, H], the input of the head.

    Inputs are padded on the right and attention is causal, so no real token attends to padding. No mask
    is passed, so that attention takes its fast causal path. Position ids are passed where rows hold
    several segments: each begins with 0, which transformers takes as the start of another text.
    """
    positions = {} if position_ids_BL is None else {"position_ids": position_ids_BL}
    output = plain_model(model).base_model(input_ids=input_ids_BL, use_cache=False, **positions)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


@torch.no_grad()
def check_head(model: Any, *, where: str) -> None:
    """Compare logits through `hidden_states` and `head_of` with the model's own, on four tokens.

    Raises:
        ModelError: They differ: the model does something to its logits that this code does not know.
    """
    was_training = model.training
    model.eval()
    try:
        ids = torch.arange(4, device=model.device)[None] % int(
            model.config.get_text_config().vocab_size
        )
        made = model(input_ids=ids, use_cache=False).logits
        own, own_dtype = widen(made)[0], made.dtype
        ours = head_of(model, where=where).logits(hidden_states(model, ids)[0])
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ModelError(
            "model cannot be used as hidden states and a head",
            where=where,
            got=f"{type(error).__name__}: {error}",
        ) from error
    finally:
        model.train(was_training)
    if not bool(own.isfinite().all()):
        raise ModelError(
            "model gives logits that are not finite",
            where=where,
            got=_not_finite(model),
            hint="fetch the weights again, or give another checkpoint",
        )
    difference = head_error(own, ours)
    rounding = _ROUNDINGS * torch.finfo(own_dtype).eps * head_error(own, torch.zeros_like(own))
    if not difference <= PROBE_TOLERANCE + rounding:
        raise ModelError(
            "model computes its logits in a way that is not supported",
            where=where,
            expected="logits of base model and head, with logit_scale, logits_scaling or "
            "final_logit_softcapping of the config at most",
            got=f"relative difference {difference:.2g}, shape {tuple(own.shape)}",
            hint="train another architecture",
        )


def _not_finite(model: Any) -> str:
    """Names and number of the model's weights that are not finite."""
    names = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if not names:
        return "NaN or infinity, though all its weights are finite"
    return f"NaN or infinity in {len(names)} of its weights: {', '.join(names[:3])}"
