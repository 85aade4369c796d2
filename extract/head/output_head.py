"""The output layer of a model, run by itself on hidden states, with logits in float32.

Shapes: R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch

from store_schema.model.out_of_memory import is_out_of_memory

SLICE_BYTES = 16 << 20
"""Bytes of weights that are converted to float32 at a time, where a device has no mixed product."""


class OutputHead:
    """Computes logits of hidden states.

    A product of two bf16 or fp16 numbers is exact in float32, and matrix units sum in float32; logits
    become equal only because the sum is rounded back. So the weights stay as they are and the result is
    requested in float32. Where the device does not support that, slices of the weights are converted
    one after the other. There is never a float32 copy of the whole weight.

    For scoring on a CPU `extract.head.fused_head` is faster, where it is possible; this is its
    reference.

    On a CPU all logits are written to the same buffer: allocating new memory of this size took a
    quarter of the product's time.
    """

    def __init__(self, layer: torch.nn.Module, *, fp32: bool) -> None:
        """Wrap a model's output layer.

        Args:
            layer: From `get_output_embeddings`.
            fp32: Whether logits are computed in float32 for a model in another dtype.
        """
        self._layer = layer
        self._linear = layer if is_plain(layer) and (fp32 or _is_float32(layer)) else None
        self._wide = self._linear is not None and _gives_float32(self._linear.weight)
        self._buffer = torch.empty(0)

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """[R, V] float32 logits; on a CPU they are overwritten by the next call."""
        if self._linear is None:
            logits: torch.Tensor = self._layer(hidden_RH)
            return logits.float()
        weight_VH, bias_V = self._linear.weight, self._linear.bias
        if self._wide:
            logits = torch.mm(hidden_RH, weight_VH.t(), out_dtype=torch.float32)
        else:
            logits = self._output(len(hidden_RH), weight_VH)
            product_into(logits, hidden_RH, weight_VH)
        return logits if bias_V is None else logits.add_(bias_V)

    def _output(self, R: int, weight_VH: torch.Tensor) -> torch.Tensor:
        """[R, V] float32 tensor for the logits."""
        size = R * len(weight_VH)
        if weight_VH.device.type != "cpu":
            return torch.empty(R, len(weight_VH), device=weight_VH.device)
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0)  # frees the old buffer first
            self._buffer = torch.empty(size)
        return self._buffer[:size].view(R, -1)


def product_into(logits_RV: torch.Tensor, hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> None:
    """Hidden states times the transposed weight, in float32, a slice of V at a time.

    Args:
        logits_RV: float32; the result is written here.
        hidden_RH: Of the weight's dtype.
        weight_VH: Any floating-point dtype; a float32 weight is multiplied as a whole.
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
    """Allow a CPU to round float32 factors of matrix products to bf16; sums stay in float32.

    Factors that were converted from bf16 do not change by it. oneDNN then multiplies them on matrix
    units (AMX) if the CPU has them. On all others its float32 kernel runs, also with AVX-512 BF16
    (findings/torch_cpu_fp32_precision_bf16.sh): `FusedHead` uses those units.
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


def is_plain(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether the layer is a linear layer with nothing else in its forward."""
    return isinstance(layer, torch.nn.Linear) and type(layer).forward is torch.nn.Linear.forward


def _is_float32(layer: torch.nn.Linear) -> bool:
    return layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def _gives_float32(weight_VH: torch.Tensor) -> bool:
    """Whether the device can multiply matrices of the weight's dtype with a float32 result."""
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
