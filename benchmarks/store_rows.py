"""Real distributions for `bench-store`: the benchmark's model over text it has not seen.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.store_model import BenchModel
from store_schema.encoding.frequency import COUNTED_TOKENS, Ranking, ids_by_rank
from store_schema.encoding.trial import half_learned

ROW_TOKENS = 256

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BenchRows:
    """Full distributions.

    Args:
        logprobs_RV: Nats.
        labels_R: The tokens that stand there.
        counts_V: How often ids stand in the text, for ranks and for the student.
        byte_ends_R: End of each token in the bytes of all rows' text.
    """

    logprobs_RV: Array
    labels_R: npt.NDArray[np.int64]
    counts_V: npt.NDArray[np.int64]
    byte_ends_R: npt.NDArray[np.uint32]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logprobs_RV.shape[1]

    @property
    def ranking(self) -> Ranking:
        """[V] ids by frequency."""
        return ids_by_rank(self.counts_V)

    @property
    def entropy_nats(self) -> float:
        """Mean entropy of a row."""
        parts = np.array_split(self.logprobs_RV, max(1, len(self.logprobs_RV) // 64))
        return -sum(float((np.exp(p) * p).sum(dtype=np.float64)) for p in parts) / len(
            self.logprobs_RV
        )

    def halves(self) -> tuple[BenchRows, BenchRows]:
        """Rows to choose on and rows to report on: alternate segments."""
        segment = np.arange(len(self.labels_R)) // (ROW_TOKENS - 1)
        return self._take(segment % 2 == 0), self._take(segment % 2 == 1)

    def _take(self, rows: npt.NDArray[np.bool_]) -> BenchRows:
        sizes = np.diff(self.byte_ends_R, prepend=0)[rows]
        ends = np.cumsum(sizes).astype(np.uint32)
        return BenchRows(self.logprobs_RV[rows], self.labels_R[rows], self.counts_V, ends)

    def first(self, count: int) -> BenchRows:
        """The first rows."""
        return self._take(np.arange(len(self.labels_R)) < count)

    def with_logprobs(
        self, logprobs_RV: Array, counts_V: npt.NDArray[np.int64] | None = None
    ) -> BenchRows:
        """The same text with other distributions."""
        counts_V = self.counts_V if counts_V is None else counts_V
        return BenchRows(logprobs_RV, self.labels_R, counts_V, self.byte_ends_R)

    def student(self) -> Array:
        """A model that has still to learn."""
        return half_learned(self.logprobs_RV, self.counts_V)

    def sharpened(self, entropy_nats: float) -> BenchRows:
        """The same rows at the temperature that gives this mean entropy."""
        low, high = 0.2, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            found = self._at(middle)
            low, high = (low, middle) if found.entropy_nats > entropy_nats else (middle, high)
        return found

    def _at(self, temperature: float) -> BenchRows:
        return self.with_logprobs(normalised(self.logprobs_RV / np.float32(temperature)))

    def extended(self, times: int, seed: int = 0) -> BenchRows:
        """A vocabulary `times` as large: every id gets rarer cousins, as larger tables have.

        A cousin's log-probability is its elder's less 1 to 7 nats of its own (fixed for the cousin:
        it is a rarer word) and less or more by a normal number of half a nat (the context).
        """
        rng = np.random.default_rng(seed)
        wide, counts = [self.logprobs_RV], [self.counts_V]
        for _ in range(times - 1):
            rarer_V = rng.uniform(1, 7, self.vocab_size).astype(np.float32)
            noise = rng.normal(0, 0.5, self.logprobs_RV.shape).astype(np.float32)
            wide.append(self.logprobs_RV - rarer_V + noise)
            counts.append((self.counts_V * np.exp(-rarer_V)).astype(np.int64))
        together = np.concatenate(wide, 1)
        return self.with_logprobs(normalised(together), np.concatenate(counts))


def normalised(logits_RV: Array) -> Array:
    """Log-softmax, summed in float64."""
    top = logits_RV.max(axis=1, keepdims=True)
    total = np.exp(logits_RV - top).sum(axis=1, keepdims=True, dtype=np.float64)
    return logits_RV - (np.log(total) + top).astype(np.float32)


def text_tokens(made: BenchModel) -> npt.NDArray[np.int64]:
    """All held-out text, one token after the other."""
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    texts = [document.text for document in made.documents]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return np.concatenate([np.asarray(ids, np.int64) for ids in encoded.input_ids])


def token_counts(made: BenchModel) -> npt.NDArray[np.int64]:
    """[V] counts over other text of the same kind, as much as a store counts of its plan."""
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    counts = np.zeros(made.vocab_size, np.int64)
    for document in made.other_documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        counts += np.bincount(np.asarray(ids, np.int64), minlength=made.vocab_size)
        if counts.sum() >= COUNTED_TOKENS:
            break
    return counts


@torch.inference_mode()
def real_rows(made: BenchModel, num_rows: int) -> BenchRows:
    """Rows spread evenly over the held-out text.

    Args:
        made: The model.
        num_rows: About how many.
    """
    tokens = text_tokens(made)
    segments = tokens[: len(tokens) // ROW_TOKENS * ROW_TOKENS].reshape(-1, ROW_TOKENS)
    wanted = max(2, num_rows // (ROW_TOKENS - 1))
    picked = np.linspace(0, len(segments) - 1, min(wanted, len(segments))).astype(int)
    model = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    found = []
    for part in np.array_split(segments[picked], max(1, len(picked) // 4)):
        logits = model(torch.from_numpy(part)).logits[:, :-1].float()
        found.append(torch.log_softmax(logits, -1).flatten(0, 1).numpy())
    labels = segments[picked][:, 1:].ravel()
    # Every character of a byte-level token stands for one byte.
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(labels.tolist())]
    ends = np.cumsum(sizes).astype(np.uint32)
    return BenchRows(np.concatenate(found), labels, token_counts(made), ends)
