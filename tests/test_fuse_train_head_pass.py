"""The chunked pass with every kind of head, dtype and frozen part, against dense float64."""

from __future__ import annotations

import pytest
import torch

from fuse_train.divergences.divergence import Divergence
from fuse_train.losses import head_pass
from fuse_train.losses.losses import SourceRows, head_loss
from fuse_train.model.heads import Head, default_chunk_rows
from tests.dense_loss import dense_total

R, M, K, V, H = 40, 4, 12, 600, 32
CE = Divergence()


def problem(seed: int = 0, sharpness: float = 1.0):
    """Sources near the target where `sharpness` is large, as after some training."""
    g = torch.Generator().manual_seed(seed)
    double = {"generator": g, "dtype": torch.float64}
    hidden = torch.randn(R, H, **double) * sharpness
    weight = torch.randn(V, H, **double) / H**0.5
    labels = torch.randint(V, (R,), generator=g)
    noisy = (hidden @ weight.T)[:, None] + 0.3 * torch.randn(R, M, V, **double)
    top = noisy.softmax(-1).topk(K)
    rows = SourceRows(top.indices, top.values, 1 - top.values.sum(-1))
    return hidden, weight, labels, torch.full((R,), 0.3), rows, torch.full((R, M), 0.7 / M)


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def exact_grads(hidden, weight, labels, clm, rows, fusion, **head):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total = dense_total(hidden, weight, labels, clm, rows, fusion, CE, **head)
    return torch.autograd.grad(total, (hidden, weight))


def rounded(rows: SourceRows, dtype: torch.dtype) -> SourceRows:
    return SourceRows(rows.entry_ids_RMK, rows.entry_probs_RMK.to(dtype), rows.tail_RM.to(dtype))


def test_float32_gradients_are_exact_to_a_millionth() -> None:
    for got, want, _ in float32_gradients(1.0):
        assert relative(got, want) < 1e-6


@pytest.mark.parametrize("sharpness", [6.0, 20.0])
def test_a_sure_target_costs_no_more_digits_than_its_logits_have(sharpness) -> None:
    """Logits of 50 have five digits behind the point in float32, whoever takes their gradient; entries
    that hold nearly all mass must not cost further ones (1 - 0.9999 would)."""
    for got, want, plain in float32_gradients(sharpness):
        assert relative(got, want) < 1.1 * relative(plain, want)


def float32_gradients(sharpness: float):
    """Ours, exact ones, and those of the dense lines on float32 logits."""
    hidden, weight, labels, clm, rows, fusion = problem(1, sharpness)
    hidden, weight = hidden.float(), weight.float()
    rows = rounded(rows, torch.float32)
    exact = exact_grads(hidden.double(), weight.double(), labels, clm, rows, fusion)
    wrt = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = head_loss(hidden, Head(weight), labels, clm, rows, fusion, chunk_rows=16)
    ours = torch.autograd.grad(loss.total, wrt)
    plain = torch.autograd.grad(dense_total(*wrt, labels, clm, rows, fusion, CE), wrt)
    return zip(ours, exact, plain, strict=True)


@pytest.mark.parametrize("chunk_rows", [7, R])
@pytest.mark.parametrize("has_instructions", [False, True])
def test_bfloat16_gradients_err_no_more_than_the_plain_versions(
    chunk_rows, has_instructions, monkeypatch
) -> None:
    """The plain version: bfloat16 logits, the loss in float32, bfloat16 gradients, by autograd."""
    monkeypatch.setattr(head_pass, "cpu_multiplies_bfloat16", lambda: has_instructions)
    hidden, weight, labels, clm, rows, fusion = problem(2, 2.0)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    rows = rounded(rows, torch.float32)
    exact = exact_grads(hidden.double(), weight.double(), labels, clm, rows, fusion)
    wrt = (hidden.requires_grad_(), weight.requires_grad_())
    logits = (hidden @ weight.T).float()
    eye = torch.eye(V)
    plain = torch.autograd.grad(dense_total(logits, eye, labels, clm, rows, fusion, CE), wrt)
    loss = head_loss(hidden, Head(weight), labels, clm, rows, fusion, chunk_rows=chunk_rows)
    ours = torch.autograd.grad(loss.total, wrt)
    for got, by_plain, want in zip(ours, plain, exact, strict=True):
        assert got.dtype == torch.bfloat16
        limit = 1.1 if has_instructions else 0.7
        assert relative(got, want) < limit * relative(by_plain, want)


def test_float32_weights_under_bfloat16_hidden_states_keep_a_float32_gradient() -> None:
    """What autocast gives: the product is in bfloat16, sums and weights stay in float32."""
    hidden, weight, labels, clm, rows, fusion = problem(3)
    exact = exact_grads(hidden, weight, labels, clm, rows, fusion)
    wrt = (hidden.bfloat16().requires_grad_(), weight.float().requires_grad_())
    loss = head_loss(wrt[0], Head(wrt[1]), labels, clm, rows, fusion, chunk_rows=9)
    got = torch.autograd.grad(loss.total, wrt)
    assert (got[0].dtype, got[1].dtype) == (torch.bfloat16, torch.float32)
    assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 0.02


