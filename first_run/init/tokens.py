"""How many tokens each model will read: the sample's documents cut as `extract plan` cuts them, times
the rows of the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from extract.config import PlanSection
from extract.corpus.sample import Sample, first_documents
from extract.estimate.costs import BYTES_PER_TOKEN
from extract.estimate.data import DataFacts
from extract.plan.cutting import CutCorpus, cut_corpus
from first_run.init.tokenizers import TARGET, TokenizerFacts
from store_schema.text.tokenizer import SegmentTokenizer

MOST_DOCUMENTS = 200
"""Documents of an input that are tokenised."""
_FEW = 0.01
"""Share of documents whose context may be too long for a segment before longer segments are tried."""


@dataclass(frozen=True, slots=True)
class TokenEstimate:
    """Tokens of the whole data.

    Args:
        positions: Tokens of text, by model.
        read: The same with contexts.
        train: Tokens that the target reads in one pass over the training split.
        max_tokens: `plan.max_tokens` for which nearly all contexts fit.
        measured: Models whose own tokenizer was used; others are taken at 4 bytes a token.
        documents: Documents that were tokenised.
        dropped: Those that cannot be used, by reason.
        unwritten: Parts of chats that a model's template leaves out, by model and kind.
    """

    positions: dict[str, float]
    read: dict[str, float]
    train: float
    max_tokens: int
    measured: tuple[str, ...]
    documents: int
    dropped: dict[str, int]
    unwritten: dict[str, dict[str, int]]


def estimate_tokens(
    data: Sequence[DataFacts],
    samples: Sequence[Sample],
    tokenizers: Mapping[str, TokenizerFacts],
    contexts: Sequence[int],
) -> TokenEstimate:
    """Tokenise the sample with every model and scale it to the whole data.

    Args:
        data: The inputs.
        samples: Their first rows.
        tokenizers: Of all models, by name; a model that cannot render chats is not asked about them.
        contexts: Tokens that the models can read, where known.
    """
    chats = any(facts.has_chats for facts in data)
    usable: dict[str, SegmentTokenizer] = {
        name: facts.tokenizer
        for name, facts in tokenizers.items()
        if facts.tokenizer is not None and (facts.has_template or not chats)
    }
    compose = any(facts.composes for facts in tokenizers.values())
    tables = [first_documents(sample, MOST_DOCUMENTS, compose=compose) for sample in samples]
    weights = np.concatenate(
        [
            np.full(len(table), facts.scale * facts.documents / len(table))
            for facts, table in zip(data, tables, strict=True)
        ]
    )
    table = pa.concat_tables(tables)
    limit = min(contexts, default=1 << 20)
    cut, max_tokens = _cut(table, usable, limit)
    total_bytes = sum(facts.text_bytes * facts.scale for facts in data)
    positions = dict.fromkeys(tokenizers, total_bytes / BYTES_PER_TOKEN)
    read = dict(positions)
    measured = tuple(usable) if cut.rows else ()
    for number, name in enumerate(measured):
        own = [sum(piece.num_tokens[number] for piece in pieces) for pieces in cut.cuts]
        positions[name] = float(np.dot(own, weights[cut.rows]))
        ratio = cut.context_tokens[name] / max(sum(own), 1)
        read[name] = positions[name] * (1 + ratio)
    train_bytes = sum(facts.text_bytes * facts.scale * facts.train_share for facts in data)
    return TokenEstimate(
        positions,
        read,
        read[TARGET] * train_bytes / max(total_bytes, 1.0),
        max_tokens,
        measured,
        len(table),
        dict(Counter(cut.dropped)),
        {name: dict(kinds) for name, kinds in cut.unwritten.items() if kinds.total()},
    )


def _cut(
    table: pa.Table, tokenizers: Mapping[str, SegmentTokenizer], limit: int
) -> tuple[CutCorpus, int]:
    """The sample's segments, and the smallest size of them that leaves nearly all contexts room."""
    size = min(PlanSection().max_tokens, limit)
    while True:
        cut = CutCorpus()
        if tokenizers:
            cut = cut_corpus(table, tokenizers, size, drop_unreadable=True)
        long = cut.dropped["context_too_long"]
        if long <= _FEW * len(table) or size >= limit or size >= 1 << 15:
            return cut, size
        size = min(2 * size, limit)
