"""What every engine must do, checked against a plain transformers forward in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from extract.config import ExtractSection
from extract.engines.protocol import Engine, EngineSpec, engine_spec, first_known
from extract.scoring.rows import scored_segment
from store_schema.config import ModelRef
from store_schema.model.causal_model import keep_soft_cap
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.tiny import SAMPLE_TEXTS

TOLERANCE_NATS = 1e-4
LONGEST = 128
Reference = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def spec_of(folder: Path, engine: str, *, dtype: str = "auto", **options: Any) -> EngineSpec:
    """What an engine needs to score the samples with a tiny model."""
    ref = ModelRef(model=str(folder), dtype=dtype)
    section = ExtractSection(engine=engine, **({"top_k": 8} | options))
    tokenizer = SegmentTokenizer.load(ref, name="m")
    return engine_spec(
        "m",
        folder,
        ref,
        section,
        vocab_size=tokenizer.vocab_size,
        longest=LONGEST,
        seed=0,
    )


def encoded_samples(tokenizer: SegmentTokenizer) -> list[EncodedSegment]:
    """Samples of different lengths: one token, a prompt, and LONGEST tokens with the context."""
    texts = [text for texts in SAMPLE_TEXTS.values() for text in texts]
    room = LONGEST - 12
    segments = []
    for i, text in enumerate(["a", *texts, "".join(texts)]):
        context = '{"prompt": "Say: "}' if i == 2 else None
        segments.append(Segment(i, f"{i}#0", str(i), "d", "train", 0, 1, True, context, text))
    encoded = tokenizer.encode(segments)
    cut = [EncodedSegment(e.context_ids, e.token_ids[:room], e.byte_ends[:room]) for e in encoded]
    last = encoded[-1]
    full = LONGEST - len(last.context_ids)
    cut[-1] = EncodedSegment(last.context_ids, last.token_ids[:full], last.byte_ends[:full])
    assert len(cut[-1].input_ids) == LONGEST
    return cut


def as_chats(texts: list[EncodedSegment], turns: int) -> list[EncodedSegment]:
    """The same texts as turns of chats: what was read before stands before the next."""
    found: list[EncodedSegment] = []
    for i, text in enumerate(texts):
        before = (*found[-1].input_ids, 7, 8) if i % turns else (5,)
        found.append(EncodedSegment(before, text.token_ids, text.byte_ends))
    return found


def short_chats(tokenizer: SegmentTokenizer, turns: int = 3) -> list[EncodedSegment]:
    """Chats of short turns that fit the models, out of the samples; the last text's turns first."""
    short = [
        EncodedSegment((), text.token_ids[:20], text.byte_ends[:20])
        for text in reversed(encoded_samples(tokenizer))
    ]
    return as_chats(short, turns)


def reference_logprobs(folder: Path, segments: list[EncodedSegment]) -> list[Reference]:
    """Of each segment the label's and all log-probabilities at each row that has something before.

    The only shift: logits at input i - 1 say what stands at input i.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    keep_soft_cap(model)
    found = []
    with torch.inference_mode():
        for segment in segments:
            ids = torch.tensor([segment.input_ids])
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
            first = len(segment.context_ids) + first_known(segment)
            rows = logprobs[first - 1 : -1]
            labels = rows.gather(1, ids[0, first:, None])[:, 0]
            found.append((labels.numpy(), rows.numpy()))
    return found


def check_engine(
    engine: Engine, spec: EngineSpec, references: list[Reference] | None = None
) -> None:
    """Score the samples and compare rows, labels and tails with the reference.

    Args:
        engine: Loaded with `spec`.
        spec: From `spec_of`.
        references: From `reference_logprobs`; None computes them here.
    """
    tokenizer = SegmentTokenizer.load(spec.ref, name="m")
    segments = encoded_samples(tokenizer)
    references = references or reference_logprobs(spec.folder, segments)
    rows = dict(engine.score(segments))
    assert sorted(rows) == list(range(len(segments)))
    again = dict(engine.score(segments))
    for i, (segment, (labels, logprobs)) in enumerate(zip(segments, references, strict=True)):
        for name in ("ids", "logprobs", "label_logprobs"):
            assert np.array_equal(getattr(rows[i], name), getattr(again[i], name)), name
        assert rows[i].ids.shape == (len(labels), spec.section.top_k)
        np.testing.assert_allclose(rows[i].label_logprobs, labels, atol=TOLERANCE_NATS)
        chosen = np.take_along_axis(logprobs, rows[i].ids, axis=1)
        np.testing.assert_allclose(rows[i].logprobs, chosen, atol=TOLERANCE_NATS)
        best = -np.sort(-logprobs, axis=1)[:, : spec.section.top_k]
        np.testing.assert_allclose(-np.sort(-chosen, axis=1), best, atol=TOLERANCE_NATS)
        _check_stored(segment, rows[i], logprobs, tokenizer.vocab_size)


def _check_stored(
    segment: EncodedSegment, dense: Any, logprobs: npt.NDArray[np.float64], vocab_size: int
) -> None:
    num_positions = len(segment.token_ids)
    row = scored_segment(dense, num_positions, vocab_size=vocab_size, where="sample")
    first = first_known(segment)
    assert len(row.counts) == num_positions
    assert (row.counts[:first] == 0).all()
    assert (row.tail_mass[:first] == 1).all()
    ends = np.cumsum(row.counts)
    for i in range(first, num_positions):
        ids = row.entry_ids[ends[i] - row.counts[i] : ends[i]]
        assert (ids < vocab_size).all()
        tail = 1 - np.exp(logprobs[i - first][ids]).sum()
        assert abs(row.tail_mass[i] - tail) < TOLERANCE_NATS
