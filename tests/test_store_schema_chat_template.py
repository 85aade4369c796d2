"""Chat templates around a response: the spans are those of the chat that the template writes whole."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from store_schema.config import ModelRef, TemplateSettings
from store_schema.errors import ConfigError, NoSpanError, TokenizerError
from store_schema.text import tokenizer as tokenizer_module
from store_schema.text.chat_template import ChatTemplate, folded
from store_schema.text.tokenizer import SegmentTokenizer
from tests.chat_shapes import CALL, MESSAGES, TOOL, A, Q, said
from tests.chat_templates import LOOP, TEMPLATES, UNSOUND
from tests.published_tokenizers import tokenizer_folder
from tests.tiny import tiny_tokenizer


class Roles:
    """A tokenizer's chat template without the tokenizer."""

    def __init__(self, template: str) -> None:
        self._tokenizer = tiny_tokenizer("byte_level")
        self.chat_template = template

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        self._tokenizer.chat_template = options.pop("chat_template", self.chat_template)
        return self._tokenizer.apply_chat_template(*args, **options)


def template_of(text: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(Roles(text), TemplateSettings(**options))


def context_of(messages: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    return {"messages": messages, **others}


WORDS = st.text("ab cd\né漢</think>", min_size=1, max_size=10).filter(
    lambda text: text == text.strip()
)
TALKS = st.builds(
    lambda system, pairs, last: [
        *system,
        *(m for q, a in pairs for m in said(("user", q), ("assistant", a))),
        *said(("user", last)),
    ],
    st.lists(WORDS, max_size=1).map(lambda texts: said(*(("system", text) for text in texts))),
    st.lists(st.tuples(WORDS, WORDS), max_size=2),
    WORDS,
)


def _plainly(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    roles = template._roles
    return str(roles.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(messages=TALKS, text=WORDS, thought=st.none() | WORDS)
def test_a_response_stands_where_it_is_said_to_or_is_refused(
    kind: str, messages: list[dict[str, Any]], text: str, thought: str | None
) -> None:
    template = template_of(TEMPLATES[kind])
    reply = {} if thought is None else {"reasoning_content": thought}
    context = context_of(messages, **({"reply": reply} if reply else {}))
    refusal = None
    try:
        template.require_span(context, text, where="document d")
    except TokenizerError as error:
        refusal = error
    if refusal is not None:
        assert "document d" in refusal.line()
        if not isinstance(refusal, NoSpanError):
            assert (kind, messages[0]["role"]) == ("takes no system turn", "system")
            assert "fold_system: true" in refusal.line()
            return
        assert (kind, "</think>" in text) == ("drops thoughts of earlier turns", True)
        return
    around = template.around(context, where="d")
    thoughts = {} if thought is None else {"reasoning_content": thought, "thinking": thought}
    answer = {"role": "assistant", "content": text} | thoughts
    assert around.before + text + around.after == _plainly(template, [*messages, answer])


@pytest.mark.parametrize("kind", UNSOUND)
def test_a_response_that_is_not_written_as_it_stands_is_refused(kind: str) -> None:
    with pytest.raises(NoSpanError, match="in document d") as caught:
        template_of(UNSOUND[kind]).require_span(
            context_of(said(("user", Q))), A, where="document d"
        )
    assert caught.value.exit_code == 2


def test_a_thought_is_a_response_of_its_own() -> None:
    template = template_of(TEMPLATES["drops thoughts of earlier turns"])
    context = context_of(said(("user", Q)), reply={"content": A}, part="reasoning_content")
    template.require_span(context, "Hm.", where="d")
    assert template.around(context, where="d").before == f"<|u|>{Q}<|end|><|a|><think>"
    # A template that writes no reasoning has no place for it.
    with pytest.raises(NoSpanError, match="got 0 times"):
        template_of(TEMPLATES["plain"]).require_span(context, "Hm.", where="d")


CALLING = [
    *said(("user", Q)),
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
    {"role": "tool", "content": "04:10", "name": "high_tide", "tool_call_id": "c1"},
]
CALL_TEMPLATES = {
    "an object": "{{ c.function.name }}{{ c.function.arguments | tojson }}",
    "text": "{{ c.function.name + c.function.arguments }}",
}


@pytest.mark.parametrize("arguments", CALL_TEMPLATES)
@pytest.mark.parametrize("when", ["m.tool_calls", "m.content is none"])
def test_calls_are_given_as_the_template_takes_them(arguments: str, when: str) -> None:
    body = (
        "{% if WHEN %}{% for c in m.tool_calls %}<call>CALL</call>{% endfor %}{% else %}"
        "{{ m.role }}: {{ m.content }}\n{% endif %}"
    )
    text = LOOP.replace(
        "BODY", body.replace("WHEN", when).replace("CALL", CALL_TEMPLATES[arguments])
    )
    around = template_of(text).around(context_of(CALLING), where="d")
    assert '<call>high_tide{"port": "Kiel"}</call>tool: 04:10' in around.before


def test_what_a_template_leaves_out_is_counted_by_kind() -> None:
    messages = [*MESSAGES, *CALLING]
    messages[2] = messages[2] | {"reasoning_content": "Hm."}
    context = context_of(messages, tools=[TOOL], reply={"reasoning_content": "So."})
    left = template_of(TEMPLATES["plain"]).unwritten(context, where="d")
    assert left == {
        "tool calls": 1,
        "tools": 1,
        "thoughts": 2,
        "ids of calls": 2,
        "names of speakers": 1,
    }
    left = template_of(TEMPLATES["drops thoughts of earlier turns"]).unwritten(context, where="d")
    assert left["thoughts"] == 1
    named = TEMPLATES["plain"] + "{% for t in tools %}{{ t.function.name }}{% endfor %}"
    left = template_of(named).unwritten(context, where="d")
    assert (left["tools"], left["fields of tools"]) == (0, 1)
    whole = LOOP.replace("BODY", "{{ m }}") + "{{ tools }}"
    assert not template_of(whole).unwritten(context, where="d")
    quiet = LOOP.replace("BODY", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")
    assert template_of(quiet).unwritten(context_of(MESSAGES), where="d") == {"system turns": 1}


def test_a_folded_system_turn_stands_before_the_first_question() -> None:
    template = template_of(TEMPLATES["takes no system turn"], fold_system=True)
    template.require_span(context_of(MESSAGES[:2]), A, where="d")
    around = template.around(context_of(MESSAGES[:2]), where="d")
    assert around.before == f"<|u|>Be brief.\n\n{Q}<|end|><|a|>"
    assert template.prompt(context_of(MESSAGES[:2]), where="d") == f"<|u|>Be brief.\n\n{Q}<|end|>"
    assert not template.unwritten(context_of(MESSAGES[:2]), where="d")
    assert folded(said(("system", "S"), ("assistant", A))) == said(("user", "S"), ("assistant", A))
    assert folded(said(("user", Q))) == said(("user", Q))


DATED = (
    "{{ strftime_now('%A, %d %B %Y') }}{% if mood is defined %}{{ mood }}{% endif %}"
    + LOOP.replace("BODY", "{{ m.content }}")
)


def test_the_day_is_the_same_on_every_day_and_can_be_set() -> None:
    context = context_of(said(("user", Q)))
    assert template_of(DATED).around(context, where="d").before == f"Wednesday, 01 January 2025{Q}"
    other = template_of(DATED, date=datetime.date(2024, 7, 26), variables={"mood": "!"})
    assert other.around(context, where="d").before == f"Friday, 26 July 2024!{Q}"
    assert other.prompt(context, where="d") == f"Friday, 26 July 2024!{Q}<|a|>"


def test_what_the_run_file_says_of_a_template_is_in_the_fingerprint(tmp_path: Path) -> None:
    hf = tiny_tokenizer("byte_level")

    def fingerprint(**options: Any) -> str:
        return SegmentTokenizer(hf, name="m", template=TemplateSettings(**options)).fingerprint

    # Without a template nothing of it matters.
    assert fingerprint() == fingerprint(fold_system=True)
    hf.chat_template = DATED
    (tmp_path / "other.jinja").write_text(TEMPLATES["plain"])
    found = {
        fingerprint(),
        fingerprint(date="2024-07-26"),
        fingerprint(variables={"mood": "!"}),
        fingerprint(fold_system=True),
        fingerprint(file=str(tmp_path / "other.jinja")),
    }
    assert len(found) == 5
    # What is spelled out and is the default anyway changes nothing.
    assert fingerprint() == fingerprint(date="2025-01-01", variables={}, fold_system=False)


def test_a_store_from_before_templates_had_settings_is_still_its_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The identity by default holds what it held then: the template's text, no settings."""
    hf = tiny_tokenizer("byte_level")
    hf.chat_template = TEMPLATES["plain"]
    tokenizer = SegmentTokenizer(hf, name="m")
    parts: list[Any] = []

    def keep(canonical: bytes) -> str:
        parts.extend(json.loads(canonical))
        return "kept"

    monkeypatch.setattr(tokenizer_module, "fingerprint_of", keep)
    assert tokenizer.fingerprint == "kept"
    assert tuple(parts[-2:]) == (TEMPLATES["plain"], [list(tokenizer.bos_ids), False, False])


def test_another_template_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATES["plain"])
    hf = tiny_tokenizer("byte_level")
    chat = {"messages": said(("user", Q))}
    for settings_of in (None, TemplateSettings(file=str(tmp_path / "own.jinja"))):
        tokenizer = SegmentTokenizer(hf, name="m", template=settings_of)
        if settings_of is None:
            with pytest.raises(TokenizerError, match="chat template"):
                tokenizer.context_ids(json.dumps(chat), where="s")
            continue
        ids = tokenizer.context_ids(json.dumps(chat), where="s")
        assert hf.decode(ids) == f"<|u|>{Q}<|end|>\n<|a|>"
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == TEMPLATES["plain"]
    with pytest.raises(ConfigError, match="chat template cannot be read"):
        template_of("", file=str(tmp_path / "gone.jinja"))


def test_settings_that_the_stages_set_are_refused() -> None:
    for name in ("tools", "continue_final_message", "return_dict"):
        with pytest.raises(ValueError, match=f"{name}: set by logitfuse"):
            ModelRef(model="m", template={"variables": {name: []}})  # type: ignore[arg-type]


def test_the_space_of_a_text_is_not_written_twice() -> None:
    hf = tiny_tokenizer("unigram")
    hf.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    tokenizer = SegmentTokenizer(hf, name="m")
    assert tokenizer.puts_space
    ids = tokenizer.context_ids(json.dumps({"messages": said(("user", Q))}), where="s")
    assert ids == tuple(tokenizer.encode_text([f"user: {Q} assistant:"])[0])


@pytest.mark.parametrize(
    ("family", "refused"),
    [
        ("deepseek_v3", set()),
        ("gemma3", {"tools"}),
        ("llama3_1", {"none"}),
        ("qwen3", {"</think>"}),
    ],
)
def test_published_templates(family: str, refused: set[str]) -> None:
    folder = tokenizer_folder(family)
    if folder is None:
        pytest.skip("fetch them with `python tests/published_tokenizers.py`")
    hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate(hf, TemplateSettings())
    contexts = {
        "one": context_of(said(("user", Q))),
        "system": context_of(MESSAGES[:2]),
        "turns": context_of(MESSAGES[:4]),
        "thought": context_of(said(("user", Q)), reply={"reasoning_content": "Hm."}),
        "tools": context_of(CALLING, tools=[TOOL]),
    }
    for name, context in contexts.items():
        try:
            template.require_span(context, A, where=name)
        except TokenizerError:
            assert name in refused
            continue
        assert name not in refused
        around = template.around(context, where=name)
        given = template._conversation(context, name)
        thought = context.get("reply", {})
        whole = hf.apply_chat_template(
            [*given, {"role": "assistant", "content": A, **thought}],
            tools=context.get("tools"),
            tokenize=False,
        )
        assert around.before + A + around.after == whole
        written = template.unwritten(context, where=name)
        if name in ("one", "system", "turns"):
            assert not written
        if family == "qwen3":
            assert set(written) <= {"ids of calls", "names of speakers"}
    if "</think>" in refused:
        with pytest.raises(NoSpanError):
            template.require_span(contexts["one"], "a</think>b", where="d")
