"""The end of a chat's turn: from template to plan, scores, alignment and labels of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from align.methods.turn_ends import turn_end_rows, with_turn_ends, without_turn_ends
from extract.plan.planning import load_tokenizers
from extract.run import run_source
from fuse_train.data.samples import AlignedSamples
from fuse_train.model.generation_config import name_turn_end
from launch.work import Part
from store_schema.config import RunConfig, load_run
from store_schema.disk.location import open_location
from store_schema.layout import Arrays, Origin, check_shard
from store_schema.plan.plan import Segment
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests import store_factory
from tests.chat_shapes import MESSAGES, A, Q, said
from tests.command import ok
from tests.extract_runs import write_jsonl, write_run
from tests.tiny import tiny_model, tiny_tokenizer

STOPS = {"coder": "</s>", "writer": " </s>", "target": "<s>"}
"""What each template writes behind a message; the tokens have other ids in each vocabulary."""


MAX_TOKENS = 160


def template(stop: str) -> str:
    return (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}" + stop + "\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


def make_models(root: Path) -> dict[str, Path]:
    kinds: dict[str, Any] = {"coder": "byte_level", "writer": "unigram", "target": "metaspace_bpe"}
    models = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        tokenizer = tiny_tokenizer(kind, vocab_size=420)
        tokenizer.chat_template = template(STOPS[name])
        models[name] = tiny_model(root / name, tokenizer=tokenizer, seed=seed)
    return models


@pytest.fixture(scope="module")
def aligned_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Chats, a turn that goes on with a call, a long answer and plain text; extracted and aligned."""
    folder = tmp_path_factory.mktemp("ends")
    call_of = {"function": {"name": "high_tide", "arguments": {}}}
    calling = [*said(("user", Q)), {"role": "assistant", "content": A, "tool_calls": [call_of]}]
    rows = [
        {"id": "chat", "messages": MESSAGES},
        {"id": "calls", "messages": calling},
        {"id": "long", "messages": said(("user", Q), ("assistant", "A new day came. " * 30))},
        {"id": "plain", "text": "No chat at all."},
        {"id": "asked", "prompt": Q, "response": A},
    ]
    write_jsonl(folder / "docs.jsonl", [{"domain": "d", "split": "train", **row} for row in rows])
    plan = {"max_tokens": MAX_TOKENS, "shard_tokens": 256}
    path = write_run(folder, make_models(folder), plan=plan)
    for words in (("corpus", "build"), ("extract", "plan")):
        ok(*words, path)
    for name in ("coder", "writer"):
        run_source(load_run(path), name, Part())
    ok("align", "run", path)
    ok("store", "verify", path)
    return load_run(path)


ENDS = {"chat/turn-0#0", "chat/turn-1#0"}


def ends_turn(segment: Segment) -> bool:
    return segment.segment_id in ENDS or (
        segment.document_id == "long/turn-0" and segment.ends_document
    )


def test_a_turn_ends_with_the_templates_token(aligned_run: RunConfig) -> None:
    plan = open_plan(aligned_run)
    for name, tokenizer in load_tokenizers(aligned_run).items():
        stop = tokenizer.vocabulary.written.index(STOPS[name].strip().encode())
        assert tokenizer.contexts.turn_end == stop
        for shard in plan.shards:
            segments = plan.segments(shard)
            read = tokenizer.encode(segments)
            assert sum(len(part.token_ids) for part in read) == shard.num_tokens[name]
            for segment, part in zip(segments, read, strict=True):
                assert part.ends_turn == ends_turn(segment), segment.segment_id
                assert (part.token_ids[-1] == stop) == part.ends_turn
                assert part.byte_ends[-1] == len(segment.text.encode())
                assert len(part.input_ids) <= MAX_TOKENS
    long = [
        s for shard in plan.shards for s in plan.segments(shard) if s.document_id == "long/turn-0"
    ]
    assert len(long) > 1


def _logprob_of_end(run: RunConfig, name: str, segment: Segment) -> float:
    """Of the stop token behind the text, from a plain forward."""
    ref = run.sources[name]
    [part] = SegmentTokenizer.load(ref, name=name).encode([segment])
    model = AutoModelForCausalLM.from_pretrained(ref.model, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([part.input_ids])).logits[0, -2]
    return float(torch.log_softmax(logits, -1)[part.input_ids[-1]])


