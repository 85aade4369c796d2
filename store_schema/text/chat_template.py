"""Render a model's chat template, and split the result into text before and after a response.

A template is a program: it may trim, merge turns, move the system message or leave reasoning out. So
its output is not parsed. The chat is rendered with a unique mark in place of the response; the text
before and after the mark is the text before and after the response. This is checked by rendering the
chat with the response itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store_schema.config import TemplateSettings
from store_schema.errors import ConfigError, NoSpanError, TokenizerError

ASSISTANT, SYSTEM, USER = "assistant", "system", "user"
_THOUGHT_KEYS = ("reasoning_content", "thinking")
"""Names that templates use for the reasoning before an answer."""
_TOOLS, _TOOL_FIELDS = "tools", "fields of tools"
_DROP = "change the messages, or leave such documents out with `corpus.on_bad: drop`"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Around:
    """Rendered text around a response: `before` + response + `after` is the rendered chat."""

    before: str
    after: str


class ChatTemplate:
    """The chat template of one model.

    A context is a dict with `messages`, the turns before the response. It may also have `tools`,
    `reply` (other fields of the response's message) and `part` (the field of that message which is the
    response; `content` by default).
    """

    def __init__(self, roles: Any, settings: TemplateSettings) -> None:
        """The template of a tokenizer.

        Args:
            roles: A transformers tokenizer, for its chat template and special tokens.
            settings: The run file's settings of the template.

        Raises:
            ConfigError: The file with another template cannot be read.
        """
        self._roles = roles
        self._settings = settings
        self._own = None if settings.file is None else _read(settings.file)
        self._last: tuple[Mapping[str, Any], Around] | None = None

    @property
    def text(self) -> Any:
        """The template's source; None for a model without one."""
        return getattr(self._roles, "chat_template", None) if self._own is None else self._own

    def around(self, context: Mapping[str, Any], *, where: str) -> Around:
        """The rendered text before and after a response.

        Raises:
            TokenizerError: There is no template, or it refuses the messages.
            NoSpanError: The response is not exactly once in the rendered chat.
        """
        last = self._last
        if last is not None and last[0] == context:
            return last[1]
        messages, mark = self._conversation(context, where), _unused_mark(context)
        whole = self._render([*messages, _reply(context, mark)], context, where)
        if not whole:
            raise TokenizerError("the chat template renders the messages to nothing", where=where)
        before, found, after = whole.partition(mark)
        if not found or mark in after:
            raise NoSpanError(
                "the response cannot be located in the rendered chat",
                where=where,
                expected="the response once",
                got=f"{whole.count(mark)} times",
                hint=_DROP,
            )
        around = Around(before, after)
        self._last = (context, around)
        return around

    def prompt(self, context: Mapping[str, Any], *, where: str) -> str:
        """The prompt for generation: the rendered chat up to where the model begins to answer."""
        messages = self._conversation(context, where)
        return self._render(messages, context, where, add_generation_prompt=True)

    def require_span(self, context: Mapping[str, Any], text: str, *, where: str) -> None:
        """Check that the chat rendered with a response is `before` + response + `after`.

        Raises:
            NoSpanError: It is not; shows where they differ.
            TokenizerError: See `around`.
        """
        around = self.around(context, where=where)
        messages = self._conversation(context, where)
        whole = self._render([*messages, _reply(context, text)], context, where)
        expected = around.before + text + around.after
        if whole != expected:
            pairs = enumerate(zip(whole, expected, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(expected)))
            raise NoSpanError(
                "the chat template changes the response",
                where=where,
                expected=repr(expected[max(at - 12, 0) : at + 24]),
                got=repr(whole[max(at - 12, 0) : at + 24]),
                hint=_DROP,
            )

    def unwritten(self, context: Mapping[str, Any], *, where: str) -> Counter[str]:
        """How many parts of a chat the template leaves out, by kind.

        Every content, thought and name is replaced by a unique mark, and the marks are looked for in
        the rendered chat. If the template refuses that, the values themselves are looked for.
        """
        messages = self._conversation(context, where)
        reply = _reply(context, "response")
        tools = context.get("tools", [])
        marked, marks = _marked([*messages, reply], tools)
        try:
            whole = self._render(marked[0], {"tools": marked[1]}, where)
        except TokenizerError:
            whole = self._render([*messages, reply], context, where)
            marks = list(_values([*messages, reply], tools))
        missing = Counter(kind for kind, mark in marks if mark not in whole)
        if missing[_TOOLS]:
            del missing[_TOOL_FIELDS]  # left out with their tools
        names = list(_names([*messages, reply]))
        plain = self._render([*messages, reply], context, where) if names else ""
        missing.update(kind for kind, value in names if value not in plain)
        return missing

    def _conversation(self, context: Mapping[str, Any], where: str) -> list[Message]:
        """The messages before the response, in the form that this template accepts."""
        messages = [dict(message) for message in context["messages"]]
        if self._settings.fold_system:
            messages = folded(messages)
        for message in messages:
            if "reasoning_content" in message:
                message.update(dict.fromkeys(_THOUGHT_KEYS, message["reasoning_content"]))
        if not any(message.get("tool_calls") for message in messages):
            return messages
        return self._with_calls(messages, context, where)

    def _with_calls(
        self, messages: list[Message], context: Mapping[str, Any], where: str
    ) -> list[Message]:
        """The messages in the form of tool calls that the template supports.

        Templates differ in whether a turn with only calls has content "" or null, and whether arguments
        are an object or its JSON text. The first form with which all calls are rendered is taken.
        """
        first, refusal = None, None
        for variant in _call_variants(messages):
            marked, marks = _marked(variant, [])
            try:
                whole = self._render([*marked[0], _reply(context, "x")], context, where)
            except TokenizerError as error:
                refusal = refusal or error
                continue
            if all(mark in whole for kind, mark in marks if kind == "tool calls"):
                return variant
            first = first or variant
        if first is None and refusal is not None:
            raise refusal
        return first or messages

    def _render(
        self,
        messages: Sequence[Message],
        context: Mapping[str, Any],
        where: str,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        if self.text is None:
            raise TokenizerError(
                "messages need a chat template",
                where=where,
                hint="use a chat model, name a template file (`template: {file: ...}` beside the "
                "model), or map columns to prompt and response",
            )
        try:
            return self._apply(messages, context, add_generation_prompt)
        except Exception as error:  # a template is a program and may raise anything
            if type(error).__name__ == "TemplateSyntaxError":
                file = self._settings.file
                raise TokenizerError(
                    "the chat template cannot be read",
                    where=where if file is None else file,
                    got=str(error)[:160],
                    hint="correct it, or name another file: `template: {file: ...}` beside the model",
                ) from error
            raise TokenizerError(
                "the chat template refuses the messages",
                where=where,
                got=f"{type(error).__name__}: {str(error)[:160]}",
                hint=self._suggest_fix(messages, context, add_generation_prompt),
            ) from error

    def _apply(
        self, messages: Sequence[Message], context: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        settings = self._settings
        own = {} if self._own is None else {"chat_template": self._own}
        rendered = self._roles.apply_chat_template(
            list(messages),
            tools=context.get("tools") or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **own,
            # Templates that ask for today's date always get the same one.
            **({"strftime_now": settings.date.strftime} | settings.variables),
        )
        return str(rendered)

    def _suggest_fix(
        self, messages: Sequence[Message], context: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        """The error's hint: `fold_system` if the template accepts the messages with it."""
        if messages and messages[0]["role"] == SYSTEM:
            try:
                self._apply(folded(list(messages)), context, add_generation_prompt)
            except Exception:  # then the system message is not the cause
                return _DROP
            return "put `template: {fold_system: true}` beside the model: it has no system role"
        return _DROP


def folded(messages: list[Message]) -> list[Message]:
    """The messages with the system message moved to the beginning of the first user message."""
    if not messages or messages[0]["role"] != SYSTEM:
        return messages
    system, *rest = messages
    if not rest or rest[0]["role"] != USER:
        return [{"role": USER, "content": system["content"]}, *rest]
    return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "chat template cannot be read", where="template.file", got=f"{file}: {error}"
        ) from error


def _reply(context: Mapping[str, Any], text: str) -> Message:
    """The assistant's message with a response."""
    part = context.get("part", "content")
    message = {"role": ASSISTANT, "content": "", **context.get("reply", {}), part: text}
    if "reasoning_content" in message:
        message.update(dict.fromkeys(_THOUGHT_KEYS, message["reasoning_content"]))
    return message


def _unused_mark(context: Mapping[str, Any]) -> str:
    """A word that is not in the chat."""
    whole, number = json.dumps(context, ensure_ascii=False), 0
    while f"Qz{number}response{number}zQ" in whole:
        number += 1
    return f"Qz{number}response{number}zQ"


def _call_variants(messages: list[Message]) -> Iterator[list[Message]]:
    for as_text in (False, True):
        for empty in ("", None):
            yield [_call_variant(message, empty, as_text) for message in messages]


def _call_variant(message: Message, empty: str | None, as_text: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if as_text and not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append(call | {"function": function})
    return message | {"content": message["content"] or empty, "tool_calls": calls}


def _values(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    """All contents, thoughts, calls and tools of a chat as (kind, text)."""
    for message in messages:
        if message["content"]:
            yield f"{message['role']} turns", message["content"].strip()
        if message.get("reasoning_content"):
            yield "thoughts", message["reasoning_content"].strip()
        for call in message.get("tool_calls") or []:
            yield "tool calls", call["function"]["name"]
    for tool in tools:
        yield _TOOLS, str(tool["function"].get("name", ""))


def _names(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """Ids of calls and names of speakers as (kind, text). They are not replaced by marks, since
    templates may check them."""
    for message in messages:
        ids = [call.get("id") for call in message.get("tool_calls") or []]
        for value in (*ids, message.get("tool_call_id")):
            if value is not None:
                yield "ids of calls", value
        if "name" in message:
            yield "names of speakers", message["name"]


def _marked(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> tuple[tuple[list[Message], list[dict[str, Any]]], list[tuple[str, str]]]:
    """The same chat with a mark in place of every content, thought and name; and (kind, mark) of
    all."""
    marks: list[tuple[str, str]] = []

    def mark(kind: str) -> str:
        marks.append((kind, f"Qz{len(marks)}mark{len(marks)}zQ"))
        return marks[-1][1]

    marked_messages = []
    for message in messages:
        message = dict(message)
        if message["content"]:
            message["content"] = mark(f"{message['role']} turns")
        if message.get("reasoning_content"):
            message.update(dict.fromkeys(_THOUGHT_KEYS, mark("thoughts")))
        if message.get("tool_calls"):
            message["tool_calls"] = [
                call | {"function": call["function"] | {"name": mark("tool calls")}}
                for call in message["tool_calls"]
            ]
        marked_messages.append(message)
    marked_tools = []
    for tool in tools:
        function = _with_marks(tool["function"], ("name", "parameters"), mark)
        marked_tools.append(
            _with_marks(tool, ("type", "function"), mark)
            | {"function": function | {"name": mark(_TOOLS)}}
        )
    return (marked_messages, marked_tools), marks


def _with_marks(
    description: Mapping[str, Any], unmarked: tuple[str, ...], mark: Callable[[str], str]
) -> dict[str, Any]:
    """A tool's description with a mark in place of every plain value, except of the `unmarked` keys."""
    return {
        key: value if key in unmarked or isinstance(value, dict | list) else mark(_TOOL_FIELDS)
        for key, value in description.items()
    }
