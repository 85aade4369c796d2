"""Runs the engine contract on vLLM in a process of its own: `python -m tests.vllm_contract FOLDER`.

vLLM changes classes of the process it runs in, and its libraries warn; neither belongs in pytest's.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import extract.run  # noqa: F401 - vLLM must start beside all that `extract run` loads
from extract.engines.registry import open_engine
from extract.engines.vllm_tap import Tap
from store_schema.errors import ModelError
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.engine_contract import (
    TOLERANCE_NATS,
    Reference,
    check_engine,
    encoded_samples,
    reference_logprobs,
    short_chats,
    spec_of,
)


def main(folder: Path) -> None:
    """Compute the reference first: afterwards transformers cannot load the same architecture."""
    # Groups smaller than the samples, and steps smaller than the longest of them.
    spec = spec_of(folder, "vllm", max_num_batched_tokens=64, threads=2)
    tokenizer = SegmentTokenizer.load(spec.ref, name="m")
    samples, chats = encoded_samples(tokenizer), short_chats(tokenizer)
    references, of_chats = (reference_logprobs(folder, part) for part in (samples, chats))
    engine = open_engine(spec)
    try:
        assert engine.description == "vLLM engine (arrays)"
        # With it, scores depend on the order of requests.
        assert not engine.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching  # type: ignore[attr-defined]
        check_engine(engine, spec, references)
        check_chats(engine, chats, of_chats)
        check_tap(engine, samples)
        check_refusals(engine, samples[0])
    finally:
        engine.close()
    print("contract holds")


def check_chats(engine: Any, chats: list[EncodedSegment], references: list[Reference]) -> None:
    """Turns of a chat take one request, and each gets its own rows."""
    asked: list[int] = []
    inner = engine._prompt_rows

    def counted(inputs: Any, tap: Any) -> Any:
        asked.append(len(inputs))
        return inner(inputs, tap)

    engine._prompt_rows = counted
    rows = dict(engine.score(chats))
    engine._prompt_rows = inner
    assert asked == [-(-len(chats) // 3)]
    for i, (labels, logprobs) in enumerate(references):
        np.testing.assert_allclose(rows[i].label_logprobs, labels, atol=TOLERANCE_NATS)
        chosen = np.take_along_axis(logprobs, rows[i].ids, axis=1)
        np.testing.assert_allclose(rows[i].logprobs, chosen, atol=TOLERANCE_NATS)


def check_tap(engine: Any, samples: list[EncodedSegment]) -> None:
    """Arrays and lists hold the same bits; a call that is left halfway spoils neither."""
    tap = engine.tap
    for taken in (None, tap):
        engine.tap = taken
        next(engine.score(samples))  # left: its requests are aborted
        assert not engine.llm.llm_engine.has_unfinished_requests()
        assert not tap.watched
    engine.tap = None
    assert engine.description == "vLLM engine (flat lists)"
    listed = dict(engine.score(samples))
    engine.tap = tap
    tapped = dict(engine.score(samples))
    assert sorted(listed) == sorted(tapped) == list(range(len(samples)))
    for i, rows in listed.items():
        for name in ("ids", "logprobs", "label_logprobs"):
            assert np.array_equal(getattr(rows, name), getattr(tapped[i], name)), name
    few = [1, 2, 3]
    rows = engine._first_rows(few)

    def probed() -> Tap | None:  # what it does where the internals are not as expected
        found: Tap | None = engine._probed_tap(few, rows)
        return found

    take = Tap.take
    for spoilt in (
        lambda ids, logprobs: (np.zeros(2), np.zeros(2)),
        lambda ids, logprobs: (ids, np.nextafter(logprobs, np.float32(-np.inf))),
        lambda ids, logprobs: (ids[::-1], logprobs),
    ):
        Tap.take = lambda self, name, spoilt=spoilt: spoilt(*take(self, name))  # type: ignore[method-assign, misc]
        try:
            assert probed() is None
        finally:
            Tap.take = take  # type: ignore[method-assign]
    del engine.llm.llm_engine.output_processor.process_outputs  # the taps' own
    assert probed() is not None
    whole = engine._prompt_rows
    engine._prompt_rows = lambda inputs, tap: (_ for _ in ()).throw(AttributeError("no kernel"))
    closed = engine.close
    engine.close = lambda: None
    with pytest.raises(ModelError, match=r"cannot run it on this machine .*got AttributeError"):
        engine._first_rows(few)
    engine._prompt_rows, engine.close = whole, closed


def check_refusals(engine: Any, sample: EncodedSegment) -> None:
    """One bad segment is told before vLLM is given any, and the engine goes on."""
    longest, size = engine._spec.longest, engine._spec.model_vocab_size
    for ids, message in (
        ([1] * (longest + 1), f"1 to {longest} tokens"),
        ([1, size], f"below {size}"),
    ):
        bad = dataclasses.replace(sample, token_ids=np.array(ids, np.uint32), context_ids=())
        with pytest.raises(ModelError, match=message):
            next(engine.score([sample, bad]))
        assert not engine.llm.llm_engine.has_unfinished_requests()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
