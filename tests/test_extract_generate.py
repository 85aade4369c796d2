"""`extract generate`: what is stored of answers, and that workers, stops and settings keep it so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.config import GenerateSection
from extract.generation.answers import LATER_SEGMENTS, NO_PROMPT, PROMPTS, answer_seed, answer_stats
from extract.generation.generate import ANSWERING, answer_rules, check_answering
from extract.run import run_source
from extract.scoring.stage import Job
from launch.work import Part, Worker
from store_schema.config import load_run
from store_schema.errors import ConfigError, ModelError, Stopped, StoppedMidway
from store_schema.layout import Finish
from store_schema.plan.plan import Segment
from store_schema.plan.run_plan import open_plan
from store_schema.presets import Encoding
from store_schema.store.answers import TEXT_ARRAYS
from store_schema.text.tokenizer import SegmentTokenizer
from tests.answer_contract import check_drawable
from tests.command import ok, refused
from tests.extract_runs import files_of, write_jsonl, write_run
from tests.generate_runs import (
    GENERATE,
    POSITIONS,
    contents,
    generate,
    one_source,
    planned,
    spoilt,
    store_of,
    tokens_of,
)
from tests.store_damage import reseal

pytestmark = pytest.mark.usefixtures("quick_processes")


@pytest.mark.parametrize("name", ["coder", "writer"])
def test_stored_answers_are_the_models_own(
    tmp_path: Path, chat_models: dict[str, Path], name: str
) -> None:
    """Tokens are those that a plain forward may give there; ends and bytes are as said."""
    from transformers import AutoModelForCausalLM

    path = planned(tmp_path, one_source(chat_models, name))
    generate(path, name)
    run = load_run(path)
    plan, store = open_plan(run), store_of(path, name)
    source = check_answering(run, name, plan)
    rules = answer_rules(source)
    assert source.spec.longest == POSITIONS
    model = AutoModelForCausalLM.from_pretrained(chat_models[name]).eval()
    ends_seen, lengths_seen = set(), set()
    for shard in plan.shards:
        store.verify(shard.index)
        arrays = store.read(shard.index)
        assert set(arrays) == {*TEXT_ARRAYS}
        asked = [s for s in plan.segments(shard) if s.context is not None and s.byte_start == 0]
        pairs = [(segment.index, number) for segment in asked for number in range(3)]
        found = zip(arrays["segment_ids"].tolist(), arrays["answer_index"].tolist(), strict=True)
        assert list(found) == pairs
        for d in range(len(pairs)):
            prompt = source.tokenizer.contexts.prompt(asked[d // 3].context, where="")
            start, stop = arrays["token_offsets"][d : d + 2]
            ids = arrays["token_ids"][start:stop].tolist()
            finish = Finish(arrays["finish"][d])
            ends_seen.add(finish)
            lengths_seen.add(len(prompt))
            if len(prompt) + 24 > POSITIONS:
                assert (finish, ids) == (Finish.PROMPT_TOO_LONG, [])
                continue
            _check_end(ids, finish, rules.end_ids)
            written = [b"" if i in rules.end_ids else rules.tokens[i] for i in ids]
            ends = np.cumsum([len(token) for token in written])
            assert arrays["byte_ends"][start:stop].tolist() == ends.tolist()
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0]
            truth = torch.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]
            check_drawable(np.array(ids), truth[:, : len(rules.tokens)], rules.section)
    assert {Finish.STOP, Finish.LENGTH, Finish.PROMPT_TOO_LONG} <= ends_seen
    assert POSITIONS - 24 in lengths_seen


def _check_end(ids: list[int], finish: Finish, end_ids: frozenset[int]) -> None:
    assert (ids[-1] in end_ids) == (finish in (Finish.STOP, Finish.EMPTY))
    assert not end_ids & set(ids[:-1])
    assert (len(ids) == 24) or finish in (Finish.STOP, Finish.EMPTY, Finish.STOP_TEXT)


def test_command_reports_counts_and_is_a_no_op(
    tmp_path: Path, chat_models: dict[str, Path]
) -> None:

    path = planned(tmp_path, chat_models)
    finished = subprocess.run(
        [sys.executable, "-m", "extract", "generate", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(re.findall(r"engine \(cpu\) ready in", finished.stderr)) == 2
    out = finished.stdout
    # Seven prompts as text, a long, a wide and an edge one, two turns, a chat.
    assert re.search(r"coder +(\d+)/\1 +13 +39 +", out), out
    assert re.search(r"source +stop +stop text +length +empty +prompt too long\n", out)
    assert re.search(r"not answered: 1 documents without a prompt, \d+ later segments", out)
    stats = [c.stats for c in store_of(path).commits.values()]
    finishes = {f: sum(s[f"finish/{f.name.lower()}"] for s in stats) for f in Finish}
    stored = np.concatenate([store_of(path).read(s)["finish"] for s in store_of(path).commits])
    assert finishes == {f: int((stored == f).sum()) for f in Finish}
    assert finishes[Finish.PROMPT_TOO_LONG] == 3
    before = files_of(tmp_path / "run" / "generated")
    assert ok("extract", "generate", path) == "generate complete, nothing to do\n"
    assert files_of(tmp_path / "run" / "generated") == before
    ok("store", "verify", path)
    log = tmp_path / "run" / "logs" / "generate" / "coder" / "worker-0-of-1.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert events[0]["event"] == "begin"
    assert [e["event"] for e in events].count("shard") == len(stats)
    assert ok("extract", "generate", path, "--dry-run").splitlines()[0] == (
        "generate coder: nothing to do"
    )


def test_workers_shards_and_stops_change_nothing(
    tmp_path: Path, chat_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, one_source(chat_models))
    num_shards = len(open_plan(load_run(path)).shards)
    assert num_shards >= 4
    generate(path)
    whole = contents(path)
    assert len(whole) == num_shards
    shutil.rmtree(tmp_path / "run" / "generated")
    generate(path, part=Part(Worker(1, 2), steal=False))
    assert set(contents(path)) == set(range(1, num_shards, 2))
    generate(path, part=Part(shards=((0, 0),)))
    generate(path, part=Part(limit=1))
    assert len(contents(path)) == len(range(1, num_shards, 2)) + 2
    generate(path)
    assert contents(path) == whole


def test_a_stop_keeps_what_is_committed(
    tmp_path: Path, chat_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planned(tmp_path, one_source(chat_models))
    generate(path)
    whole = contents(path)
    shutil.rmtree(tmp_path / "run" / "generated")
    stop_read_fd, stop_write_fd = os.pipe()
    os.close(stop_write_fd)  # the parent let go before the first batch
    with pytest.raises(Stopped):
        generate(path, stop_fd=stop_read_fd)
    assert not contents(path)
    os.close(stop_read_fd)
    stop_read_fd, stop_write_fd = os.pipe()

    def after_one(job: Any, shard: Any, arrays: Any, stats: Any) -> None:
        commit(job, shard, arrays, stats)
        os.close(stop_write_fd)

    commit = Job.commit
    monkeypatch.setattr(Job, "commit", after_one)
    with pytest.raises(StoppedMidway):
        generate(path, stop_fd=stop_read_fd)
    os.close(stop_read_fd)
    monkeypatch.undo()
    assert len(contents(path)) == 1
    generate(path)
    assert contents(path) == whole


def test_an_answer_depends_on_prompt_number_source_and_seed_alone(
    tmp_path: Path, chat_models: dict[str, Path]
) -> None:
    models = one_source(chat_models)
    three = planned(tmp_path, models)
    generate(three)
    answers = tokens_of(three)
    assert len(answers) == 39
    seen = [tuple(ids) for ids in answers.values() if ids]
    assert len(set(seen)) > 0.8 * len(seen)  # several answers to a prompt differ

    def other(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        return planned(folder, changes.pop("models", models), **changes)

    one = other("one", generate=GENERATE | {"answers": 1})
    generate(one)
    assert tokens_of(one) == {place: ids for place, ids in answers.items() if place[1] == 0}
    reseeded = other("reseeded", seed=1)
    generate(reseeded)
    by_text = {tuple(ids) for ids in tokens_of(reseeded).values() if len(ids) > 3}
    assert not by_text & set(seen)
    renamed = other("renamed", models={"other": models["coder"], "target": models["target"]})
    generate(renamed, "other")
    assert not {tuple(i) for i in tokens_of(renamed, "other").values() if len(i) > 3} & set(seen)


def test_seeds_of_answers_never_change() -> None:
    """Another seed would be other answers: a store of an older version could not be gone on with."""
    assert answer_seed(7, "coder", "d#0", 2) == 1840056870171450509


def test_what_was_not_asked_is_counted_once() -> None:
    """A long document without a prompt is one; its later segments are later segments."""

    def segment(start: int, context: str | None) -> Segment:
        return Segment(0, "d#0", "d", "qa", "train", start, start + 5, False, context, "text.")

    segments = [segment(0, None), segment(5, None), segment(0, "{}"), segment(5, "{}")]
    stats = answer_stats(segments, [], prompt_tokens=3, seconds=1.0)
    assert (stats[PROMPTS], stats[NO_PROMPT], stats[LATER_SEGMENTS]) == (1, 1, 2)


def test_shards_without_prompts_are_empty_and_done(
    tmp_path: Path, chat_models: dict[str, Path]
) -> None:
    texts = [{"id": f"t{i}", "text": "Just text here. " * 20} for i in range(3)]
    asked = {"id": "p", "prompt": "Say:", "response": "No."}
    rows = [{"domain": "d", "split": "train"} | row for row in texts]
    rows.append({"domain": "d", "split": "valid"} | asked)
    write_jsonl(tmp_path / "mixed.jsonl", rows)
    corpus = {"inputs": [{"path": str(tmp_path / "mixed.jsonl")}]}
    path = planned(tmp_path, one_source(chat_models), corpus=corpus)
    generate(path)
    store = store_of(path)
    sizes = [store.commits[shard].counts.segments for shard in sorted(store.commits)]
    assert sorted(sizes)[:-1] == [0] * (len(sizes) - 1)
    assert max(sizes) == 3
    for shard in store.commits:
        store.verify(shard)
        store.read(shard)


def test_dry_run_says_what_would_be_asked(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    path = planned(tmp_path, one_source(chat_models))
    said = ok("extract", "generate", path, "--dry-run", "--shards", "0-1")
    assert re.match(
        r"generate coder: would do 2 shards \(0-1\), \d+ prompts, answers to each: 3 of at most "
        r"24 tokens\n  ",
        said,
    )
    assert not (tmp_path / "run" / "generated").exists()


def test_bad_settings_end_in_one_line(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    path = planned(tmp_path, one_source(chat_models))

    def line(*options: str) -> str:
        words = [word for option in options for word in ("--set", option)]
        return refused("extract", "generate", path, *words)

    assert "below 100, got 100" in line("generate.max_tokens=100")
    assert "answers may be longer than the context of coder" in line("generate.max_tokens=5000")
    assert "all answers to a prompt are the same" in line("generate.temperature=0")
    assert "0, or at least 0.01" in line("generate.temperature=0.001")
    assert "an empty text would end every answer" in line("generate.stop=['']")
    assert "unknown key" in line("generate.top_k=3")
    assert "--source" in refused("extract", "generate", path, "--source", "nobody")
    assert not (tmp_path / "run" / "generated").exists()
    generate(path)
    changed = line("generate.top_p=0.5")
    assert "the store was made with another settings.top_p" in changed


def test_what_is_kept_of_scored_text_is_nothing_to_answers(
    tmp_path: Path, chat_models: dict[str, Path]
) -> None:
    """A store of answers goes on whatever entries the run file asks for."""
    path = planned(tmp_path, one_source(chat_models))
    generate(path, part=Part(shards=((0, 0),)))
    begun = store_of(path).manifest
    assert (begun.top_k, begun.max_entries, begun.encoding) == (None, 0, Encoding())
    other = ("extract.top_k=5000", "extract.estimator=sampled", "store.preset=tiny")
    words = [word for option in other for word in ("--set", option)]
    assert "would do" in ok("extract", "generate", path, "--dry-run", *words)
    run_source(load_run(path, other), "coder", Part(), ANSWERING)
    assert store_of(path).manifest == begun
    assert {c.counts.entries for c in store_of(path).commits.values()} == {0}


def test_a_store_with_distributions_is_refused(
    tmp_path: Path, chat_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, one_source(chat_models))
    generate(path, part=Part(shards=((0, 0),)))
    manifest = tmp_path / "run/generated/coder/manifest.json"
    reseal(manifest, top_k=8)
    expected = (
        f"error: the store has distributions of answers, which are no longer supported in {manifest}: "
        "expected top_k null, got top_k 8; delete the store and run `logitfuse extract generate` again"
    )
    assert refused("extract", "generate", path) == expected
    assert refused("extract", "answers", path, "--out", tmp_path / "a.jsonl") == expected


def test_a_corpus_without_prompts_is_one_line(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    write_jsonl(tmp_path / "plain.jsonl", [{"text": "Text. " * 9, "domain": "d", "split": "train"}])
    corpus = {"inputs": [{"path": str(tmp_path / "plain.jsonl")}]}
    path = planned(tmp_path, one_source(chat_models), corpus=corpus)
    said = refused("extract", "generate", path)
    assert "the corpus has no prompt to answer" in said
    assert "map columns prompt and response, or messages" in said


def test_chats_without_a_template_are_one_line(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    row = {"id": "c", "prompt": "Hi!", "response": "Hello.", "domain": "d", "split": "train"}
    write_jsonl(tmp_path / "docs.jsonl", [row])
    corpus = {"inputs": [{"path": str(tmp_path / "docs.jsonl"), "prompt_as": "chat"}]}
    models = {"code": tiny_models["code"], "target": tiny_models["target"]}
    path = write_run(tmp_path, models, corpus=corpus)
    ok("corpus", "build", path)
    assert "messages need a chat template" in refused("extract", "plan", path)


def test_nan_names_answer_and_position(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    folder = spoilt(chat_models["coder"], tmp_path / "broken")
    path = planned(tmp_path, {"coder": folder, "target": chat_models["target"]})
    with pytest.raises(
        ModelError, match=r"NaN .* answer 0 to segment \S+, source coder, position 0"
    ):
        generate(path)
    assert not contents(path)


def test_section_bounds() -> None:
    for wrong in (
        {"answers": 0},
        {"answers": 1025},
        {"temperature": -1},
        {"temperature": 2.1},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_tokens": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GenerateSection(**wrong)


def test_max_tokens_must_leave_room_for_a_prompt(
    tmp_path: Path, chat_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, one_source(chat_models))
    run = load_run(path, ("generate.max_tokens=99", "generate.answers=1"))
    plan = open_plan(run)
    assert check_answering(run, "coder", plan).spec.longest == POSITIONS
    with pytest.raises(ConfigError, match="max_tokens"):
        check_answering(load_run(path, ("generate.max_tokens=100",)), "coder", plan)
    tokenizer = SegmentTokenizer.load(run.sources["coder"], name="coder")
    assert tokenizer.bos_ids  # so even an empty prompt takes one position
