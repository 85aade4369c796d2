"""Logits of half-precision models in float32, without a float32 copy of the weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from extract.head import output_head
from extract.head.output_head import OutputHead, bf16_units, product_into

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
    monkeypatch.setattr(output_head, "SLICE_BYTES", 4 * 256 * 300)
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
    widths = []
    plain: Any = torch.mm

    def watched(hidden: torch.Tensor, weight: torch.Tensor, **options: Any) -> Any:
        widths.append(weight.numel())
        return plain(hidden, weight, **options)

    layer = layer_of(torch.bfloat16)
    output = OutputHead(layer, fp32=True)
    monkeypatch.setattr(output_head, "SLICE_BYTES", 4 * 256 * 100)
    monkeypatch.setattr(torch, "mm", watched)
    output.logits(torch.randn(3, 256).bfloat16())
    assert widths == [100 * 256] * 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slices_that_do_not_divide_the_vocabulary(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "SLICE_BYTES", 4 * 256 * 7)
    layer = layer_of(dtype)
    hidden = torch.randn(2, 256).to(dtype)
    logits = torch.full((2, 1000), torch.nan)
    product_into(logits, hidden, layer.weight)
    torch.testing.assert_close(logits.double(), exact_logits(layer, hidden), atol=2e-5, rtol=0)


def test_units_for_bf16_lose_nothing_of_bf16() -> None:
    """Where the CPU has them: the error is that of float32 sums, not of rounded results."""
    torch.manual_seed(1)
    hidden, weight = (4 * torch.randn(n, 512).bfloat16() for n in (64, 4096))
    exact = hidden.double() @ weight.double().t()
    errors = []
    for wanted in (False, True):
        with bf16_units(wanted):
            product = torch.mm(hidden.float(), weight.float().t())
        errors.append(float((product.double() - exact).abs().max()))
    assert errors[1] < max(10 * errors[0], 1e-6 * float(exact.abs().max()))


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has no such setting"
)
def test_the_precision_of_products_is_the_user_s_again() -> None:
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before = settings.fp32_precision
    with bf16_units(True):
        assert settings.fp32_precision == "bf16"
    assert settings.fp32_precision == before
    with pytest.raises(KeyError), bf16_units(True):
        raise KeyError
    assert settings.fp32_precision == before
    output = OutputHead(layer_of(torch.bfloat16), fp32=True)
    output.logits(torch.randn(2, 256).bfloat16())
    assert settings.fp32_precision == before


def test_only_bf16_is_given_to_units_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 and fp16 factors would be rounded."""
    asked = []

    @contextmanager
    def watched(wanted: bool) -> Iterator[None]:
        asked.append(wanted)
        yield

    monkeypatch.setattr(output_head, "bf16_units", watched)
    for hidden_type, weight_type in [("bfloat16", "bfloat16"), ("float16", "float16")]:
        hidden = torch.randn(2, 256).to(getattr(torch, hidden_type))
        product_into(torch.empty(2, 1000), hidden, layer_of(getattr(torch, weight_type)).weight)
    product_into(torch.empty(2, 1000), torch.randn(2, 256), layer_of(torch.bfloat16).weight)
    assert asked == [True, False, False]


def test_logits_of_one_call_take_the_place_of_those_before() -> None:
    output = OutputHead(layer_of(torch.bfloat16), fp32=True)
    first = output.logits(torch.randn(8, 256).bfloat16())
    second = output.logits(torch.randn(3, 256).bfloat16())
    third = output.logits(torch.randn(8, 256).bfloat16())
    assert first.data_ptr() == second.data_ptr() == third.data_ptr()
    assert (first.shape, second.shape, third.shape) == ((8, 1000), (3, 1000), (8, 1000))


def test_other_layers_run_as_they_are() -> None:
    layer = torch.nn.Sequential(layer_of(torch.float32), torch.nn.Tanh())
    hidden = torch.randn(2, 256)
    assert torch.equal(OutputHead(layer, fp32=True).logits(hidden), layer(hidden))
