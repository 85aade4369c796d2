"""Figures of logits against float64, and the two-stage top-k against torch's."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extract.head import logit_rows
from extract.head.logit_rows import BLOCK, best, block_sums, row_sums


def logits_of(num_rows: int, size: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    """[R, V] float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, size, generator=generator) * scale


@pytest.mark.parametrize("size", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 300, 4097, 131_072])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_sums_are_those_of_float64(size: int, scale: float) -> None:
    logits = logits_of(7, size, scale=scale)
    logits[1:3, : size // 3] = -torch.inf  # with whole blocks of them where there is room
    total = torch.logsumexp(logits.double(), -1)
    torch.testing.assert_close(row_sums(logits).log_total_R, total, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [3, 150])
def test_what_is_no_distribution_is_nan_in_its_row_alone(bad: float, place: int) -> None:
    logits = logits_of(3, 160)
    logits[1, place] = bad
    assert row_sums(logits).log_total_R.isnan().tolist() == [False, True, False]


def test_large_logits_do_not_overflow() -> None:
    logits = logits_of(2, 300) + 3e4
    exact = torch.logsumexp(logits.double(), -1)
    torch.testing.assert_close(row_sums(logits).log_total_R, exact, rtol=0, atol=2e-6)


def test_pieces_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(9, 500)
    whole = row_sums(logits)
    monkeypatch.setattr(logit_rows, "CACHE_BYTES", 2 * 500 * 4)
    parts = row_sums(logits)
    assert torch.equal(whole.peaks_RC, parts.peaks_RC)
    assert torch.equal(whole.log_total_R, parts.log_total_R)


@given(
    size=st.integers(1, 2000),
    top_k=st.integers(1, 40),
    levels=st.sampled_from([1, 3, 50, 10**6]),
    seed=st.integers(0, 1000),
)
def test_best_is_topk(size: int, top_k: int, levels: int, seed: int) -> None:
    """With many ties too: then the values are the same, and the ids have them."""
    logits = (logits_of(3, size, seed=seed) * levels).round() / levels
    top_k = min(top_k, size)
    values, ids = best(logits, row_sums(logits).peaks_RC, top_k)
    assert torch.equal(values, logits.topk(top_k, dim=-1).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_the_short_way_to_the_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large vocabularies are not sorted through whole."""
    widths = []
    plain = torch.Tensor.topk

    def watched(logits: torch.Tensor, *arguments: object, **options: object) -> object:
        widths.append(logits.shape[1])
        return plain(logits, *arguments, **options)  # type: ignore[arg-type]

    logits = logits_of(4, 100 * BLOCK + 17)
    peaks = row_sums(logits).peaks_RC
    monkeypatch.setattr(torch.Tensor, "topk", watched)
    best(logits, peaks, 8)
    assert widths == [100, 8 * BLOCK + 17]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C compiler")
def test_the_sums_compile_to_the_same() -> None:
    compiled = torch.compile(block_sums, fullgraph=True)
    with torch.inference_mode():
        for num_rows in (6, 3):
            logits = logits_of(num_rows, 5 * BLOCK + 9)[:, : 5 * BLOCK].view(num_rows, 5, BLOCK)
            logits[0, 2] = -torch.inf
            for plain, fused in zip(block_sums(logits), compiled(logits), strict=True):
                torch.testing.assert_close(fused, plain, rtol=1e-6, atol=2e-6)


def test_what_cannot_be_compiled_runs_plainly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> object:
        raise FileNotFoundError("no C compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, **_: no_compiler)
    run = logit_rows._fused.__wrapped__()
    logits = logits_of(2, 3 * BLOCK).view(2, 3, BLOCK)
    for _ in range(2):
        assert torch.equal(run(logits)[1], block_sums(logits)[1])
    [record] = caplog.records
    assert record.getMessage() == "log-sum-exp could not be compiled and is slower: no C compiler"


def test_memory_that_runs_out_is_no_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(torch, "compile", lambda function, **_: full)
    run = logit_rows._fused.__wrapped__()
    with pytest.raises(torch.OutOfMemoryError):
        run(logits_of(2, BLOCK).view(2, 1, BLOCK))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same() -> None:
    logits = logits_of(70, 128_256 + 3)
    exact, found = row_sums(logits), row_sums(logits.cuda())
    torch.testing.assert_close(found.log_total_R.cpu(), exact.log_total_R, rtol=0, atol=5e-6)
    values, ids = best(logits.cuda(), found.peaks_RC, 64)
    assert torch.equal(values.cpu(), logits.topk(64).values)
    assert torch.equal(logits.gather(1, ids.cpu()), values.cpu())
