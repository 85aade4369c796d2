"""The output layer of a model, run alone on hidden states, with logits in float32.

Shapes: R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch

from store_schema.model.out_of_memory import is_out_of_memory

SLICE_BYTES = 16 << 20
"""Weights in float32 that exist at a time where a half-precision product cannot give float32."""


class OutputHead:
    """Logits of hidden states.

    A product of two bf16 or fp16 numbers is exact in float32, and matrix units sum in float32: what
    ties logits is only that the sum is rounded back. So the weights stay as they are and the sum is
    asked for in float32; where the device has no such product, slices of the weights are converted
    one after the other. A float32 copy of the whole weight never exists.

    On a CPU all logits are written to one place that is used again: new memory of this size is
    handed out page by page, which took a quarter as long as the product itself.
    """

    def __init__(self, layer: torch.nn.Module, *, fp32: bool) -> None:
        """Take a model's output layer.

        Args:
            layer: What `get_output_embeddings` gives.
            fp32: Whether logits are computed in float32 though the model is not.
        """
        self._layer = layer
        self._linear = layer if _is_plain(layer) and (fp32 or _is_float32(layer)) else None
        self._wide = self._linear is not None and _gives_float32(self._linear.weight)
        self._place = torch.empty(0)

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """[R, V] float32; on a CPU they stand until the next call."""
        if self._linear is None:
            logits: torch.Tensor = self._layer(hidden_RH)
            return logits.float()
        weight_VH, bias_V = self._linear.weight, self._linear.bias
        if self._wide:
            logits = torch.mm(hidden_RH, weight_VH.t(), out_dtype=torch.float32)
        else:
            logits = self._room(len(hidden_RH), weight_VH)
            product_into(logits, hidden_RH, weight_VH)
        return logits if bias_V is None else logits.add_(bias_V)

    def _room(self, R: int, weight_VH: torch.Tensor) -> torch.Tensor:
        size = R * len(weight_VH)
        if weight_VH.device.type != "cpu":
            return torch.empty(R, len(weight_VH), device=weight_VH.device)
        if self._place.numel() < size:
            self._place = torch.empty(0)  # not both at a time
            self._place = torch.empty(size)
        return self._place[:size].view(R, -1)


def product_into(logits_RV: torch.Tensor, hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> None:
    """Hidden times the transposed weight, in float32 throughout, a slice of V at a time.

    Args:
        logits_RV: float32, filled.
        hidden_RH: Of the weight's type.
        weight_VH: Any floating-point type; in float32 it is multiplied whole.
    """
    if weight_VH.dtype == torch.float32:
        torch.mm(hidden_RH, weight_VH.t(), out=logits_RV)
        return
    exact_in_bf16 = hidden_RH.dtype == weight_VH.dtype == torch.bfloat16
    hidden_RH = hidden_RH.float()
    step = min(max(SLICE_BYTES // (4 * weight_VH.shape[1]), 1), len(weight_VH))
    slice_SH = torch.empty(step, weight_VH.shape[1], device=weight_VH.device)
    with bf16_units(exact_in_bf16):
        for start in range(0, len(weight_VH), step):
            part_VH = weight_VH[start : start + step]
            wide_SH = slice_SH[: len(part_VH)].copy_(part_VH)
            torch.mm(hidden_RH, wide_SH.t(), out=logits_RV[:, start : start + step])


@contextmanager
def bf16_units(wanted: bool) -> Iterator[None]:
    """Let a CPU round float32 factors of matrix products to bf16; sums stay in float32.

    Numbers that come from bf16 lose nothing by it, and units made for bf16 (AVX-512 BF16, AMX) take
    them three times as fast and more. A CPU without them does as before.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not wanted or not hasattr(settings, "fp32_precision"):  # torch before 2.9
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _is_plain(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether the layer is its weight and bias and nothing else."""
    return isinstance(layer, torch.nn.Linear) and type(layer).forward is torch.nn.Linear.forward


def _is_float32(layer: torch.nn.Linear) -> bool:
    return layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def _gives_float32(weight_VH: torch.Tensor) -> bool:
    """Whether the device multiplies the weight's type into float32."""
    if weight_VH.dtype == torch.float32:
        return False
    few = weight_VH[:16]
    try:
        torch.mm(few, few.t(), out_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        if is_out_of_memory(error):
            raise
        return False
    return True
