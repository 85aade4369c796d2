"""Generated stores under every command of `store`: answers, how they ended, and their prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from store_schema.disk.location import open_location
from store_schema.errors import CorruptionError
from store_schema.layout import Arrays, Finish
from store_schema.plan.plan import Plan, Segment
from store_schema.store.answers import read_answers
from store_schema.text.vocabulary import Vocabulary
from store_tools.answers import compare_answers
from store_tools.export import export_store
from store_tools.places import find_places
from store_tools.show import prompt_turns, read_segment
from store_tools.show_page import page
from store_tools.verify import verify_store
from tests import store_factory
from tests.planned_store import (
    ANSWERS,
    DOMAINS,
    PROMPTS,
    data_file,
    flip,
    found_wrong,
    make_run,
    ok,
    reader_of,
    refused,
    store_folder,
)
from tests.test_store_tools_show import Page

SPELT_END = Vocabulary((b"hi", b"<|im_end|>"), np.zeros(2, bool))
"""Its end of turn is no special token."""


def _run(folder: Path, **options: object) -> Path:
    return make_run(folder, kinds=["generated"], **options)  # type: ignore[arg-type]


def test_prompts_are_contexts_at_the_start_of_documents(tmp_path: Path) -> None:
    _run(tmp_path)
    plan = Plan.open(open_location(tmp_path / "run/plan"))
    segments = [segment for shard in plan.shards for segment in plan.segments(shard)]
    assert {segment.index for segment in segments if segment.has_prompt} == PROMPTS.keys()
    assert not replace(segments[0], byte_start=3).has_prompt


def test_answers_come_back(tmp_path: Path) -> None:
    _run(tmp_path)
    reader = reader_of(tmp_path, "generated")
    found = [a for shard in range(3) for a in read_answers(reader.read(shard), reader.vocabulary)]
    assert [(a.row, a.number, a.text, a.finish) for a in found] == [
        (row, number, *answer)
        for row, answers in ANSWERS.items()
        for number, answer in enumerate(answers)
    ]


def test_a_token_that_ends_an_answer_says_nothing_even_where_it_is_spelt() -> None:
    arrays = store_factory.arrays("generated", (2,), vocab_size=2)
    arrays |= {"token_ids": np.array([0, 1], "<u4"), "byte_ends": np.array([2, 2], "<u4")}
    (answer,) = read_answers(arrays, SPELT_END)
    assert (answer.text, answer.num_tokens) == (b"hi", 2)


@pytest.mark.parametrize(
    ("finish", "ids", "ends", "is_sound"),
    [
        (Finish.STOP, [0, 1], [2, 2], True),
        (Finish.STOP, [0, 1], [2, 12], False),
        (Finish.EMPTY, [1], [0], True),
        (Finish.EMPTY, [], [], True),
        (Finish.STOP_TEXT, [0, 1], [2, 12], True),
        (Finish.STOP_TEXT, [0, 1], [2, 2], False),
        (Finish.LENGTH, [1, 1], [10, 20], True),
        (Finish.LENGTH, [2], [0], False),
    ],
)
def test_only_a_token_that_ends_an_answer_takes_no_bytes(
    finish: Finish, ids: list[int], ends: list[int], is_sound: bool
) -> None:
    prompt = Segment(0, "d#0", "d", "", "", 0, 1, True, "{}", "x")
    arrays: Arrays = {
        "segment_ids": np.array([0]),
        "answer_index": np.array([0]),
        "finish": np.array([finish]),
        "token_offsets": np.array([0, len(ids)]),
        "token_ids": np.array(ids, "<u4"),
        "byte_ends": np.array(ends, "<u4"),
    }
    with nullcontext() if is_sound else pytest.raises(CorruptionError):
        compare_answers(arrays, [prompt], 1, SPELT_END, "here")


# ------------------------------------------------------------------------------- verify, repair


def _drop_answer(arrays: Arrays) -> None:
    """Without the last answer, which has no tokens where it is used."""
    for name in ("segment_ids", "answer_index", "finish"):
        arrays[name] = arrays[name][:-1]
    arrays["token_offsets"] = arrays["token_offsets"][:-1]
    for name in ("token_ids", "byte_ends"):
        arrays[name] = arrays[name][: arrays["token_offsets"][-1]]


def _answer_to_no_prompt(arrays: Arrays) -> None:
    arrays["segment_ids"][:] = 1


def _third_number(arrays: Arrays) -> None:
    arrays["answer_index"][1] = 2


def _other_bytes(arrays: Arrays) -> None:
    arrays["byte_ends"][:3] = [1, 1, 3]


def _counted_end(arrays: Arrays) -> None:
    last = int(arrays["token_offsets"][1]) - 1
    arrays["byte_ends"][last] += 1


def _end_where_text_is(arrays: Arrays) -> None:
    arrays["finish"][1] = Finish.STOP


@pytest.mark.parametrize(
    ("change", "array"),
    [
        (_drop_answer, "segment_ids or answer_index"),
        (_answer_to_no_prompt, "segment_ids or answer_index"),
        (_third_number, "segment_ids or answer_index"),
        (_other_bytes, "byte_ends"),
        (_counted_end, "byte_ends"),
        (_end_where_text_is, "byte_ends"),
    ],
)
def test_answers_that_are_not_the_plans_are_told(
    tmp_path: Path, change: Callable[[Arrays], None], array: str
) -> None:
    run_file = _run(tmp_path, change={0: change})
    damage, last = found_wrong("verify", run_file).splitlines()
    assert f"shard 0, array {array}" in damage
    assert last == "generated/s: 2 shards sound, 1 damaged, 0 missing"


def test_the_number_of_answers_is_left_open_where_the_manifest_does_not_say(
    tmp_path: Path,
) -> None:
    _run(tmp_path, change={0: _drop_answer})
    (place,) = find_places(str(store_folder(tmp_path, "generated")))
    assert list(verify_store(place).damaged) == [0]
    _run(tmp_path / "b", change={0: _drop_answer}, settings={})
    (place,) = find_places(str(store_folder(tmp_path / "b", "generated")))
    assert verify_store(place).is_whole


@pytest.mark.parametrize("claim", [10**30, -1, True, "2", [2], 0])
def test_a_claimed_number_of_answers_never_makes_room(tmp_path: Path, claim: object) -> None:
    _run(tmp_path, settings={"answers": claim})
    (place,) = find_places(str(store_folder(tmp_path, "generated")))
    assert verify_store(place).is_whole == (type(claim) is not int)


def test_every_array_of_answers_is_under_a_checksum_and_repaired(tmp_path: Path) -> None:
    run_file = _run(tmp_path)
    for name in ("answer_index", "finish", "token_counts", "token_ranks", "token_bytes"):
        flip(data_file(tmp_path, 0, name, "generated"), 3)
        assert f"shard 0, array {name}, chunk 0" in found_wrong("verify", run_file)
        flip(data_file(tmp_path, 0, name, "generated"), 3)
    flip(data_file(tmp_path, 0, "finish", "generated"), 3)
    assert ok("repair", run_file).splitlines()[-1] == (
        f"to write them again: logitfuse extract generate {run_file} --source s"
    )
    assert "missing shards: 0" in found_wrong("verify", run_file)
    assert "1 folder(s)" in ok("gc", run_file, "--older-than", "0")


def test_a_copy_is_the_same_store(tmp_path: Path) -> None:
    _run(tmp_path)
    copy = tmp_path / "copy"
    ok("copy", store_folder(tmp_path, "generated"), copy)
    assert ok("verify", copy, "--plan", tmp_path / "run/plan").endswith(
        "3 shards sound, 0 damaged, 0 missing\n"
    )


# ------------------------------------------------------------------------------- stats


def test_reasons_positions_and_bytes_are_counted(tmp_path: Path) -> None:
    run_file = _run(tmp_path)
    (found,) = json.loads(ok("stats", run_file, "--json"))["stores"]
    endings = Counter(finish.name.lower() for pair in ANSWERS.values() for _, finish in pair)
    assert found["finishes"] == {
        finish.name.lower(): endings[finish.name.lower()] for finish in Finish
    }
    ended = (Finish.STOP, Finish.EMPTY)
    expected = {domain: {"positions": 0, "bytes": 0} for domain in DOMAINS}
    for row, pair in ANSWERS.items():
        sums = expected[DOMAINS[row % 2]]
        sums["bytes"] += sum(len(text) for text, _ in pair)
        sums["positions"] += sum(len(text) + (finish in ended) for text, finish in pair)
    assert found["domains"] == expected
    assert found["positions_read"] == sum(d["positions"] for d in expected.values())
    assert found["entries"] == 0
    assert not {"entries_per_position", "kept_mass", "origins"} & found.keys()
    text = ok("stats", run_file)
    assert "8 answers ended: 2 stop (25.0%), 1 stop text (12.5%), 2 length (25.0%)" in text
    assert "entries" not in text
    table = [line.split() for line in text.splitlines() if line.split()[:1] == ["code"]]
    assert table == [["code", *(str(expected["code"][name]) for name in ("positions", "bytes"))]]


def test_a_store_of_answers_without_shards(tmp_path: Path) -> None:
    run_file = _run(tmp_path, leave_out=[0, 1, 2])
    (found,) = json.loads(ok("stats", run_file, "--json"))["stores"]
    assert (found["positions_read"], found["domains"]) == (0, {})
    assert "answers ended" not in ok("stats", run_file)


# ------------------------------------------------------------------------------- show


def test_an_answer_is_shown_after_its_prompt(tmp_path: Path) -> None:
    run_file = _run(tmp_path)
    lines = ok("show", run_file, "--segment", "d0#0", "--answer", 1).splitlines()
    assert "segment d0#0, answer 1 (row 0" in lines[0]
    assert "2 answers, this one ended: length)" in lines[0]
    assert lines[2:4] == ["prompt: Write a function", "  that adds. \\x1b[31m\\u202e<script>"]
    assert lines[5].split() == ["token", "id"]
    assert [line.split()[1:] for line in lines[6:]] == [
        [token, str(byte + 1)]
        for token, byte in zip(['"c"', '"a"', '"f"', '"\\xc3"'], b"caf\xc3", strict=True)
    ]
    ended = ok("show", run_file, "--segment", 0).splitlines()
    assert "answer 0 (row 0" in ended[0]
    assert ended[-1].split()[1:] == ['"<s>"', "0"]
    assert ok("show", run_file, "--segment", "d4#0").splitlines()[2:4] == [
        "system: Be brief.",
        "user: Hi",
    ]


def test_answers_without_tokens_and_without_a_plan(tmp_path: Path) -> None:
    run_file = _run(tmp_path)
    output = ok("show", run_file, "--segment", "d5#0")
    assert "ended: prompt too long): 0 bytes, 0 positions\n" in output
    bare = tmp_path / "bare"
    store_folder(tmp_path, "generated").rename(bare)
    alone = ok("show", bare, "--segment", 4, "--answer", 1)
    assert "row 4, answer 1" in alone
    assert "prompt:" not in alone
    assert len(ok("show", bare).splitlines()) == 10


def test_answers_are_listed(tmp_path: Path) -> None:
    run_file = _run(tmp_path)
    head, titles, *lines = ok("show", run_file).splitlines()
    assert "--answer" in head
    assert titles.split() == ["row", "segment", "domain", "bytes", "answer", "ended", "text"]
    found = [line.split()[:5] for line in lines]
    assert found == [
        [str(row), f"d{row}#0", ("code", "prose")[row % 2], str(len(text)), str(number)]
        for row, answers in ANSWERS.items()
        for number, (text, _) in enumerate(answers)
    ]
    assert "prompt too long" in lines[4]
    assert "<b>\\x1b[31m \\xff END" in lines[3]


def test_answers_that_are_not_there(tmp_path: Path) -> None:
    run_file = _run(tmp_path)
    assert "no answer 2" in refused("show", run_file, "--segment", 0, "--answer", 2)
    assert "does not begin with a prompt" in refused("show", run_file, "--segment", "d1#0")
    make_run(tmp_path / "b")
    line = refused("show", tmp_path / "b/run.yaml", "--segment", 0, "--answer", 0)
    assert "only generated stores have answers" in line


@pytest.mark.parametrize(
    ("context", "turns"),
    [
        (None, ()),
        ('{"prompt": "a"}', (("prompt", "a"),)),
        ('{"messages": []}', ()),
        ("{", (("context", "{"),)),
        ("[1]", (("context", "[1]"),)),
        ("3", (("context", "3"),)),
        ('{"messages": [3]}', (("context", '{"messages": [3]}'),)),
    ],
)
def test_turns_of_a_context(context: str | None, turns: object) -> None:
    assert prompt_turns(context) == turns


def test_the_page_shows_the_prompt_and_a_cut_answer(tmp_path: Path) -> None:
    _run(tmp_path)
    (place,) = find_places(str(store_folder(tmp_path, "generated")))
    html = page(read_segment(place, "d0#0", top=3, answer=1))
    found = Page(html)
    assert found.tokens == ["c", "a", "f", "\\xc3"]
    assert "that adds. " in html
    assert "&lt;script&gt;" in html
    assert "script" not in found.tags
    assert "\x1b" not in html
    assert "\u202e" not in html
    ended = Page(page(read_segment(place, "d0#0", top=3)))
    assert "".join(ended.tokens) == "It is.↵\n<s>"
    assert ended.panels[-1] == '"<s>"8 of 8 · id 0'
    assert "probability" not in html.split("</style>")[1]
    assert Page(page(read_segment(place, "5", top=3))).tokens == []


# ------------------------------------------------------------------------------- export


def test_answers_as_json_lines(tmp_path: Path) -> None:
    _run(tmp_path)
    reader = reader_of(tmp_path, "generated")
    out = tmp_path / "out"
    assert export_store(reader, open_location(out), "jsonl") == (3, 0)
    lines = []
    for shard in range(3):
        text = (out / f"{shard:05d}.jsonl").read_text(encoding="utf-8")
        lines += [json.loads(line) for line in text.split("\n")[:-1]]
    assert [(a["segment_id"], a["answer_index"], a["finish"], a["text"]) for a in lines] == [
        (row, number, finish.name.lower(), text.decode(errors="replace"))
        for row, answers in ANSWERS.items()
        for number, (text, finish) in enumerate(answers)
    ]
    arrays = reader.read(0)
    stop = int(arrays["token_offsets"][1])
    assert lines[0]["num_tokens"] == stop == len(ANSWERS[0][0][0]) + 1
    assert lines[0].keys() == {"segment_id", "answer_index", "finish", "text", "num_tokens"}


def test_only_answers_are_json_lines(tmp_path: Path) -> None:
    make_run(tmp_path)
    line = refused("export", store_folder(tmp_path), tmp_path / "out", "--format", "jsonl")
    assert "only generated stores have answers to write" in line
