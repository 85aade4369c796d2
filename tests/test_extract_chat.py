"""Chats in published shapes: the same roles, contexts and responses whatever the shape."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.chat.form import Call, Chat, Tally, Turn
from extract.chat.responses import response_texts
from extract.chat.turns import MessageReader
from extract.chat_config import ChatInput
from extract.cli import corpus
from extract.corpus.corpus import build_corpus, corpus_location, iter_documents, read_documents
from extract.corpus.documents import Document
from store_schema.config import TemplateSettings, load_run
from store_schema.text.chat_template import ChatTemplate
from tests.chat_shapes import (
    A2,
    CALL,
    MESSAGES,
    PUBLISHED,
    Q2,
    SYSTEM,
    TOOL,
    WITH_TOOLS,
    A,
    Q,
    said,
)
from tests.command import ok, refused
from tests.extract_runs import write_jsonl, write_run
from tests.tiny import tiny_tokenizer

NO_MODELS = {name: Path("none") for name in ("code", "target")}


def run_of(folder: Path, file: Path, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    entry = {"path": str(file), "domain": "chat", "split": "train", **options}
    return write_run(folder, NO_MODELS, corpus={"inputs": [entry]})


def documents_of(path: Path) -> list[Document]:
    run = load_run(path)
    record, _ = build_corpus(run)
    return list(iter_documents(read_documents(corpus_location(run), record)))


def seen(documents: list[Document]) -> list[tuple[Any, str]]:
    found = []
    for document in documents:
        context = json.loads(document.context or "{}")
        found.append((context.get("messages", context.get("prompt")), document.text))
    return found


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_published_shape(tmp_path: Path, shape: str) -> None:
    row, expected = PUBLISHED[shape]
    documents = documents_of(run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", [row])))
    assert seen(documents) == expected
    tools = [json.loads(d.context or "{}").get("tools") for d in documents]
    assert tools == [[TOOL] if any(expected is t for t in WITH_TOOLS) else None] * len(documents)


@pytest.mark.parametrize("shape", ["messages", "sharegpt", "parts", "tool calls", "texts"])
@pytest.mark.parametrize("kind", ["parquet", "array", "lines"])
def test_files_hold_them_alike(tmp_path: Path, shape: str, kind: str) -> None:
    row, expected = PUBLISHED[shape]
    rows = [{"id": str(i), **row} for i in range(3)]
    text = [json.dumps(r) for r in rows]
    file = tmp_path / ("c.parquet" if kind == "parquet" else "c.json")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(f"[\n{', '.join(text)} ]\n" if kind == "array" else "\n".join(text))
    assert seen(documents_of(run_of(tmp_path, file))) == expected * 3


@pytest.mark.parametrize("shape", ["messages", "sharegpt"])
def test_a_struct_of_large_strings_is_read_as_a_list(tmp_path: Path, shape: str) -> None:
    row, expected = PUBLISHED[shape]
    [(name, messages)] = row.items()
    fields = list(messages[0])
    lists = [{key: [m[key] for m in messages] for key in fields}]
    kind = pa.struct([(key, pa.list_(pa.large_string())) for key in fields])
    table = pa.table({"id": pa.array(["a"], pa.large_string()), name: pa.array(lists, kind)})
    pq.write_table(table, tmp_path / "c.parquet")
    assert seen(documents_of(run_of(tmp_path, tmp_path / "c.parquet"))) == expected


WORDS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda text: bool(text.strip()))
NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
CALLS = st.builds(
    Call,
    NAMES,
    st.dictionaries(NAMES, WORDS | st.integers(0, 9) | st.lists(WORDS, max_size=2), max_size=2),
    st.none() | NAMES,
)
TURNS = st.one_of(
    st.builds(Turn, st.sampled_from(["user", "system"]), WORDS),
    st.builds(Turn, st.just("assistant"), WORDS, st.none() | WORDS),
    st.builds(
        Turn,
        st.just("assistant"),
        st.just("") | WORDS,
        st.none() | WORDS,
        st.lists(CALLS, min_size=1, max_size=2).map(tuple),
    ),
    st.builds(Turn, st.just("tool"), WORDS, name=st.none() | NAMES, call_id=st.none() | NAMES),
)
CHATS = st.lists(TURNS, min_size=1, max_size=5).map(lambda turns: Chat(tuple(turns)))


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    text = message["content"]
    return message | {"content": [{"type": "text", "text": part} for part in (text[:1], text[1:])]}


def _as_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    renamed = {"role": "from", "content": "value", "reasoning_content": "thinking"}
    return {renamed.get(key, key): value for key, value in message.items()}


def _as_blocks(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        block = {"type": "tool_result", "content": message["content"]}
        block |= {"name": message["name"]} if "name" in message else {}
        block |= {"tool_use_id": message["tool_call_id"]} if "tool_call_id" in message else {}
        return {"role": "user", "content": [block]}
    blocks = []
    if "reasoning_content" in message:
        blocks.append({"type": "thinking", "thinking": message["reasoning_content"]})
    if message["content"]:
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", []):
        inner = call["function"]
        blocks.append(
            {"type": "tool_use", "name": inner["name"], "input": inner["arguments"]}
            | ({"id": call["id"]} if "id" in call else {})
        )
    return {"role": message["role"], "content": blocks}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    empty = {} if message["content"] else {"content": None}
    return message | empty | ({"tool_calls": calls} if calls else {})


def _filled(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every message with the fields of all, null where it has none: as Arrow's structs are read."""
    names = {key for message in messages for key in message}
    return [dict.fromkeys(names) | message for message in messages]


