"""NLL of text against the model's own logits, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fuse_train.loop import likelihood
from fuse_train.loop.likelihood import SegmentNll, label_nats, row_nats, score_dtype, segment_nll_of
from fuse_train.losses import head_pass
from fuse_train.model.heads import Head
from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer


def segment_nll(model: Any, encoded: Sequence[EncodedSegment], **options: Any) -> list[SegmentNll]:
    """Sums of each segment."""
    rows = row_nats(model, encoded, **options)
    return [segment_nll_of(segment, nats) for segment, nats in zip(encoded, rows, strict=True)]


def encoded_by(folder, sample_texts) -> list[EncodedSegment]:
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(folder)), name="model")
    texts = [text for texts in sample_texts.values() for text in texts]
    context = '{"prompt": "Say it: "}'
    segments = [
        Segment(i, f"d{i}#0", f"d{i}", "x", "test", 0, 0, True, context if i == 2 else None, text)
        for i, text in enumerate(texts)
    ]
    return tokenizer.encode(segments)


def test_a_cpu_with_bfloat16_uses_it(monkeypatch) -> None:
    hidden_RH = torch.zeros(1, 4)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(head_pass, "cpu_multiplies_bfloat16", lambda has=has: has)
        assert score_dtype(hidden_RH.bfloat16()) == dtype
        assert score_dtype(hidden_RH) == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert score_dtype(hidden_RH) == dtype


@pytest.mark.parametrize("name", ["code", "prose", "facts", "target"])
def test_rows_equal_plain_logits(tiny_models, sample_texts, name) -> None:
    """The position convention: row i is scored by the logits of the token before it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[name])
    encoded = encoded_by(tiny_models[name], sample_texts)
    rows = row_nats(model, encoded, batch_segments=3, head_chunk_rows=50)
    sums = segment_nll(model, encoded)
    for segment, nats, total in zip(encoded, rows, sums, strict=True):
        ids = torch.tensor([segment.input_ids])
        with torch.no_grad():
            logq = model(ids).logits[0].double().log_softmax(-1)
        context = len(segment.context_ids)
        for i, token in enumerate(segment.token_ids.tolist()):
            if context + i == 0:
                assert np.isnan(nats[i])
            else:
                assert nats[i] == pytest.approx(-logq[context + i - 1, token].item(), abs=2e-4)
        first = 0 if context else 1
        assert total.num_rows == len(segment.token_ids) - first
        skipped = int(segment.byte_ends[0]) if first else 0
        assert total.num_bytes == int(segment.byte_ends[-1]) - skipped
        assert total.nats == pytest.approx(np.nansum(nats), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7])
