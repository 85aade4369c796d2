"""Pairs of a source and a target that `make bench-align-oracle` looks at: small ones made on the spot,
and the published models of `make real`.

A small source is trained on all four kinds of text at once. Its rows are the model's own, as a source
store holds them: the `TOP_K` most probable entries, the label always among them.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.align_pairs import cjk_text, library_texts
from first_run.demo.facts import fact_documents
from first_run.demo.make import publish
from first_run.demo.text import Document, SplitSizes, rank
from fuse_train.model.models import load_model
from store_schema.config import ModelRef
from store_schema.layout import Arrays
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer

DOMAINS = ("digits", "code", "prose", "cjk")
TOP_K = 32
TRAINED_BYTES, COUNTED_BYTES = 500_000, 300_000
"""Of each kind of text: to train small models and tokenizers on; to count continuations on."""
STEPS = 500
SOURCE_IDS, TARGET_IDS = 1_792, 2_048
SEGMENT_BYTES = 360


@dataclass(frozen=True, slots=True)
class OraclePair:
    """A pair, ready to be asked.

    Args:
        source: Tokenizer.
        target: Tokenizer.
        model: The source, in float32.
    """

    source: SegmentTokenizer
    target: SegmentTokenizer
    model: Any


def texts_of(domain: str, *, held_out: bool) -> list[str]:
    """Text of one kind.

    Args:
        domain: One of `DOMAINS`.
        held_out: Text that no small model was trained on.
    """
    size = COUNTED_BYTES // 4 if held_out else TRAINED_BYTES
    if domain == "cjk":
        text = cjk_text(size, 1 + held_out)
        return [text[at : at + 400] for at in range(0, len(text), 400)]
    if domain != "digits":
        return library_texts(domain, size, held_out=held_out)
    documents = fact_documents(SplitSizes(train=0, valid=0, test=COUNTED_BYTES // 4), seed=0)
    wanted = "test" if held_out else "models"
    chosen = sorted((d for d in documents if d.split == wanted), key=lambda d: rank(1, d.id))
    return [d.text for d in chosen]


def mixed_texts(size: int) -> list[str]:
    """Text of all kinds, about so many bytes of each, that models may be trained on."""
    found = []
    for domain in DOMAINS:
        taken = 0
        for text in texts_of(domain, held_out=False):
            if taken < size:
                found.append(text)
                taken += len(text.encode())
    return found


def segments_of(domain: str, number: int) -> list[str]:
    """Held-out pieces of about `SEGMENT_BYTES`, whole lines from a line's beginning."""
    found = []
    for text in texts_of(domain, held_out=True):
        lines, size = [], 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line.encode())
            if size >= SEGMENT_BYTES:
                break
        piece = "".join(lines).strip("\n")
        if SEGMENT_BYTES // 3 <= len(piece.encode()) <= 3 * SEGMENT_BYTES:
            found.append(piece)
        if len(found) == number:
            break
    return found


# ---- small pairs ------------------------------------------------------------------------------------

RULES = {"demo": ("unigram", "target"), "digits": ("prose", "code")}
"""How each side splits text: names of rules in `first_run.demo.tokenizers`, as in align_student.py."""


def small_pair(name: str, folder: Path, *, steps: int = STEPS) -> OraclePair:
    """A pair of `RULES`, made in the folder or taken from there."""
    source_rule, target_rule = RULES[name]
    target = _made(folder / f"{name}-target", lambda: _tokenizer(target_rule, TARGET_IDS), None)
    source = _made(
        folder / f"{name}-source-{steps}", lambda: _tokenizer(source_rule, SOURCE_IDS), steps
    )
    return OraclePair(
        _segment_tokenizer(source, "source"), _segment_tokenizer(target, "target"), _model(source)
    )


def _tokenizer(rule: str, vocab_size: int) -> Any:
    from first_run.demo.tokenizers import train_byte_level_bpe, train_unigram

    texts = mixed_texts(TRAINED_BYTES)
    if rule == "unigram":
        return train_unigram(texts, vocab_size, "</s>")
    return train_byte_level_bpe(rule, texts, vocab_size, "<|bos|>", True, "<|eos|>")


def _made(folder: Path, tokenizer: Callable[[], Any], steps: int | None) -> Path:
    """A folder with a tokenizer and, with `steps`, a model trained so long."""
    if not folder.is_dir():
        publish(folder, partial(_make, tokenizer, steps))
    return folder