WRITERS: dict[str, Any] = {
    "as it is": lambda messages: messages,
    "json": json.dumps,
    "filled": _filled,
    "struct of lists": lambda messages: {
        key: [m[key] for m in _filled(messages)] for key in _filled(messages)[0]
    },
    "parts": lambda messages: [_as_parts(m) for m in messages],
    "sharegpt": lambda messages: [_as_sharegpt(m) for m in messages],
    "blocks": lambda messages: [_as_blocks(m) for m in messages],
    "text arguments": lambda messages: [_with_text_arguments(m) for m in messages],
}


@pytest.mark.parametrize("shape", WRITERS)
@settings(max_examples=40)
@given(chat=CHATS)
def test_any_chat_is_the_same_in_every_shape(shape: str, chat: Chat) -> None:
    tally = Tally()
    reader = MessageReader(ChatInput(), tally, "here")
    assert reader.chat(WRITERS[shape]([turn.message() for turn in chat.turns])) == chat
    assert not tally.unread


@settings(max_examples=60)
@given(chat=CHATS, thoughts=st.sampled_from(["context", "train", "drop"]))
def test_every_response_is_a_turns_own_with_all_before_it(chat: Chat, thoughts: Any) -> None:
    turns = (Turn("user", "first"), *chat.turns, Turn("assistant", "last"))
    found = response_texts(Chat(turns), None, thoughts, Tally(), "here")
    own = [t for t in turns if t.role == "assistant"]
    wanted = [t.content.strip() for t in own if t.content]
    texts = [f.text for f in found if "part" not in f.context]
    assert texts == wanted
    parts = [f.text for f in found if "part" in f.context]
    assert parts == [t.thought.strip() for t in own if t.thought and thoughts == "train"]
    for response in found:
        before = response.context["messages"]
        whole = [turn.message() for turn in turns[: len(before)]]
        if thoughts == "drop":
            whole = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in whole]
        assert before == whole
        turn = turns[len(before)]
        assert response.text in (turn.content.strip(), (turn.thought or "").strip())
        assert bool(turn.calls) == ("goes_on" in response.context) or "part" in response.context


def test_what_no_stage_looks_at_is_named_and_counted(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": Q, "weight": 0, "name": "ann"},
        {"role": "assistant", "content": A, "refusal": None, "annotations": [1]},
    ]
    rows = [{"id": str(i), "messages": messages, "source": "web", "empty": None} for i in range(2)]
    file = write_jsonl(tmp_path / "c.jsonl", rows)
    said_of = "messages.weight 2, messages.annotations 2, source 2"
    out = ok("corpus", "build", run_of(tmp_path, file))
    assert f"not read, values by column or field: {said_of}" in out
    assert "c.jsonl: 2 rows as messages" in out
    # Columns of a table are not even read, and counted all the same.
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    out = ok("corpus", "build", run_of(tmp_path, tmp_path / "c.parquet"))
    [line] = [line for line in out.splitlines() if line.startswith("not read")]
    named = dict(part.rsplit(" ", 1) for part in line.split(": ")[1].split(", "))
    assert named == {
        "messages.weight": "2",
        "messages.annotations": "2",
        "source": "2",
        "empty": "2",
    }


