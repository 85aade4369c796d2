"""Rows as the store keeps them: what rounding leaves is mended, what is impossible is refused."""

from __future__ import annotations

import numpy as np
import pytest

from extract.engines.protocol import DenseRows
from extract.scoring.rows import LOGPROB_SLACK, scored_segment
from store_schema.errors import ModelError


def rows(logprob: float = -1.0, label: float = -1.0) -> DenseRows:
    """Two rows of two entries; the last one's first entry and label are given."""
    logprobs = np.array([[-1.0, -2.0], [logprob, -3.0]], np.float32)
    ids = np.array([[1, 2], [3, 4]])
    return DenseRows(ids, logprobs, np.array([-1.0, label], np.float32))


def test_what_rounding_leaves_above_0_is_0() -> None:
    above = LOGPROB_SLACK / 2
    scored = scored_segment(rows(above, above), 3, vocab_size=9, where="s")
    assert scored.entry_logprobs.tolist() == [-1, -2, 0, -3]
    assert scored.label_logprobs[1:].tolist() == [-1, 0]
    assert scored.tail_mass[2] == 0


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (rows(logprob=2 * LOGPROB_SLACK), "log-probability above 0 in s, position 2"),
        (rows(label=2 * LOGPROB_SLACK), "log-probability above 0 in s, position 2"),
        (rows(logprob=np.nan), "NaN from the model in s, position 2"),
        (rows(label=-np.inf), "probability 0 to a token of the text in s, position 2"),
        (rows(label=np.nan), "NaN from the model in s, position 2"),
    ],
)
def test_what_cannot_be_is_refused(dense: DenseRows, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        scored_segment(dense, 3, vocab_size=9, where="s")
