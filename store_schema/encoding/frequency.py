"""The rank table of a store: token ids from frequent to rare, so that common tokens are small numbers.

Tokens are counted in the plan's text, which every worker has before anything is scored. Ids that do not
occur follow in order of id, which for most tokenizers is from frequent to rare too. A store has the
table once, as `ids_by_rank.npy`.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from store_schema.errors import CorruptionError
from store_schema.fingerprint import bytes_digest
from store_schema.plan.plan import Plan
from store_schema.text.tokenizer import SegmentTokenizer

COUNTED_TOKENS = 1_000_000
"""Enough to order the common ids, at a second or two of tokenising."""

Ranking = npt.NDArray[np.uint32]


def token_counts(plan: Plan, tokenizer: SegmentTokenizer) -> npt.NDArray[np.int64]:
    """[V] how often each id occurs in the plan's first shards, `COUNTED_TOKENS` or a little more."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for shard in plan.shards:
        for segment in tokenizer.encode(plan.segments(shard)):
            counts += np.bincount(segment.token_ids, minlength=len(counts))
        if counts.sum() >= COUNTED_TOKENS:
            break
    return counts


def ids_by_rank(counts: npt.NDArray[np.int64]) -> Ranking:
    """[V] ids, most frequent first, ties by id."""
    return np.argsort(-counts, kind="stable").astype(np.uint32)


def rank_by_id(ranking: Ranking) -> Ranking:
    """[V] rank of each id."""
    ranks = np.empty_like(ranking)
    ranks[ranking] = np.arange(len(ranking), dtype=np.uint32)
    return ranks


def ranking_bytes(ranking: Ranking) -> bytes:
    """The table as a .npy file."""
    sink = io.BytesIO()
    np.save(sink, ranking.astype("<u4"), allow_pickle=False)
    return sink.getvalue()


def ranking_fingerprint(ranking: Ranking) -> str:
    """Fingerprint of the table, for the manifest."""
    return bytes_digest(ranking.astype("<u4").tobytes())[:32]


def ranking_from_bytes(data: bytes, *, vocab_size: int, expected: str, where: str) -> Ranking:
    """Parse what `ranking_bytes` wrote.

    Raises:
        CorruptionError: Not the manifest's table.
    """
    # The size is known, so the file's own header is not used to allocate memory.
    body = data[-4 * vocab_size :]
    ranking = np.frombuffer(body, "<u4") if len(body) == 4 * vocab_size else np.empty(0, "<u4")
    got = ranking_fingerprint(ranking)
    if ranking_bytes(ranking) != data or got != expected:
        raise CorruptionError(
            "rank table is not the manifest's",
            where=where,
            expected=expected,
            got=got,
            hint="restore the file from a copy of the store",
        )
    return ranking