def _make(tokenizer: Callable[[], Any], steps: int | None, path: Path) -> None:
    from first_run.demo.training import Recipe, build_model, packed_rows, train
    from fuse_train.machine.allocator import keep_freed_memory

    made = tokenizer()
    made.save_pretrained(path)
    if steps is None:
        return
    keep_freed_memory()
    torch.manual_seed(0)
    recipe = Recipe("llama", 192, 3, steps, 8, 6e-3)
    model = build_model(recipe, made)
    documents = [
        Document(str(i), text, "", "models") for i, text in enumerate(mixed_texts(TRAINED_BYTES))
    ]
    train(model, packed_rows(documents, made, steps * recipe.batch_rows, 0), recipe, path.name)
    model.save_pretrained(path)


def _segment_tokenizer(folder: Path, name: str) -> SegmentTokenizer:
    return SegmentTokenizer.load(ModelRef(model=str(folder)), name=name)


def _model(folder: Path) -> Any:
    return load_model(ModelRef(model=str(folder)), where="source", dtype=torch.float32).eval()


# ---- published pairs --------------------------------------------------------------------------------

PUBLISHED = {
    "qwen-smollm2": ("qwen", "target"),
    "gemma-smollm2": ("gemma", "target"),
    "smollm2-qwen": ("target", "qwen"),
}
"""File names of examples/make_real.py."""


def published_pair(name: str, models: Path) -> OraclePair:
    """A pair of `PUBLISHED`; the models are there already (`make_real.py --models-only`)."""
    source, target = (models / f"{one}.gguf" for one in PUBLISHED[name])
    return OraclePair(
        _segment_tokenizer(source, "source"), _segment_tokenizer(target, "target"), _model(source)
    )


# ---- rows -------------------------------------------------------------------------------------------


def model_rows(model: Any, encoded: Sequence[EncodedSegment], top_k: int = TOP_K) -> Arrays:
    """Arrays of a source store of these segments, without rounding.

    Args:
        model: The source.
        encoded: Segments as the source reads them.
        top_k: Entries of a row.
    """
    ids: list[npt.NDArray[np.int64]] = []
    logprobs: list[npt.NDArray[np.float64]] = []
    labels: list[float] = []
    for one in encoded:
        rows_NV = _log_rows(model, one)
        missing = len(one.token_ids) - len(rows_NV)
        ids += [np.empty(0, np.int64)] * missing
        logprobs += [np.empty(0)] * missing
        labels += [np.nan] * missing
        for label, row_V in zip(one.token_ids.tolist()[missing:], rows_NV, strict=True):
            top = np.argsort(-row_V, kind="stable")[:top_k]
            if label not in top:
                top[-1] = label
                top = top[np.argsort(-row_V[top], kind="stable")]
            ids.append(top)
            logprobs.append(row_V[top])
            labels.append(float(row_V[label]))
    counts = np.array([len(e.token_ids) for e in encoded])
    tails = [1.0 - float(np.exp(row).sum()) for row in logprobs]
    return {
        "segment_ids": np.arange(len(encoded), dtype="<i8"),
        "token_offsets": np.concatenate(([0], np.cumsum(counts))).astype("<i8"),
        "token_ids": np.concatenate([e.token_ids for e in encoded]).astype("<u4"),
        "byte_ends": np.concatenate([e.byte_ends for e in encoded]).astype("<u4"),
        "entry_offsets": np.concatenate(([0], np.cumsum(list(map(len, ids))))).astype("<i8"),
        "entry_ids": np.concatenate(ids).astype("<u4"),
        "entry_logprobs": np.minimum(np.concatenate(logprobs), 0).astype("<f4"),
        "tail_mass": np.clip(tails, 0, 1).astype("<f4"),
        "label_logprobs": np.minimum(labels, 0).astype("<f4"),
    }


def _log_rows(model: Any, encoded: EncodedSegment) -> npt.NDArray[np.float64]:
    """[tokens, V] log-probabilities; without the first token where nothing stands before it."""
    context = list(encoded.context_ids)
    ids = torch.tensor([[*context, *encoded.token_ids.tolist()]])
    with torch.inference_mode():
        logits = model(ids).logits[0, max(len(context) - 1, 0) : -1]
    found: npt.NDArray[np.float64] = logits.double().log_softmax(-1).numpy()
    return found
