"""The rank table of a store: what is counted, the order, and the file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from store_schema.encoding import frequency
from store_schema.encoding.frequency import (
    ids_by_rank,
    rank_by_id,
    ranking_bytes,
    ranking_fingerprint,
    ranking_from_bytes,
    token_counts,
)
from store_schema.errors import CorruptionError

SHARDS = [[[1, 1, 2], [3]], [[2, 2]], [[4] * 9]]


@pytest.mark.parametrize(
    ("enough", "counts"),
    [(6, [0, 2, 3, 1, 0, 0]), (4, [0, 2, 1, 1, 0, 0]), (7, [0, 2, 3, 1, 9, 0])],
)
def test_whole_shards_are_counted_until_it_is_enough(
    enough: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frequency, "COUNTED_TOKENS", enough)
    plan: Any = SimpleNamespace(shards=range(len(SHARDS)), segments=SHARDS.__getitem__)
    tokenizer: Any = SimpleNamespace(
        vocab_size=6,
        encode=lambda segments: [SimpleNamespace(token_ids=np.array(ids)) for ids in segments],
    )
    assert token_counts(plan, tokenizer).tolist() == counts


def test_frequent_ids_come_first_and_equal_ones_by_id() -> None:
    ranking = ids_by_rank(np.array([0, 5, 2, 5, 0]))
    assert ranking.tolist() == [1, 3, 2, 0, 4]
    ranks = rank_by_id(ranking)
    assert ranks.tolist() == [3, 0, 2, 1, 4]
    assert ranking.dtype == ranks.dtype == np.uint32


RANKING = ids_by_rank(np.arange(300) % 7)
DATA, SIZE = ranking_bytes(RANKING), 4 * len(RANKING)


def read(
    data: bytes = DATA, expected: str = ranking_fingerprint(RANKING), vocab_size: int = 300
) -> np.ndarray:
    return ranking_from_bytes(data, vocab_size=vocab_size, expected=expected, where="store s")


def test_the_manifests_table_is_read() -> None:
    np.testing.assert_array_equal(read(), RANKING)


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": ranking_bytes(RANKING[::-1])},
        {"data": b"\x93NUMPZ" + DATA[6:]},  # the values are right
        {"data": DATA[-SIZE:]},
        {"data": DATA[:-1]},
        {"data": DATA + b"\0"},
        {"data": b""},
        {"expected": ranking_fingerprint(RANKING[::-1])},
        {"vocab_size": 299},
        {"vocab_size": 301},
    ],
)
def test_no_other_table_is_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError, match="rank table is not the manifest's"):
        read(**wrong)
