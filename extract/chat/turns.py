"""Read messages of any published format into turns.

Formats are recognised only by the names of fields (`role` or `from`, `content` or `value`, text or a
list of parts), never by the content. A field with a value that is not used is counted by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extract.chat.form import ASSISTANT, Call, Chat, Tally, Turn
from extract.chat.text import clean_text, clean_values
from extract.chat_config import CALLING, ROLES, SAME_WORDS, ChatInput
from extract.document_error import DocumentError

ROLE_KEYS = ("role", "from", "speaker", "sender")
CONTENT_KEYS = ("content", "value", "text", "parts", "message")
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
_CALL_KEYS = ("tool_calls", "function_call")
_NAME_KEYS = ("name",)
_ID_KEYS = ("tool_call_id",)
_DECLARED = ("functionDeclarations", "function_declarations")
"""Gemini's fields with the schemas of tools."""
_CALL_BEFORE_TEXT = "text behind a call, read as before it"

PAIR_KEYS = (("human", ASSISTANT), ("input", "output"), ("user", ASSISTANT), ("question", "answer"))
"""Fields of messages that have a question and its answer in one object."""


@dataclass(frozen=True, slots=True)
class MessageReader:
    """Reads the messages of one input.

    Args:
        settings: The run file's settings for them.
        tally: Counts fields that are not used.
        where: Document and place, for messages.
    """

    settings: ChatInput
    tally: Tally
    where: str

    def chat(self, messages: Any, *, tools: Any = None) -> Chat:
        """Read a chat.

        Args:
            messages: List of messages, of (question, answer) pairs or of alternating texts; also as a
                JSON string, or as one object with a list for each field.
            tools: Schemas of tools, also as a JSON string; None or empty for none.

        Raises:
            DocumentError: It has another form; names the message.
        """
        turns: list[Turn] = []
        for number, message in enumerate(self._list(messages), 1):
            turns += self._turns(message, f"{self.where}, message {number}", len(turns))
        return Chat(tuple(turns), self.tools(tools))

    def tools(self, value: Any) -> tuple[dict[str, Any], ...]:
        """Schemas of tools in OpenAI's form."""
        value = _parsed(value)
        if value in (None, "", "null"):
            return ()
        if not (isinstance(value, Mapping) and any(name in value for name in _DECLARED)):
            value = _rows(value)
        if not value:
            return ()
        where = f"{self.where}, tools"
        listed = value if isinstance(value, list) else [value]
        cleaned = [clean_values(_parsed(tool), where) for tool in listed]
        tools = tuple(tool for item in cleaned for tool in self._tools(item, where))
        for tool in tools:
            if not isinstance(tool["function"].get("name"), str):
                fields = ", ".join(sorted(tool["function"]))
                raise _bad("a tool has no name", where, f"fields {fields}"[:80])
        return tools

    def text(self, value: Any, where: str) -> str:
        """The text of a string, a list of parts, or an object with parts."""
        if isinstance(value, Mapping):
            key = self._key(value, None, CONTENT_KEYS)
            roles = {k for k in ROLE_KEYS if value.get(k) in SAME_WORDS["system"]}
            self._unread(value, {key, *roles}, "system.")
            value = value if key is None else value[key]
        return "".join(part for part in self._parts(value, where) if isinstance(part, str))

    def bad(self, what: str, got: str) -> DocumentError:
        """An error in this row's messages."""
        return _bad(what, self.where, got)

    def _tools(self, tool: Any, where: str) -> list[dict[str, Any]]:
        """The schemas in an item of a tools list: one, or with Gemini several."""
        if not isinstance(tool, dict):
            raise _bad("tools are not a list of objects", where, type(tool).__name__)
        if isinstance(tool.get("function"), dict):
            return [tool if "type" in tool else {"type": "function"} | tool]
        for name in _DECLARED:
            if isinstance(tool.get(name), list):
                self._unread(tool, {name}, "tools.")
                return [one for inner in tool[name] for one in self._tools(inner, where)]
        if tool.get("type") not in (None, "function", "custom"):
            self.tally.unread["tools.type"] += 1
        renamed = {"input_schema": "parameters"}
        function = {renamed.get(k, k): v for k, v in tool.items() if k != "type"}
        return [{"type": "function", "function": function}]

    def _list(self, messages: Any) -> list[Any]:
        messages = _rows(_parsed(messages))
        texts = isinstance(messages, list) and all(isinstance(m, str) for m in messages)
        if texts and len(messages) > 1:
            return [
                {"role": ("user", ASSISTANT)[i % 2], "content": text}
                for i, text in enumerate(messages)
            ]
        if not isinstance(messages, list) or not all(
            isinstance(m, Mapping) or _is_exchange(m) for m in messages
        ):
            raise DocumentError(
                "messages are not a list of objects", reason="bad_messages", where=self.where
            )
        if not messages:
            raise DocumentError("no message", reason="bad_messages", where=self.where)
        return messages

    def _turns(self, message: Any, where: str, before: int) -> list[Turn]:
        if not isinstance(message, Mapping):
            message = {"human": message[0], ASSISTANT: message[1]}
        role_key = self._key(message, self.settings.role_key, ROLE_KEYS)
        if role_key is None:
            for asked, answered in PAIR_KEYS:
                if message.get(asked) is not None and message.get(answered) is not None:
                    return self._exchange(message, asked, answered, where, before)
            raise DocumentError(
                "a message has no role",
                reason="bad_messages",
                where=where,
                expected=f"one of {', '.join(ROLE_KEYS)}",
                got=f"fields {', '.join(sorted(map(str, message)))}",
                hint="name the field as corpus.inputs[].chat.role_key",
            )
        return self._spoken(message, role_key, where)

    def _exchange(
        self, message: Mapping[str, Any], asked: str, answered: str, where: str, before: int
    ) -> list[Turn]:
        turns = [
            Turn("user", _text(message[asked], where)),
            Turn(ASSISTANT, _text(message[answered], where)),
        ]
        used = [asked, answered]
        if message.get("system") and not before:
            turns.insert(0, Turn("system", clean_text(message["system"], where)))
            used.append("system")
        self._unread(message, used)
        return turns

    def _spoken(self, message: Mapping[str, Any], role_key: str, where: str) -> list[Turn]:
        role, calling = self._role(message[role_key], where)
        content_key = self._key(message, self.settings.content_key, CONTENT_KEYS)
        thought_key = self._key(message, self.settings.thought_key, THOUGHT_KEYS)
        used = {role_key, content_key, thought_key, *_CALL_KEYS, *_NAME_KEYS, *_ID_KEYS}
        self._unread(message, used)
        content = None if content_key is None else message[content_key]
        thought = None if thought_key is None else _text(message[thought_key], where)
        calls = [
            call
            for key in _CALL_KEYS
            for call in self._calls(_parsed(message.get(key)), f"{where}, {key}")
        ]
        if calling:
            calls, content = self._calls(_parsed(content), where), None
        parts = self._parts(content, where)
        if content is None and not calls and thought is None:
            raise _bad("content of a message is not text", where, type(content).__name__)
        first_call = next((i for i, part in enumerate(parts) if isinstance(part, Call)), len(parts))
        self.tally.notes[_CALL_BEFORE_TEXT] += any(isinstance(p, str) for p in parts[first_call:])
        texts = "".join(part for part in parts if isinstance(part, str))
        thoughts = "".join(part.content for part in parts if isinstance(part, _Thought))
        if thoughts and thought and thoughts.strip() != thought.strip():
            self.tally.unread[f"messages.{thought_key}"] += 1
        calls += [part for part in parts if isinstance(part, Call)]
        answers = [part for part in parts if isinstance(part, Turn)]
        name, call_id = (message.get(key) or None for key in ("name", "tool_call_id"))
        turns = list(answers)
        if texts or calls or thoughts or thought is not None or not answers:
            turns.append(
                Turn(
                    role,
                    texts,
                    thoughts or thought or None,
                    tuple(calls),
                    None if name is None else clean_text(name, where),
                    None if call_id is None else clean_text(str(call_id), where),
                )
            )
        else:
            self._unread({"name": name, "tool_call_id": call_id}, ())
        return turns

    def _role(self, value: Any, where: str) -> tuple[str, bool]:
        """The role, and whether the message's text is a tool call."""
        word = clean_text(value, f"{where}, role")
        known = self.settings.roles.get(word, word).lower()
        if known in CALLING:
            return ASSISTANT, True
        role = ROLES.get(known)
        if role is None:
            raise DocumentError(
                "unknown role of a message",
                reason="unknown_role",
                where=where,
                expected=f"one of {', '.join(ROLES)}",
                got=word[:40],
                hint="map it under corpus.inputs[].chat.roles, such as {name: user}",
            )
        return role, False

    def _key(
        self, message: Mapping[str, Any], mapped: str | None, known: tuple[str, ...]
    ) -> str | None:
        names = known if mapped is None else (mapped,)
        return next((name for name in names if message.get(name) is not None), None)

    def _unread(self, message: Mapping[str, Any], used: Any, before: str = "messages.") -> None:
        for name, value in message.items():
            if name not in used and value not in (None, "", [], {}):
                self.tally.unread[f"{before}{name}"] += 1

    def _calls(self, value: Any, where: str) -> list[Call]:
        if value in (None, ""):
            return []
        value = _rows(value)
        listed = value if isinstance(value, list) else [value]
        return [self._call(_parsed(call), where) for call in listed]

    def _call(self, call: Any, where: str) -> Call:
        own = _parsed(call.get("function")) if isinstance(call, Mapping) else None
        inner = own if isinstance(own, Mapping) else call
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise _bad("a tool call has no name", where, type(call).__name__)
        call_id = call.get("id")
        used = {"name", "arguments", "type"}
        if inner is not call:
            self._unread(call, {"id", "type", "function", "index"}, "messages.tool_calls.")
        if inner is call or call_id is None:
            used, call_id = used | {"id"}, inner.get("id")
        self._unread(inner, used, "messages.tool_calls.")
        return Call(
            clean_text(inner["name"], where),
            _arguments(inner.get("arguments"), where),
            None if call_id is None else clean_text(str(call_id), where),
        )

    def _parts(self, content: Any, where: str) -> list[_Part]:
        """The parts of a message's content, in order."""
        if content is None or content == "":
            return []
        if isinstance(content, str):
            return [clean_text(content, where)]
        content = _rows(content)
        listed = content if isinstance(content, list) else [content]
        return [part for item in listed for part in self._part(item, where)]

    def _part(self, part: Any, where: str) -> list[_Part]:
        if isinstance(part, str):
            return [clean_text(part, where)] if part else []
        if not isinstance(part, Mapping):
            raise _bad("content of a message is not text", where, type(part).__name__)
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type")
        if kind in ("thinking", "reasoning") or part.get("thought") is True:
            key = "thinking" if "thinking" in part else "text"
            text = _text(part.get(key), where)
            flag = {"thought"} if part.get("thought") is True else set()
            self._unread(part, {"type", key} | flag, "messages.content.")
            return [_Thought(text)] if text else []
        if kind == "tool_use" or "functionCall" in part:
            return [self._used(part, where)]
        if kind == "tool_result" or "functionResponse" in part:
            return [self._answer(part, where)]
        if isinstance(part.get("text"), str):
            self._unread(part, {"type", "text"}, "messages.content.")
            return self._part(part["text"], where)
        raise _bad("content of a message is not text", where, f"a part of type {kind}")

    def _used(self, part: Mapping[str, Any], where: str) -> Call:
        """A tool call that is a part of a message's content."""
        call = self._inner(part, "functionCall", where)
        key = next((key for key in ("input", "args") if call.get(key) is not None), "input")
        self._unread(call, {"type", "id", "name", key}, "messages.content.")
        call_id = call.get("id")
        return Call(
            clean_text(call.get("name"), where),
            _arguments(call.get(key), where),
            None if call_id is None else clean_text(str(call_id), where),
        )

    def _answer(self, part: Mapping[str, Any], where: str) -> Turn:
        """A tool's answer that is a part of a user message's content."""
        answer = self._inner(part, "functionResponse", where)
        held = "content" if answer.get("content") is not None else "response"
        named = "tool_use_id" if answer.get("tool_use_id") is not None else "id"
        self._unread(answer, {"type", "name", held, named}, "messages.content.")
        content = answer.get(held)
        if isinstance(content, list):
            parts = self._parts(content, where)
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                self.tally.unread[f"messages.content.{held}"] += len(parts) - len(texts)
            content = "".join(texts)
        elif isinstance(content, Mapping):
            content = json.dumps(clean_values(content, where), ensure_ascii=False)
        call_id = answer.get(named)
        return Turn(
            "tool",
            _text(content, where),
            name=_text(answer.get("name"), where) or None,
            call_id=None if call_id is None else clean_text(str(call_id), where),
        )

    def _inner(self, part: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
        """The object under a name of a part; the part itself where it has no such name."""
        if name not in part:
            return part
        self._unread(part, {name}, "messages.content.")
        held = part[name]
        if not isinstance(held, Mapping):
            raise _bad(f"{name} is not an object", where, type(held).__name__)
        return held


@dataclass(frozen=True, slots=True)
class _Thought:
    content: str


_Part = str | _Thought | Call | Turn


def _parsed(value: Any) -> Any:
    """The parsed JSON of a string with an object or a list; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _arguments(value: Any, where: str) -> dict[str, Any] | str:
    """Arguments as an object, or text if they are not an object; nulls in a JSON string are kept."""
    if isinstance(value, str):
        clean_text(value or "{}", where)
        parsed = _parsed(value)
        clean_values(parsed, where)  # only checked
        return parsed if isinstance(parsed, dict) else value
    cleaned = clean_values(value or {}, where)
    return cleaned if isinstance(cleaned, dict) else json.dumps(cleaned, ensure_ascii=False)


def _text(value: Any, where: str) -> str:
    """A checked text; "" for None."""
    return clean_text(value, where) if value not in (None, "") else ""


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, also as JSON text."""
    listed = _rows(_parsed(value))
    return (
        isinstance(listed, list)
        and bool(listed)
        and all(isinstance(m, Mapping) and any(key in m for key in ROLE_KEYS) for m in listed)
    )


def _rows(value: Any) -> Any:
    """A list of objects from an object of lists (as in `datasets`); any other value unchanged."""
    if not isinstance(value, Mapping) or not value:
        return value
    lengths = {len(part) if isinstance(part, list) else -1 for part in value.values()}
    if len(lengths) > 1 or -1 in lengths:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _is_exchange(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    )


def _bad(what: str, where: str, got: str) -> DocumentError:
    hint = None
    if any(kind in got for kind in ("image", "audio", "video", "sound", "file")):
        hint = "images and audio are not supported: leave such rows out with `corpus.on_bad: drop`"
    return DocumentError(what, reason="bad_messages", where=where, got=got, hint=hint)
