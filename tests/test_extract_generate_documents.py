"""`extract answers`: answers become documents again, and `corpus.inputs` takes them as they are."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from extract.corpus.corpus import corpus_location, iter_documents, open_corpus, read_documents
from extract.generation.answer_documents import left_out
from extract.generation.answers import answer_seed, answer_text
from store_schema.config import ModelRef, load_run
from store_schema.layout import Arrays, Finish
from store_schema.plan.run_plan import open_plan
from store_schema.store.answers import read_answers
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary
from tests.command import ok, refused
from tests.extract_runs import write_jsonl, write_run
from tests.generate_runs import generate, one_source, planned, store_of
from tests.tiny import tiny_model, tiny_tokenizer

TOKENS = (b"</s>", b" He", b"llo", b"END", b"\xe2\x82", b"\xac", b"\0", b"\xff")


def arrays_of(answers: list[tuple[int, int, Finish, list[int]]], ends: set[int]) -> Arrays:
    """What a generated store gives of these answers."""
    lengths = [[0 if i in ends else len(TOKENS[i]) for i in ids] for *_, ids in answers]
    return {
        "segment_ids": np.array([a[0] for a in answers], np.int64),
        "answer_index": np.array([a[1] for a in answers], np.uint32),
        "finish": np.array([a[2] for a in answers], np.uint8),
        "token_offsets": np.cumsum([0, *map(len, lengths)]),
        "token_ids": np.array([i for *_, ids in answers for i in ids], np.uint32),
        "byte_ends": np.concatenate([np.cumsum(part) for part in lengths]).astype(np.uint32),
    }


def test_bytes_of_answers() -> None:
    """An end token that the vocabulary spells says nothing."""
    answers = [
        (7, 0, Finish.STOP, [1, 2, 3]),
        (7, 1, Finish.PROMPT_TOO_LONG, []),
        (9, 0, Finish.LENGTH, [2, 4]),
        (9, 1, Finish.EMPTY, [3]),
    ]
    vocabulary = Vocabulary(TOKENS, np.array([True] + [False] * 7))
    found = read_answers(arrays_of(answers, ends={3}), vocabulary)
    assert [(a.row, a.number, a.finish, a.text) for a in found] == [
        (7, 0, Finish.STOP, b" Hello"),
        (7, 1, Finish.PROMPT_TOO_LONG, b""),
        (9, 0, Finish.LENGTH, b"llo\xe2\x82"),
        (9, 1, Finish.EMPTY, b""),
    ]


def test_text_and_what_is_left_out() -> None:
    assert answer_text(b"a\xe2\x82", Finish.LENGTH) == "a"
    assert answer_text(b"a\xe2\x82", Finish.STOP) is None
    assert answer_text(b"a\xff\xe2", Finish.LENGTH) is None
    assert answer_text("a€".encode(), Finish.STOP_TEXT) == "a€"
    assert left_out("a", Finish.STOP, keep_cut=False) is None
    assert left_out("a", Finish.LENGTH, keep_cut=False) == "cut"
    assert left_out("a", Finish.LENGTH, keep_cut=True) is None
    assert left_out("", Finish.PROMPT_TOO_LONG, keep_cut=True) == "prompt too long"
    assert left_out("", Finish.EMPTY, keep_cut=True) == "empty"
    assert left_out("a\0", Finish.STOP, keep_cut=True) == "NUL"
    assert left_out(None, Finish.STOP, keep_cut=True) == "no UTF-8"


def test_seeds_are_of_the_answer_alone() -> None:
    seeds = {
        answer_seed(seed, source, segment, number)
        for seed in (0, 1)
        for source in ("a", "b")
        for segment in ("d#0", "d#1")
        for number in range(50)
    }
    assert len(seeds) == 400
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert answer_seed(0, "coder", "d#0", 3) == 1013546199757192089


@pytest.mark.parametrize(
    ("kind", "dummy_prefix", "expected"),
    [("byte_level", True, False), ("metaspace_bpe", True, True), ("metaspace_bpe", False, False)],
)
def test_a_tokenizers_own_space(
    tmp_path: Path, kind: str, dummy_prefix: bool, expected: bool
) -> None:
    tokenizer = tiny_tokenizer(kind, vocab_size=500, dummy_prefix=dummy_prefix)  # type: ignore[arg-type]
    folder = tiny_model(tmp_path / "m", "llama", tokenizer)
    loaded = SegmentTokenizer.load(ModelRef(model=str(folder)), name="m")
    assert loaded.puts_space == expected


def test_answers_become_a_corpus(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    """Round trip: prompts stay prompts, chats stay chats, and a source reads what it wrote."""
    path = planned(tmp_path, chat_models, generate={"answers": 24, "max_tokens": 5})
    for name in ("coder", "writer"):
        generate(path, name)
    out = tmp_path / "answers.jsonl"
    said = ok("extract", "answers", path, "--out", out, "--keep-cut")
    lines = [
        json.loads(line) for line in out.read_text().split("\n")[:-1]
    ]  # models write U+2028 too
    counts = {n: sum(line["source"] == n for line in lines) for n in ("coder", "writer")}
    assert min(counts.values()) > 5
    for name, number in counts.items():
        assert f"{name}: {number} answers written; left out: " in said
    assert said.endswith(f"answers.jsonl: {len(lines)} documents\n")
    again = tmp_path / "again"
    again.mkdir()
    corpus = {"inputs": [{"path": str(out)}]}
    second = write_run(again, chat_models, corpus=corpus)
    ok("corpus", "build", second)
    location = corpus_location(load_run(second))
    found = list(iter_documents(read_documents(location, open_corpus(location))))
    assert len(found) == len(lines)
    for document, line in zip(found, lines, strict=True):
        assert document.document_id == line["id"]
        whole = line["response"]
        assert document.text == (whole.strip() if "messages" in line else whole)
        assert (document.domain, document.split) == (line["domain"], line["split"])
        context = json.loads(document.context or "")
        assert context == {key: line[key] for key in ("prompt", "messages") if key in line}
    _check_own_space(path, lines)
    assert {"chat"} == {line["domain"] for line in lines if line["id"].startswith("c/")}
    talks = [line for line in lines if line["id"].startswith("talk/turn-1/")]
    assert talks
    assert [m["role"] for m in talks[0]["messages"]] == ["user", "assistant", "user"]
    ok("extract", "plan", second)
    # Without --keep-cut fewer are written, and the rest is counted.
    said = ok("extract", "answers", path, "--source", "coder", "--out", out)
    assert " cut " in said
    lines = [
        json.loads(line) for line in out.read_text().split("\n")[:-1]
    ]  # models write U+2028 too
    assert {line["finish"] for line in lines} == {"stop"}
    assert {line["source"] for line in lines} == {"coder"}


def _check_own_space(path: Path, lines: list[dict[str, object]]) -> None:
    """The space that a tokenizer puts before every text is not part of what was said."""
    plan = open_plan(load_run(path))
    responses = {line["id"]: line["response"] for line in lines}
    begins_with_space = set()
    for name in ("coder", "writer"):
        store = store_of(path, name)
        for shard in plan.shards:
            segments = plan.segments(shard)
            for answer in read_answers(store.read(shard.index), store.vocabulary):
                document = segments[answer.row - shard.start].document_id
                found = responses.get(f"{document}/{name}/{answer.number}")
                if found is not None and answer.text.startswith(b" "):
                    begins_with_space.add(name)
                    text = answer_text(answer.text, answer.finish) or ""
                    assert found == (text[1:] if name == "writer" else text)
    assert begins_with_space == {"coder", "writer"}


def test_answers_of_an_unfinished_store_are_refused(
    tmp_path: Path, chat_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planned(tmp_path, one_source(chat_models))
    out = tmp_path / "answers.jsonl"
    assert "no store" in refused("extract", "answers", path, "--out", out)
    ok("extract", "generate-source", path, "--source", "coder", "--limit", 1)
    assert "shard(s) not there yet" in refused("extract", "answers", path, "--out", out)
    ok("extract", "generate-source", path, "--source", "coder")
    nowhere = tmp_path / "nowhere" / "answers.jsonl"
    assert "answers cannot be written" in refused("extract", "answers", path, "--out", nowhere)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("extract.generation.answer_documents.os.replace", full)
        assert "No space left" in refused("extract", "answers", path, "--out", out)
    assert [p.name for p in tmp_path.iterdir() if "answers" in p.name] == []
    other = tiny_model(tmp_path / "other", tokenizer=tiny_tokenizer(vocab_size=310))
    words = ["--set", f"sources.coder.model={other}"]
    line = refused("extract", "answers", path, "--out", tmp_path / "b.jsonl", *words)
    assert "made from another model than the run file's source coder" in line
    assert "run `logitfuse extract generate` again" in line


def test_messages_and_a_response_are_one_document(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    asked = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    more = [*asked, {"role": "user", "content": "Why?"}]
    rows = [
        {"id": "open", "messages": more, "response": "Because."},
        {"id": "closed", "messages": asked, "response": "Me."},  # the chat has its answer
        {"id": "chat", "messages": asked},
    ]
    write_jsonl(tmp_path / "docs.jsonl", [{"domain": "d", "split": "train"} | row for row in rows])
    path = write_run(tmp_path, {"code": tiny_models["code"], "target": tiny_models["target"]})
    ok("corpus", "build", path)
    location = corpus_location(load_run(path))
    found = list(iter_documents(read_documents(location, open_corpus(location))))
    assert [(d.document_id, d.text) for d in found] == [
        ("open", "Because."),
        ("closed/turn-0", "Me."),
        ("chat/turn-0", "Me."),
    ]
    assert json.loads(found[0].context or "") == {"messages": more}
