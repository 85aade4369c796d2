"""The output layer of a model, run alone on hidden states, with logits in float32.

Shapes: R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from extract.memory import is_out_of_memory

SLICE_BYTES = 16 << 20
"""Weights in float32 that exist at a time where a half-precision product cannot give float32."""


class OutputHead:
    """Logits of hidden states.

    A product of two bf16 or fp16 numbers is exact in float32, and matrix units sum in float32: what
    ties logits is only that the sum is rounded back. So the weights stay as they are and the sum is
    asked for in float32; where the device has no such product, slices of the weights are converted
    one after the other. A float32 copy of the whole weight never exists.
    """

    def __init__(self, layer: torch.nn.Module, *, fp32: bool) -> None:
        """Take a model's output layer.

        Args:
            layer: What `get_output_embeddings` gives.
            fp32: Whether logits are computed in float32 though the model is not.
        """
        self._layer = layer
        self._linear = layer if fp32 and isinstance(layer, torch.nn.Linear) else None
        self._wide = self._linear is not None and _gives_float32(self._linear.weight)

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """[R, V] float32."""
        if self._linear is None:
            logits: torch.Tensor = self._layer(hidden_RH)
            return logits.float()
        weight_VH, bias_V = self._linear.weight, self._linear.bias
        if self._wide:
            logits = torch.mm(hidden_RH, weight_VH.t(), out_dtype=torch.float32)
        else:
            logits = sliced_product(hidden_RH, weight_VH)
        return logits if bias_V is None else logits.add_(bias_V)


def sliced_product(hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """[R, V] hidden times the transposed weight, in float32 throughout, a slice of V at a time."""
    hidden_RH = hidden_RH.float()
    logits_RV = hidden_RH.new_empty(len(hidden_RH), len(weight_VH))
    step = max(SLICE_BYTES // (4 * weight_VH.shape[1]), 1)
    for start in range(0, len(weight_VH), step):
        part_VH = weight_VH[start : start + step].float()
        logits_RV[:, start : start + step] = F.linear(hidden_RH, part_VH)
    return logits_RV


def _gives_float32(weight_VH: torch.Tensor) -> bool:
    """Whether the device multiplies the weight's type into float32."""
    few = weight_VH[:16]
    try:
        torch.mm(few, few.t(), out_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        if is_out_of_memory(error):
            raise
        return False
    return True