def test_slices_of_the_head_add_up(monkeypatch, dtype, chunk_rows) -> None:
    monkeypatch.setattr(head_pass, "cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(
        likelihood, "CHUNK_BYTES_CPU", 4 * 7 * 32
    )  # several slices, the last uneven
    g = torch.Generator().manual_seed(3)
    hidden_RH = torch.randn(19, 8, generator=g).to(dtype)
    weight_VH = torch.randn(101, 8, generator=g).to(dtype)
    bias_V = torch.randn(101, generator=g).to(dtype)
    labels_R = torch.randint(101, (19,), generator=g)
    labels_R[:2] = torch.tensor([0, 100])
    for head in (Head(weight_VH), Head(weight_VH, bias_V, scale=0.5, softcap=3.0)):
        got = label_nats(hidden_RH, head, labels_R, chunk_rows)
        exact = Head(weight_VH.double(), bias_V.double(), head.scale, head.softcap)
        if head.bias_V is None:
            exact = Head(weight_VH.double())
        logits = exact.logits(hidden_RH.double())
        expected = torch.nn.functional.cross_entropy(logits, labels_R, reduction="none")
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_a_half_precision_head_is_never_copied_whole(monkeypatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_BYTES_CPU", 1 << 16)
    sizes = []
    plain = Head.part

    def noted(self: Head, ids: slice, dtype: torch.dtype) -> Head:
        part = plain(self, ids, dtype)
        sizes.append(len(part.weight_VH))
        return part

    monkeypatch.setattr(Head, "part", noted)
    weight_VH = torch.randn(5_000, 4, dtype=torch.bfloat16)
    labels_R = torch.arange(600)
    label_nats(torch.randn(600, 4, dtype=torch.bfloat16), Head(weight_VH), labels_R)
    assert sum(sizes) == 5_000
    assert max(sizes) <= (1 << 16) // (4 * 600)


def test_logits_of_an_unknown_head_exist_for_one_segment(
    tiny_models, sample_texts, monkeypatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["code"])
    encoded = encoded_by(tiny_models["code"], sample_texts)
    expected = segment_nll(model, encoded)
    monkeypatch.setattr(likelihood, "_head_known", lambda _: False)
    plain, batches = model.forward, []

    def noted(*args, **kwargs):
        batches.append(len(kwargs["input_ids"]))
        return plain(*args, **kwargs)

    model.forward = noted
    got = segment_nll(model, encoded, batch_segments=16)
    assert batches == [1] * len(encoded)
    assert [n.nats for n in got] == pytest.approx([n.nats for n in expected], rel=1e-5)


def test_batches_and_chunks_do_not_matter(tiny_models, sample_texts) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["target"])
    encoded = encoded_by(tiny_models["target"], sample_texts)
    whole = [nll.nats for nll in segment_nll(model, encoded, batch_segments=100)]
    parts = [nll.nats for nll in segment_nll(model, encoded, batch_segments=1, head_chunk_rows=3)]
    assert parts == pytest.approx(whole, rel=1e-5)
    assert not segment_nll(model, [])


def test_model_with_an_unknown_head_is_scored_by_its_own_logits(tiny_models, sample_texts) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["code"])
    encoded = encoded_by(tiny_models["code"], sample_texts)[:2]
    plain = model.forward

    def halved(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    before = segment_nll(model, encoded)
    model.forward = halved
    after = segment_nll(model, encoded)
    ids = torch.tensor([encoded[0].input_ids])
    expected = torch.nn.functional.cross_entropy(
        halved(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
    )
    assert after[0].nats == pytest.approx(expected.item(), rel=1e-5)
    assert after[0].nats != pytest.approx(before[0].nats, rel=1e-3)


def test_what_a_model_cannot_take_is_refused(tiny_models, sample_texts) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["code"])
    encoded = encoded_by(tiny_models["code"], sample_texts)
    ids = np.full(600, 5, np.uint32)
    long = EncodedSegment((), ids, np.arange(1, 601, dtype=np.uint32))
    with pytest.raises(ModelError, match="longer than the model"):
        segment_nll(model, [long])
    foreign = EncodedSegment((), np.array([1, 10_000], np.uint32), np.array([1, 2], np.uint32))
    with pytest.raises(ModelError, match="id the model does not have"):
        segment_nll(model, [foreign])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        segment_nll(model, encoded[:1])


@pytest.mark.parametrize(("count", "passes"), [(0, 3), (2, 3), (4, 2)])
def test_processes_agree_on_passes_before_the_first_one(
    tiny_models, sample_texts, monkeypatch, count, passes
) -> None:
    """A collective between passes would meet the gathering of another process's next pass."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models["target"])
    monkeypatch.setattr(likelihood, "_head_known", lambda model: True)  # is found by passes, too
    events: list[str] = []
    model.model.register_forward_pre_hook(lambda *_: events.append("pass"))

    def most(made: int) -> int:
        events.append(f"{made} made")
        return passes

    encoded = encoded_by(tiny_models["target"], sample_texts)[:count]
    rows = row_nats(model, encoded, batch_segments=2, most=most)
    assert len(rows) == count
    assert events == [f"{count // 2} made", *["pass"] * passes]