@pytest.mark.parametrize("name", ["coder", "writer"])
def test_ends_are_scored_and_converted_to_the_targets_token(
    aligned_run: RunConfig, name: str
) -> None:
    plan = open_plan(aligned_run)
    source = StoreReader.open(open_location(aligned_run.store_url(name)))
    reader = StoreReader.open(open_location(aligned_run.aligned_url(name)))
    target = load_tokenizers(aligned_run)["target"]
    seen = 0
    for shard in plan.shards:
        segments, arrays = plan.segments(shard), reader.read(shard.index)
        rows_D = turn_end_rows(source.read(shard.index), segments, source.vocabulary.special)
        assert [row >= 0 for row in rows_D] == [ends_turn(segment) for segment in segments]
        for d, segment in enumerate(segments):
            first, stop = arrays["token_offsets"][d : d + 2]
            last, text = stop - 1, len(segment.text.encode())
            own = arrays["span_index"][first:stop]
            if not ends_turn(segment):
                assert arrays["byte_ends"][last] == text
                assert target.vocabulary.tokens[arrays["token_ids"][last]]
                continue
            seen += 1
            expected = _logprob_of_end(aligned_run, name, segment)
            assert arrays["token_ids"][last] == target.contexts.turn_end
            assert arrays["label_logprobs"][last] == pytest.approx(expected, abs=1e-4)
            entries = slice(*arrays["entry_offsets"][last : last + 2])
            assert arrays["entry_ids"][entries].tolist() == [target.contexts.turn_end]
            assert arrays["entry_logprobs"][entries] == pytest.approx([expected], abs=1e-4)
            assert arrays["tail_mass"][last] == pytest.approx(1 - np.exp(expected), abs=1e-5)
            assert arrays["origin"][last] == Origin.BOUNDARY
            # A span of its own, and no part of what the text costs.
            assert own[-1] == own[-2] + 1
            span = arrays["span_offsets"][d] + own[-1]
            assert arrays["span_logprobs"][span] == pytest.approx(expected, abs=1e-4)
            assert arrays["span_byte_ends"][span] == text
            row = rows_D[d]
            labels = source.read(shard.index)["label_logprobs"]
            begin = source.read(shard.index)["token_offsets"][d]
            assert arrays["source_nats"][d] == pytest.approx(-labels[begin:row].sum(), rel=1e-5)
    assert seen == 3


def test_ends_are_labels_and_no_other_end_stands_behind_them(aligned_run: RunConfig) -> None:
    plan = open_plan(aligned_run)
    stores = {
        name: StoreReader.open(open_location(aligned_run.aligned_url(name)))
        for name in aligned_run.sources
    }
    target = load_tokenizers(aligned_run)["target"]
    samples = AlignedSamples(plan, stores, target, split="train", append_eos=True)
    for position in range(len(samples.shards)):
        shard = samples.load(position, with_sources=True)
        for d, segment in enumerate(shard.segments):
            labels = shard.sample(d).labels.tolist()
            if ends_turn(segment):
                assert labels[-1] == target.contexts.turn_end
                assert target.eos_id not in labels
            elif segment.ends_document:
                assert labels[-1] == target.eos_id


def test_a_final_model_stops_where_its_turns_end(aligned_run: RunConfig) -> None:
    target = load_tokenizers(aligned_run)["target"]
    model = AutoModelForCausalLM.from_pretrained(aligned_run.target.model)
    name_turn_end(model, target)
    name_turn_end(model, target)  # once is enough
    assert model.generation_config.eos_token_id == [target.eos_id, target.contexts.turn_end]


def _arrays() -> Arrays:
    """Two segments of two rows, the second of which ends a turn in the source."""
    return {
        "segment_ids": np.array([4, 5], "<i8"),
        "token_offsets": np.array([0, 2, 4], "<i8"),
        "token_ids": np.array([5, 6, 7, 2], "<u4"),
        "byte_ends": np.array([1, 2, 3, 3], "<u4"),
        "entry_offsets": np.array([0, 1, 3, 4, 6], "<i8"),
        "entry_ids": np.array([5, 6, 1, 7, 2, 9], "<u4"),
        "entry_logprobs": np.log(np.array([0.9, 0.5, 0.25, 0.8, 0.7, 0.1], "<f4")),
        "tail_mass": np.array([0.1, 0.25, 0.2, 0.2], "<f4"),
        "label_logprobs": np.log(np.array([0.9, 0.5, 0.8, 0.7], "<f4")),
    }


def _segments(context: str | None = '{"messages": []}') -> list[Segment]:
    return [
        Segment(i, f"{i}#0", str(i), "d", "train", 0, 3, True, context, "abc") for i in range(2)
    ]


def test_rows_that_end_turns_are_taken_out() -> None:
    special = np.zeros(10, bool)
    special[2] = True
    arrays = _arrays()
    rows = turn_end_rows(arrays, _segments(), special)
    assert rows.tolist() == [-1, 3]
    assert turn_end_rows(arrays, _segments(None), special).tolist() == [-1, -1]
    left = without_turn_ends(arrays, rows)
    expected = {name: array[:3] for name, array in arrays.items()}
    expected |= {
        "segment_ids": arrays["segment_ids"],
        "token_offsets": np.array([0, 2, 3]),
        "entry_offsets": np.array([0, 1, 3, 4]),
        "entry_ids": arrays["entry_ids"][:4],
        "entry_logprobs": arrays["entry_logprobs"][:4],
    }
    assert set(left) == set(arrays)
    for name, array in expected.items():
        np.testing.assert_array_equal(left[name], array, err_msg=name)
    assert without_turn_ends(arrays, np.array([-1, -1])) is arrays