ASK, ANSWER = MESSAGES[1], MESSAGES[2]
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]}
TOLD = {"role": "tool", "content": "04:10"}
THOUGHTFUL = {**ANSWER, "reasoning_content": "Hm.", "name": "bo", "tool_calls": [CALL]}
LEFT: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "another system turn": ({"messages": MESSAGES[:3], "system": "Sing."}, {"system"}, set()),
    "the same system turn": ({"messages": MESSAGES[:3], "system": SYSTEM}, set(), set()),
    "two system columns": (
        {"messages": [ASK, ANSWER], "system": SYSTEM, "system_prompt": "Sing."},
        {"system_prompt"},
        set(),
    ),
    "two columns of tools": (
        {"messages": [ASK, ANSWER], "tools": [TOOL], "functions": [TOOL]},
        {"functions"},
        set(),
    ),
    "a response behind an answer": (
        {"messages": [ASK, ANSWER], "response": A2},
        {"response"},
        set(),
    ),
    "a prompt of another chat": ({"prompt": Q2, "chosen": [ASK, ANSWER]}, {"prompt"}, set()),
    "the chat's own prompt": ({"prompt": [ASK], "chosen": [ASK, ANSWER]}, set(), set()),
    "empty columns": (
        {"instruction": Q, "input": "", "output": A, "history": [], "tags": [], "meta": {}},
        set(),
        set(),
    ),
    "turns behind": (
        {"messages": [ASK, ANSWER, ASK, CALLING, TOLD]},
        set(),
        {"3 turns behind the last response, not read"},
    ),
    "a call behind": (
        {"messages": [ASK, THOUGHTFUL]},
        set(),
        {"1 tool calls behind the last response, not read"},
    ),
    "a call behind a completion": (
        {"prompt": [ASK], "completion": [THOUGHTFUL]},
        set(),
        {"1 tool calls behind the last response, not read"},
    ),
    "a message and nothing before it": (
        {"prompt": "", "response": [THOUGHTFUL]},
        {"messages.name"},
        {"1 thoughts left out", "1 tool calls behind the last response, not read"},
    ),
    "two thoughts": (
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "Hm."}, A],
                    "thinking": "So.",
                },
            ]
        },
        {"messages.thinking"},
        set(),
    ),
    "parts of calls": (
        {
            "messages": [
                ASK,
                {
                    "role": "model",
                    "parts": [
                        {"text": "Hm.", "thought": True},
                        {"functionCall": {"name": "f", "args": {}, "more": 1}, "signature": "s"},
                    ],
                },
                {
                    "role": "user",
                    "name": "ann",
                    "parts": [{"functionResponse": {"name": "f", "response": {"a": 1}}, "more": 1}],
                },
                ANSWER,
            ]
        },
        {"messages.content.more", "messages.content.signature", "messages.name"},
        {"1 tool calls, read and not trained on"},
    ),
    "an id of its own": (
        {
            "messages": [
                ASK,
                {**CALLING, "tool_calls": [{"id": "c1", "function": {"name": "f", "id": "c2"}}]},
                TOLD,
                ANSWER,
            ]
        },
        {"messages.tool_calls.id"},
        {"1 tool calls, read and not trained on"},
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_goes_no_further_is_counted(tmp_path: Path, what: str) -> None:
    row, unread, notes = LEFT[what]
    run = load_run(run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", [row])))
    record, _ = build_corpus(run)
    assert record.unread.keys() == unread
    assert {f"{number} {note}" for note, number in record.notes.items()} == notes


def test_an_answer_that_is_a_message_is_the_answer_of_a_chat(tmp_path: Path) -> None:
    rows = [
        {"prompt": Q, "response": [THOUGHTFUL]},
        {"prompt": Q, "response": A, "tools": [TOOL]},
        {"prompt": [ASK], "completion": [CALLING, TOLD, ANSWER], "tools": [TOOL]},
        {"prompt": Q, "chosen": [{"role": "system", "content": SYSTEM}, CALLING, TOLD, ANSWER]},
    ]
    documents = documents_of(run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", rows)))
    assert {document.text for document in documents} == {A}
    contexts = [json.loads(document.context or "") for document in documents]
    called = [
        {"role": "assistant", "content": "", "tool_calls": CALLING["tool_calls"]},
        *said(("tool", "04:10")),
    ]
    assert contexts == [
        {
            "messages": [ASK],
            "goes_on": True,
            "reply": {"reasoning_content": "Hm.", "name": "bo"},
        },
        {"messages": [ASK], "tools": [TOOL]},
        {"messages": [ASK, *called], "tools": [TOOL]},
        {"messages": [*MESSAGES[:2], *called]},
    ]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_arguments_reach_the_template_in_their_own_order(
    tmp_path: Path, as_text: bool
) -> None:
    """A template writes them whole: in another order they are other tokens than plain transformers'."""
    values = {"to": "Kiel", "from": "Oslo", "after": {"z": 1, "a": [{"y": 2, "b": 3}]}}
    properties = {"to": {"type": "string", "enum": ["b", "a"]}, "from": {"type": "string"}}
    function = {"name": "trip", "parameters": {"type": "object", "properties": properties}}
    tools = [{"type": "function", "function": function}, {"function": function, "type": "function"}]
    arguments = json.dumps(values) if as_text else values
    calls = [{"type": "function", "function": {"name": "trip", "arguments": arguments}}]
    messages = [
        *said(("user", Q)),
        {"role": "assistant", "content": "", "tool_calls": calls},
        *said(("tool", "4"), ("assistant", A)),
    ]
    row = {"messages": messages, "tools": json.dumps(tools) if as_text else tools}
    path = run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", [row]))
    [document] = documents_of(path)
    context = json.loads(document.context or "")
    assert json.dumps(context["tools"]) == json.dumps(tools)
    [call] = context["messages"][1]["tool_calls"]
    assert json.dumps(call["function"]["arguments"]) == json.dumps(values)
    hf = tiny_tokenizer("byte_level")
    hf.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{% endfor %}"
    )
    parsed = {"type": "function", "function": {"name": "trip", "arguments": values}}
    plain = [*messages[:1], messages[1] | {"tool_calls": [parsed]}]
    around = ChatTemplate(hf, TemplateSettings()).around(context, where="d")
    written = hf.apply_chat_template([*plain, *messages[2:]], tools=tools, tokenize=False)
    assert around.before + A == written


def test_notes_say_what_is_read_and_not_trained_on(tmp_path: Path) -> None:
    messages = [
        *said(("assistant", "Hello."), ("user", Q)),
        {"role": "assistant", "content": f"{A}\n", "tool_calls": [CALL], "thinking": "Hm."},
    ]
    path = run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", [{"messages": messages}]))
    out = ok("corpus", "build", path)
    for words in (
        "1 opening turns, read and not trained on",
        "1 tool calls behind the last response, not read",
        "1 responses without the white space around them",
    ):
        assert words in out
    [document] = documents_of(path)
    assert document.text == A
    context = json.loads(document.context or "")
    assert context == {
        "messages": messages[:2],
        "reply": {"reasoning_content": "Hm."},
        "goes_on": True,
    }
    out = ok("corpus", "build", path, "--set", "corpus.thoughts=drop")
    assert "1 thoughts left out" in out
    ok("corpus", "build", path, "--set", "corpus.thoughts=train")
    thought, content = documents_of_set(path, "corpus.thoughts=train")
    assert (thought.document_id, thought.text) == ("c.jsonl/1/turn-0/thought", "Hm.")
    assert json.loads(thought.context or "")["part"] == "reasoning_content"
    assert content.text == A


def documents_of_set(path: Path, override: str) -> list[Document]:
    run = load_run(path, (override,))
    record, _ = build_corpus(run)
    return list(iter_documents(read_documents(corpus_location(run), record)))


def test_a_mapping_for_other_names(tmp_path: Path) -> None:
    row = {
        "talk": [{"who": "caller", "said": Q}, {"who": "desk", "said": A, "why": "I know."}],
        "rules": "Be brief.",
        "abilities": [TOOL],
    }
    file = write_jsonl(tmp_path / "c.jsonl", [row])
    columns = {"messages": "talk", "system": "rules", "tools": "abilities"}
    chat = {"role_key": "who", "content_key": "said", "thought_key": "why"}
    line = refused("corpus", "build", run_of(tmp_path, file, columns=columns, chat=chat))
    assert "unknown role of a message" in line
    assert "got caller" in line
    assert "corpus.inputs[].chat.roles" in line
    roles = {"caller": "user", "desk": "assistant"}
    path = run_of(tmp_path, file, columns=columns, chat={**chat, "roles": roles})
    [document] = documents_of(path)
    assert json.loads(document.context or "") == {
        "messages": said(("system", "Be brief."), ("user", Q)),
        "reply": {"reasoning_content": "I know."},
        "tools": [TOOL],
    }
    assert document.text == A


def test_a_format_that_is_asked_for_is_the_only_one(tmp_path: Path) -> None:
    row = {"question": Q, "answer": A, "text": "something else"}
    file = write_jsonl(tmp_path / "c.jsonl", [row])
    assert seen(documents_of(run_of(tmp_path, file))) == [(None, "something else")]
    path = run_of(tmp_path, file, chat={"format": "qa"})
    assert seen(documents_of(path)) == [(said(("user", Q)), A)]
    line = refused("corpus", "build", run_of(tmp_path, file, chat={"format": "dolly"}))
    assert "missing column instruction and response" in line


def test_a_text_that_is_json_is_no_list_of_messages(tmp_path: Path) -> None:
    row = {"prompt": '[{"a": 1}]', "response": '[{"b": 2}]'}
    documents = documents_of(run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", [row])))
    assert seen(documents) == [('[{"a": 1}]', '[{"b": 2}]')]


def deep(levels: int) -> dict[str, Any]:
    """A tool's schema of so many levels."""
    inner: dict[str, Any] = {}
    for _ in range(levels):
        inner = {"a": inner}
    return {"name": "sum", "parameters": inner}


def calling(arguments: str) -> list[dict[str, Any]]:
    """A chat that calls with these arguments."""
    call = {"type": "function", "function": {"name": "sum", "arguments": arguments}}
    return [MESSAGES[1], {"role": "assistant", "content": A, "tool_calls": [call]}]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, MESSAGES[2]]},
        "content of a message is not text",
    ),
    "nobody": (
        {"messages": [{"content": Q}, MESSAGES[2]]},
        "a message has no role",
    ),
    "call": (
        {
            "messages": [
                MESSAGES[1],
                {"role": "assistant", "content": A, "tool_calls": [{"id": "a"}]},
            ]
        },
        "a tool call has no name",
    ),
    "tools": ({"messages": MESSAGES, "tools": ["sum"]}, "tools are not a list of objects"),
    "nameless tool": (
        {"messages": MESSAGES, "tools": {"sum": {"description": "adds"}, "two": {}}},
        "a tool has no name",
    ),
    "deep tool": ({"messages": MESSAGES, "tools": [deep(900)]}, "nested too deep"),
    "deep arguments": ({"messages": calling(json.dumps(deep(900)))}, "nested too deep"),
    "surrogate in arguments": ({"messages": calling('{"a": "\\ud800"}')}, "lone surrogate"),
    "nul in arguments": ({"messages": calling('{"a": "x\\u0000"}')}, "NUL at character 1"),
    "answers": (
        {"prompt": said(("user", Q)), "completion": said(("user", Q), ("assistant", A2))},
        "the response has no assistant turn, or a user turn",
    ),
    "no call": (
        {"messages": [MESSAGES[1], {"role": "model", "parts": [{"functionCall": "f"}]}]},
        "functionCall is not an object",
    ),
    "nul": ({"messages": said(("user", "a\0b"), ("assistant", A))}, "NUL at character 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_named_or_dropped(tmp_path: Path, what: str) -> None:
    row, words = BAD[what]
    rows = [{"id": "good", "messages": MESSAGES}, {"id": "bad", **row}]
    path = run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", rows))
    line = refused("corpus", "build", path)
    assert words in line
    assert "document bad" in line
    out = ok("corpus", "build", path, "--set", "corpus.on_bad=drop")
    assert "dropped, by reason" in out
    # Of a dropped row nothing is counted but that it was dropped.
    assert "c.jsonl: 1 rows as messages" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"} {"text": "b"}]', "no comma"),
        ('[{"text": "a"}', "the file ends inside the list"),
        ('[{"text": }]', "bad JSON"),
        ("[1]", "not a JSON object"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "text after the list, at character 16"),
        ('[{"text": "a"}] garbage', "text after the list"),
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "c.json").write_text(content)
    line = refused("corpus", "build", run_of(tmp_path, tmp_path / "c.json"))
    assert words in line
    assert "c.json" in line


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": Q}, Q),
        ({"instruction": Q, "input": "3 + 4"}, f"{Q}\n\n3 + 4"),
        ({"prompt": Q}, Q),
    ],
)
def test_what_stands_before_a_chosen_answer(
    tmp_path: Path, row: dict[str, str], asked: str
) -> None:
    row = row | {"system": SYSTEM, "chosen": A, "rejected": "No."}
    documents = documents_of(run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", [row])))
    assert seen(documents) == [(said(("system", SYSTEM), ("user", asked)), A)]
    alone = write_jsonl(tmp_path / "d.jsonl", [{"chosen": A, "rejected": "No."}])
    line = refused("corpus", "build", run_of(tmp_path / "d", alone))
    assert "no prompt, question, instruction before the chosen answer" in line
    told = write_jsonl(tmp_path / "e.jsonl", [{"chosen": f"Human: {Q}\n\nAssistant: {A}"}])
    assert seen(documents_of(run_of(tmp_path / "e", told))) == [(said(("user", Q)), A)]


def test_a_list_may_have_space_behind_it(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('[{"text": "a"}]\r\n\n ')
    assert seen(documents_of(run_of(tmp_path, tmp_path / "c.json"))) == [(None, "a")]


@pytest.mark.parametrize("as_text", [False, True])
def test_geminis_tools_without_a_list_around_them(tmp_path: Path, as_text: bool) -> None:
    declared = {"functionDeclarations": [{"name": "f"}, {"name": "g"}]}
    row = {"messages": MESSAGES, "tools": json.dumps(declared) if as_text else declared}
    documents = documents_of(run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", [row])))
    tools = json.loads(documents[0].context or "")["tools"]
    assert [tool["function"] for tool in tools] == [{"name": "f"}, {"name": "g"}]


def test_a_map_of_parquet_is_an_object(tmp_path: Path) -> None:
    kind = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    calls = pa.list_(pa.struct([("type", pa.string()), ("function", kind)]))
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", calls)])
    call = {"type": "function", "function": {"name": "f", "arguments": [("city", "Kiel")]}}
    rows = [[
        {"role": "user", "content": Q, "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_calls": None},
        {"role": "assistant", "content": A, "tool_calls": None},
    ]]  # fmt: skip
    pq.write_table(
        pa.table({"messages": pa.array(rows, pa.list_(message))}), tmp_path / "c.parquet"
    )
    documents = documents_of(run_of(tmp_path, tmp_path / "c.parquet"))
    made = json.loads(documents[-1].context or "")["messages"][1]["tool_calls"][0]["function"]
    assert made["arguments"] == {"city": "Kiel"}


def test_what_arguments_hold_that_json_has_no_word_for_is_named(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"at": datetime.datetime(2026, 1, 1)}}}
    asked = {"role": "user", "content": Q, "tool_calls": []}
    answered = {"role": "assistant", "content": A, "tool_calls": [call]}
    table = pa.table({"messages": [[asked, answered]]})
    pq.write_table(table, tmp_path / "c.parquet")
    line = refused("corpus", "build", run_of(tmp_path, tmp_path / "c.parquet"))
    assert "a value that JSON does not have" in line
    assert "got datetime" in line


def test_other_kinds_of_tools_and_late_texts_are_counted(tmp_path: Path) -> None:
    used = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    parts = [{"type": "text", "text": "Before. "}, used, {"type": "text", "text": "After."}]
    row = {
        "messages": [MESSAGES[1], {"role": "assistant", "content": parts}],
        "tools": [{"type": "web_search_20250305", "name": "web_search"}],
    }
    path = run_of(tmp_path, write_jsonl(tmp_path / "c.jsonl", [row]))
    out = ok("corpus", "build", path)
    assert "tools.type 1" in out
    assert "1 text behind a call, read as before it" in out
    [document] = documents_of(path)
    assert document.text == "Before. After."


def test_empty_fields_are_as_none(tmp_path: Path) -> None:
    rows = [
        {"messages": [message | {"name": "", "tool_call_id": "", "tool_calls": ""}
                      for message in MESSAGES], "tools": "null"}
    ]  # fmt: skip
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"messages": MESSAGES}])
    expected = seen(documents_of(run_of(tmp_path / "a", plain)))
    empty = write_jsonl(tmp_path / "empty.jsonl", rows)
    assert seen(documents_of(run_of(tmp_path / "b", empty))) == expected