def test_frozen_parts_cost_nothing_and_others_are_right(monkeypatch) -> None:
    """LoRA: the head is frozen, so no [V, H] gradient is made."""
    hidden, weight, labels, clm, rows, fusion = problem(4)
    exact = exact_grads(hidden, weight, labels, clm, rows, fusion)
    args = (labels, clm, rows, fusion)
    made = []
    plain = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda *a, **k: made.append(a[0].shape) or plain(*a, **k)
    )
    loss = head_loss(hidden.clone().requires_grad_(), Head(weight), *args, chunk_rows=16)
    assert not made
    loss.total.backward()
    thawed = weight.clone().requires_grad_()
    head_loss(hidden, Head(thawed), *args, chunk_rows=16).total.backward()
    assert set(made) == {(V, H)}
    assert relative(thawed.grad, exact[1]) < 1e-12


def test_tied_embeddings_get_both_gradients() -> None:
    _, weight, labels, clm, rows, fusion = problem(5)
    tokens = torch.randint(V, (R,))

    def grads(loss):
        tied = weight.clone().requires_grad_()
        loss(torch.nn.functional.embedding(tokens, tied).tanh(), tied).backward()
        return tied.grad

    ours = grads(lambda h, w: head_loss(h, Head(w), labels, clm, rows, fusion, chunk_rows=16).total)
    exact = grads(lambda h, w: dense_total(h, w, labels, clm, rows, fusion, CE))
    assert relative(ours, exact) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.0625, None), (1.0, 30.0), (2.0, 5.0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scaled_capped_and_biased_heads(dtype, scale, cap, with_bias) -> None:
    """Cohere's and Granite's scale, Gemma's cap, a bias: all at once too."""
    hidden, weight, labels, clm, rows, fusion = problem(6, 4.0)
    bias = torch.randn(V, dtype=torch.float64)
    wrt64 = [t.to(dtype).double().requires_grad_() for t in (hidden, weight, bias)]
    kept = rounded(rows, dtype)
    exact = torch.autograd.grad(
        dense_total(
            *wrt64[:2], labels, clm, kept, fusion, CE,
            bias=wrt64[2] if with_bias else None, scale=scale, cap=cap,
        ),
        wrt64[: 2 + with_bias],
    )  # fmt: skip
    wrt = [t.detach().to(dtype).requires_grad_() for t in wrt64]
    head = Head(wrt[1], wrt[2] if with_bias else None, scale, cap)
    loss = head_loss(wrt[0], head, labels, clm, kept, fusion, chunk_rows=11)
    limit = 1e-12 if dtype == torch.float64 else 1e-5 if cap else 2e-6
    for got, want in zip(torch.autograd.grad(loss.total, wrt[: 2 + with_bias]), exact, strict=True):
        assert relative(got, want) < limit


def test_sources_that_share_tokens_with_each_other_and_the_label() -> None:
    """Every slot is the same few tokens: each is counted once in the sum, and once for each source."""
    hidden, weight, labels, clm, _, fusion = problem(7)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(R)])[:, None].expand(R, M, K).clone()
    ids[:, :, 0] = labels[:, None]
    ids[:, 1, 4:] = -1
    ids[:, 2] = -1
    probs = (torch.rand(R, M, K) / K) * (ids >= 0)
    rows = SourceRows(ids.int(), probs, 1 - probs.sum(-1))
    for r in range(R):  # the label may stand among the others: there once only
        again = rows.entry_ids_RMK[r, 0].tolist().count(int(labels[r]))
        if again > 1:
            rows.entry_ids_RMK[r, :, 1:][rows.entry_ids_RMK[r, :, 1:] == labels[r]] = -1
            rows.entry_probs_RMK[r][rows.entry_ids_RMK[r] < 0] = 0
    exact = exact_grads(hidden, weight, labels, clm, rows, fusion)
    wrt = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    loss = head_loss(wrt[0], Head(wrt[1]), labels, clm, rows, fusion, chunk_rows=16)
    for got, want in zip(torch.autograd.grad(loss.total, wrt), exact, strict=True):
        assert relative(got, want) < 1e-12


def test_the_largest_tensor_is_one_chunk_or_the_head(monkeypatch) -> None:
    """Never [R, V]: watched through every operation of a pass with many more rows than the chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, tuple | list) else (out,):
                if isinstance(made, torch.Tensor):
                    seen.append(made.numel())
            return out

    hidden, weight, labels, clm, rows, fusion = problem(8)
    wrt = (hidden.requires_grad_(), weight.requires_grad_())
    with Watch():
        head_loss(wrt[0], Head(wrt[1]), labels, clm, rows, fusion, chunk_rows=4).total.backward()
    assert len(seen) > 50
    assert max(seen) == max(V * H, 4 * V) < R * V


def test_gradients_are_handed_over_once() -> None:
    hidden, weight, labels, clm, rows, fusion = problem(9)
    loss = head_loss(hidden.requires_grad_(), Head(weight), labels, clm, rows, fusion).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_without_gradient_no_gradient_is_made() -> None:
    hidden, weight, labels, clm, rows, fusion = problem(10)
    weight.requires_grad_()
    with torch.no_grad():
        quiet = head_loss(hidden, Head(weight), labels, clm, rows, fusion)
    with_gradient = head_loss(hidden, Head(weight), labels, clm, rows, fusion)
    assert not quiet.total.requires_grad
    assert with_gradient.total.requires_grad
    torch.testing.assert_close(quiet.nll_R, with_gradient.nll_R)
    torch.testing.assert_close(quiet.total, with_gradient.total.detach())


def test_the_chunk_follows_the_vocabulary() -> None:
    cpu = torch.device("cpu")
    assert default_chunk_rows(32_000, cpu) == 262
    assert default_chunk_rows(256_000, cpu) < 64
    assert default_chunk_rows(10**9, cpu) == 16
    assert default_chunk_rows(128_000, torch.device("cuda")) >= 1_000