def test_branches_move_with_their_positions() -> None:
    arrays = store_factory.arrays("branched", (4, 6, 3), vocab_size=500, top_k=6, seed=2)
    gone = np.array([3, -1, 12])
    kept = without_turn_ends(arrays, gone)
    check_shard("branched", kept, vocab_size=500, where="kept")
    stays = [i for i in range(13) if i not in (3, 12)]
    before = _branches(arrays)
    assert {stays[p]: rows for p, rows in _branches(kept).items()} == {
        p: rows for p, rows in before.items() if p in stays
    }
    assert 3 in before
    assert 12 in before


def _branches(arrays: Arrays) -> dict[int, list[Any]]:
    """Token, tail and entries of the branches at each position."""
    found: dict[int, list[Any]] = {}
    offsets = arrays["branch_entry_offsets"].tolist()
    for b, position in enumerate(arrays["branch_positions"].tolist()):
        ids = arrays["branch_entry_ids"][offsets[b] : offsets[b + 1]].tolist()
        tail = float(arrays["branch_tail_mass"][b])
        found.setdefault(position, []).append((int(arrays["branch_tokens"][b]), tail, ids))
    return found


@pytest.mark.parametrize("entries", [True, False])
def test_a_source_without_an_end_leaves_it_to_ground_truth(entries: bool) -> None:
    aligned = without_turn_ends(_arrays(), np.array([-1, 3]))
    aligned |= {
        "origin": np.ones(3, "|u1"),
        "span_offsets": np.array([0, 2, 3]),
        "span_index": np.array([0, 1, 0], "<u4"),
        "span_byte_ends": np.array([1, 2, 3], "<u4"),
        "span_logprobs": np.zeros(3, "<f4"),
    }
    if not entries:  # as a method gives them that tells of spans alone
        aligned |= {
            "entry_offsets": np.zeros(4, "<i8"),
            "entry_ids": np.empty(0, "<u4"),
            "entry_logprobs": np.empty(0, "<f4"),
        }
    target = [
        EncodedSegment((1,), np.array([5, 6, 3], "<u4"), np.array([1, 2, 2], "<u4"), True),
        EncodedSegment((1,), np.array([7, 3], "<u4"), np.array([3, 3], "<u4"), True),
    ]
    out = with_turn_ends(aligned, target, np.log(np.array([np.nan, 0.7], np.float32)))
    assert out["token_ids"].tolist() == [5, 6, 3, 7, 3]
    assert out["byte_ends"].tolist() == [1, 2, 2, 3, 3]
    assert out["token_offsets"].tolist() == [0, 3, 5]
    assert np.isnan(out["label_logprobs"][2])
    assert out["tail_mass"][2] == 1
    assert out["origin"].tolist() == [1, 1, Origin.NONE, 1, 1 if entries else Origin.NONE]
    assert out["entry_offsets"].tolist() == ([0, 1, 3, 3, 4, 5] if entries else [0] * 6)
    assert out["entry_ids"].tolist() == ([5, 6, 1, 7, 3] if entries else [])
    assert out["span_offsets"].tolist() == [0, 3, 5]
    assert out["span_index"].tolist() == [0, 1, 2, 0, 1]
    assert out["span_byte_ends"].tolist() == [1, 2, 2, 3, 3]
    np.testing.assert_allclose(np.exp(out["span_logprobs"]), [1, 1, np.nan, 1, 0.7], rtol=1e-6)


def test_what_ends_a_turn_is_the_first_special_token_behind_it() -> None:
    hf = tiny_tokenizer("byte_level")
    found = {}
    for after in ("</s>\n", "\n</s>", " <s></s>", "bye</s>", "\n", ""):
        hf.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}AFTER{% endfor %}"
        hf.chat_template = hf.chat_template.replace("AFTER", after.replace("\n", "{{ '\n' }}"))
        found[after] = SegmentTokenizer(hf, name="m").contexts.turn_end
    assert list(found.values()) == [2, 2, 1, None, None, None]
    context = {"messages": said(("user", Q))}
    hf.chat_template = template("</s>")
    reader = SegmentTokenizer(hf, name="m").contexts
    assert reader.read(json.dumps(context), where="s")[1] == 2
    assert reader.read(json.dumps(context | {"goes_on": True}), where="s")[1] is None
    assert reader.read(json.dumps({"prompt": Q}), where="s")[1] is None