def test_roles_of_the_run_file_are_known_ones(tmp_path: Path) -> None:
    call = json.dumps({"name": "f", "arguments": {}})
    row = {"messages": [
        {"role": "caller", "content": Q},
        {"role": "act", "content": call},
        {"role": "result", "content": "4"},
        {"role": "desk", "content": A},
    ]}  # fmt: skip
    file = write_jsonl(tmp_path / "c.jsonl", [row])
    roles = {"caller": "Human", "act": "function_call", "result": "observation", "desk": "gpt"}
    documents = documents_of(run_of(tmp_path, file, chat={"roles": roles}))
    messages = json.loads(documents[-1].context or "")["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "f"
    path = run_of(tmp_path, file, chat={"roles": roles | {"desk": "usr"}})
    line = refused("corpus", "build", path)
    assert "unknown role usr: must be one of system, user, assistant, tool, function_call" in line


def test_every_shape_has_a_line_in_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "extraction.md").read_text()
    rows = Counter(
        line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")
    )
    assert len(PUBLISHED) >= 20
    assert {shape for shape in PUBLISHED if not rows[shape]} == set()


def test_a_document_is_shown_as_each_model_reads_it(tmp_path: Path) -> None:
    models = {}
    for name, template in (
        ("code", "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"),
        ("target", "{% for m in messages %}{{ m.content | upper }}{% endfor %}"),
    ):
        tokenizer = tiny_tokenizer("byte_level")
        tokenizer.chat_template = template
        models[name] = tmp_path / name
        tokenizer.save_pretrained(models[name])
    row = {
        "id": "c",
        "messages": [MESSAGES[0], {"role": "user", "content": "a\x1b[2Jb"}, MESSAGES[2]],
    }
    file = write_jsonl(tmp_path / "c.jsonl", [row, {"id": "c2", "text": "plain"}])
    entry = {"path": str(file), "domain": "chat", "split": "train"}
    path = write_run(tmp_path, models, corpus={"inputs": [entry]})
    ok("corpus", "build", path)
    result = CliRunner().invoke(corpus, ["show", str(path), "--document", "c"], color=True)
    assert result.exit_code == 0, result.output
    out = result.output
    green, yellow = "\x1b[32m\x1b[1m", "\x1b[33m\x1b[1m"
    assert f"{green}{A}\x1b[0m{yellow}</s>\x1b[0m" in out
    before = "<system>Be brief.</s>\n<user>a\\x1b[2Jb</s>\n<assistant>"
    assert f"\x1b[2m{before}\x1b[0m" in out
    assert "c/turn-0  (chat, train)" in out
    assert "-- target: the response cannot be located in the rendered chat" in out
    plain = ok("corpus", "show", path, "--document", "c2")
    assert "-- code, tokens: response" in plain
    assert "\x1b" not in plain
    assert "no such document" in refused("corpus", "show", path, "--document", "c3")
