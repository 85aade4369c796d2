"""Logits of half-precision models in float32, without a float32 copy of the weight."""

from __future__ import annotations

import pytest
import torch

from extract import head
from extract.head import OutputHead, sliced_product

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def layer_of(dtype: torch.dtype, *, bias: bool = False, device: str = "cpu") -> torch.nn.Linear:
    """An output layer of 1,000 ids."""
    torch.manual_seed(0)
    return torch.nn.Linear(256, 1000, bias=bias).to(device, dtype).requires_grad_(False)


def exact_logits(layer: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """In float64."""
    bias = 0 if layer.bias is None else layer.bias.double()
    return hidden.double() @ layer.weight.double().t() + bias


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_logits(
    dtype: torch.dtype, bias: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * 256 * 300)
    layer = layer_of(dtype, bias=bias, device=device)
    hidden = torch.randn(33, 256).to(device, dtype)
    logits = OutputHead(layer, fp32=True).logits(hidden)
    assert logits.dtype == torch.float32
    exact = exact_logits(layer, hidden)
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=2e-5)
    rounded = OutputHead(layer, fp32=False).logits(hidden)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, layer(hidden).float())
    assert (rounded.double() - exact).abs().max() > 1e-3 or dtype == torch.float16
    tied = (logits.sort(-1).values.diff(dim=-1) == 0).float().mean()
    assert tied < 0.01 < (rounded.sort(-1).values.diff(dim=-1) == 0).float().mean()


def test_no_float32_copy_of_the_weight_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    widest = 0
    plain = torch.Tensor.float

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, tensor.numel())
        return plain(tensor)

    monkeypatch.setattr(head, "SLICE_BYTES", 4 * 256 * 100)
    monkeypatch.setattr(torch.Tensor, "float", watched)
    layer = layer_of(torch.bfloat16)
    OutputHead(layer, fp32=True).logits(torch.randn(3, 256).bfloat16())
    assert widest == 100 * 256


def test_slices_that_do_not_divide_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE_BYTES", 1)
    layer = layer_of(torch.bfloat16)
    hidden = torch.randn(2, 256).bfloat16()
    exact = exact_logits(layer, hidden)
    torch.testing.assert_close(
        sliced_product(hidden, layer.weight).double(), exact, atol=2e-5, rtol=0
    )


def test_other_layers_run_as_they_are() -> None:
    layer = torch.nn.Sequential(layer_of(torch.float32), torch.nn.Tanh())
    hidden = torch.randn(2, 256)
    assert torch.equal(OutputHead(layer, fp32=True).logits(hidden), layer(hidden))
