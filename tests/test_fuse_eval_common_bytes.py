"""Every model is compared on the same bytes, whatever its tokenizer and its BOS rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse_eval.bpb import counted_segments, scored_text
from fuse_eval.common_bytes import common_boundaries, counted_from, known_boundaries
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests import store_factory
from tests.random_source import segments
from tests.tiny import tiny_tokenizer


def _encoded(ends: list[int], *, context: tuple[int, ...] = ()) -> EncodedSegment:
    ids = np.arange(100, 100 + len(ends)).astype(np.uint32)
    return EncodedSegment(context, ids, np.asarray(ends, np.uint32))


def common_starts(models: Mapping[str, Sequence[EncodedSegment]]) -> list[int]:
    return [int(offsets[0]) for offsets in common_boundaries(models)]


def test_with_context_everything_counts() -> None:
    models = {"a": [_encoded([3, 5], context=(1,))], "b": [_encoded([1, 5], context=(9, 9))]}
    assert common_starts(models) == [0]


def test_without_context_the_first_token_is_context_for_all() -> None:
    models = {"a": [_encoded([3, 5, 8])], "b": [_encoded([1, 2, 5, 8], context=(1,))]}
    assert common_starts(models) == [5]


def test_nothing_shared_leaves_the_segment_out() -> None:
    models = {"a": [_encoded([4])], "b": [_encoded([1, 4], context=(1,))]}
    assert common_starts(models) == [4]
    left = counted_from(models["b"][0], 4)
    assert len(left.token_ids) == 0
    assert left.context_ids == (1, 100, 101)


def test_rows_before_the_start_become_context() -> None:
    counted = counted_from(_encoded([3, 5, 8], context=(1,)), 5)
    assert counted.context_ids == (1, 100, 101)
    assert counted.token_ids.tolist() == [102]
    assert counted.byte_ends.tolist() == [3]
    assert counted.input_ids == _encoded([3, 5, 8], context=(1,)).input_ids


def test_zero_width_tokens() -> None:
    # SentencePiece's own space before the text takes no bytes; its cost is what follows.
    assert known_boundaries(_encoded([0, 2, 5])).tolist() == [0, 2, 5]
    without_bos = counted_from(_encoded([0, 2, 5]), 0)
    assert without_bos.context_ids == (100,)
    assert without_bos.token_ids.tolist() == [101, 102]
    with_bos = counted_from(_encoded([0, 2, 5], context=(1,)), 0)
    assert with_bos.token_ids.tolist() == [100, 101, 102]
    inside = counted_from(_encoded([2, 2, 5], context=(1,)), 2)
    assert inside.token_ids.tolist() == [101, 102]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, SegmentTokenizer]:
    made = {
        "bytes": tiny_tokenizer("byte_level", bos=True),
        "bytes without": tiny_tokenizer("byte_level", vocab_size=300),
        "pieces": tiny_tokenizer("unigram", vocab_size=420, bos=True),
        "marks without": tiny_tokenizer("metaspace_bpe", vocab_size=500),
    }
    return {name: SegmentTokenizer(t, name=name) for name, t in made.items()}


@given(text=st.text(min_size=1, max_size=40))
def test_all_models_count_the_same_bytes(
    tokenizers: dict[str, SegmentTokenizer], text: str
) -> None:
    segments = store_factory.segments([text])
    encodings = {name: t.encode(segments) for name, t in tokenizers.items()}
    start = common_starts(encodings)[0]
    size = len(text.encode())
    assert 0 <= start <= size
    for name, (encoded,) in encodings.items():
        counted = counted_from(encoded, start)
        # The model reads the same tokens, and has a distribution for every row that counts.
        assert counted.input_ids == encoded.input_ids
        assert counted.context_ids or not len(counted.token_ids)
        if len(counted.token_ids):
            table = tokenizers[name].vocabulary
            joined = b"".join(table.tokens[i] for i in counted.token_ids)
            assert joined.lstrip(b" ").endswith(text.encode()[start:].lstrip(b" "))
            assert int(counted.byte_ends[-1]) == size - start


def test_the_denominator_counts_only_bytes_that_every_model_predicts() -> None:
    """A source without BOS has no row for its first token: those bytes leave both sides."""
    texts = ["for i in range(10):\n    print(i)\n", "The quick brown fox."]
    tokenizers = {
        "with": SegmentTokenizer(tiny_tokenizer("byte_level", bos=True), name="with"),
        "without": SegmentTokenizer(tiny_tokenizer("byte_level", vocab_size=330), name="without"),
    }
    text = scored_text(segments(texts), tokenizers)
    for i, sentence in enumerate(texts):
        rows = counted_segments(text, tokenizers["without"])[i]
        first = tokenizers["without"].encode(segments(texts))[i].byte_ends[0]
        assert text.starts[i] >= first > 0
        assert text.num_bytes[i] == len(sentence.encode()) - text.starts[i]
        assert rows.byte_ends[-1] == text.num_bytes[i]
