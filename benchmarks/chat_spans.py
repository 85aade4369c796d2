"""Where templates put responses: proved by us, and looked at once more from outside.

A chat of known messages becomes documents; each model's template is asked for what stands around every
response. The whole chat as plain transformers renders it must be just that; its plain tokens say what
ends the turn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.chat_corpus import built, segment_of
from benchmarks.chat_models import ChatModel, Message
from extract.corpus.documents import Document
from store_schema.errors import LogitfuseError
from store_schema.text.prefixes import prefix_groups
from tests.chat_shapes import CALL, TOOL, said

OTHER = "Quokkas, of all."
"""Stands in no chat."""

CALLING: list[Message] = [
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c1aaaaaaa", **CALL}]},
    {"role": "tool", "content": "04:10", "tool_call_id": "c1aaaaaaa"},
]
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": said(("user", "Where is ferry 7?"), ("assistant", "At pier 3."))},
    "two turns": {
        "messages": said(
            ("user", "Where is ferry 7?"), ("assistant", "At pier 3."),
            ("user", "And ferry 8?"), ("assistant", "At pier 4."),
        )
    },
    "system": {
        "messages": said(
            ("system", "Be brief."), ("user", "Where is ferry 7?"), ("assistant", "At pier 3."),
            ("user", "Thanks."), ("assistant", "Farewell!"),
        )
    },
    "tool call": {
        "messages": [
            *said(("user", "When is high tide?")), *CALLING, *said(("assistant", "At ten past four.")),
        ],
        "tools": [TOOL],
    },
    "says and calls": {
        "messages": [
            *said(("user", "When is high tide?")),
            CALLING[0] | {"content": "I look it up."}, CALLING[1],
            *said(("assistant", "At ten past four."), ("user", "Sure?"), ("assistant", "Quite.")),
        ],
        "tools": [TOOL],
    },
    "thoughts": {
        "messages": [
            *said(("user", "Where is ferry 7?")),
            {"role": "assistant", "content": "At pier 3.", "reasoning_content": "It left pier 2."},
            *said(("user", "And ferry 8?")),
            {"role": "assistant", "content": "At pier 4.", "reasoning_content": "Pier 3 is taken."},
        ]
    },
    "white space": {
        "messages": said(
            ("user", " Where? \n"), ("assistant", "\n  At pier 3.\n\n"),
            ("user", "\tAnd 8?"), ("assistant", " At pier 4, \n\n  I think. "),
        )
    },
    "echo": {
        "messages": said(
            ("user", "Ho!"), ("assistant", "Ho!"), ("user", "Ho!"), ("assistant", "Ho!")
        )
    },
    "odd text": {
        "messages": said(
            ("user", "Write <|im_end|> and </s>, 'naïve' in 漢字."),
            ("assistant", "<|im_end|> and </s>: {{ naïve }} 漢字 👩‍👩‍👧\r\n\tx = {'a': [1]}"),
            ("user", "More."), ("assistant", "<b>&amp;</b> {% raw %}"),
        )
    },
    "end of a thought": {"messages": said(("user", "Tag?"), ("assistant", "It is </think>, I say."))},
    "opened by the assistant": {
        "messages": said(("assistant", "Hello!"), ("user", "Where is 7?"), ("assistant", "At 3."))
    },
}  # fmt: skip
"""As OpenAI has them, so that each is its own expectation."""


@dataclass
class Judged:
    """What became of the responses of one chat with one template.

    Args:
        right: Responses whose spans are right.
        refused: What was said of the first that was refused.
        faults: What is wrong with the others.
    """

    right: int = 0
    refused: str = ""
    faults: list[str] = field(default_factory=list)


def templates_proved(
    models: Sequence[ChatModel], chats: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Judged]]:
    """Every response of every chat with every template.

    Args:
        models: Templates.
        chats: By name; None takes all.

    Returns:
        By model and chat. A chat with thoughts is there twice, the second time with them as responses.
    """
    given = CHATS if chats is None else chats
    found: dict[str, dict[str, Judged]] = {model.name: {} for model in models}
    for thoughts in ("context", "train"):
        documents, _ = built(
            [{"id": name, **chat} for name, chat in given.items()], thoughts=thoughts
        )
        for name, chat in given.items():
            if thoughts == "train" and not any("reasoning_content" in m for m in chat["messages"]):
                continue
            own = [d for d in documents if d.document_id.rpartition("/turn-")[0] == name]
            shown = name if thoughts == "context" else f"{name}, trained on"
            for model in models:
                found[model.name][shown] = _judged(model, own, chat, thoughts == "train")
    return found


def _judged(
    model: ChatModel, documents: Sequence[Document], chat: Mapping[str, Any], with_thoughts: bool
) -> Judged:
    judged = Judged()
    expected = _responses(chat["messages"], with_thoughts)
    if [text for *_, text in expected] != [document.text for document in documents]:
        judged.faults.append(f"responses are {[document.text for document in documents]}")
        return judged
    for document, (at, part, _) in zip(documents, expected, strict=True):
        try:
            faults = span_faults(model, document, chat, at, part)
        except LogitfuseError as error:
            line = error.line()
            if document.document_id in line:
                judged.refused = judged.refused or line
            else:
                judged.faults.append(f"refused without its name: {line}")
            continue
        except Exception as error:  # counted like any other fault
            faults = [f"{document.document_id}: {type(error).__name__}: {error}"]
        judged.faults += faults
        judged.right += not faults
    return judged


def _responses(messages: Sequence[Message], with_thoughts: bool) -> list[tuple[int, str, str]]:
    """Message, field and text of each response that there must be."""
    parts = ("reasoning_content", "content") if with_thoughts else ("content",)
    return [
        (at, part, message[part].strip())
        for at, message in enumerate(messages)
        if at and message["role"] == "assistant"
        for part in parts
        if message.get(part, "").strip()
    ]


def span_faults(
    model: ChatModel, document: Document, chat: Mapping[str, Any], at: int, part: str
) -> list[str]:
    """What is wrong with one response.

    Args:
        model: Template and tokenizer.
        document: The response with its context.
        chat: The chat that it is of.
        at: Number of its message.
        part: Field of the message that it is.

    Raises:
        TokenizerError: The template is refused, or refuses the chat.
    """
    where, text = f"document {document.document_id}", document.text
    context = json.loads(document.context or "")
    model.ours.chat.require_span(context, text, where=where)
    around = model.ours.chat.around(context, where=where)
    [encoded] = model.ours.encode([segment_of(document)])
    calls = bool(chat["messages"][at].get("tool_calls"))
    faults = []

    wholes = _wholes(model, chat, at, part, text)
    written = around.before + text + ("" if calls else around.after)
    fitting = [w for w in wholes if (w.startswith(written) if calls else w == written)]
    if not fitting:
        faults.append(f"the chat is {wholes[:1]}, not {written!r}")
    others = _wholes(model, chat, at, part, OTHER)
    if not any(other.startswith(around.before + OTHER) for other in others):
        faults.append(f"another response stands elsewhere than behind {around.before[-40:]!r}")

    before = around.before.removesuffix(" ") if model.ours.puts_space else around.before
    read = model.tokens.decode(list(encoded.context_ids), skip_special_tokens=False)
    if read != before:
        faults.append(f"context tokens are {read[-60:]!r}, not {before[-60:]!r}")
    ids = encoded.text_only.token_ids.tolist()
    if b"".join(model.ours.vocabulary.tokens[i] for i in ids).lstrip() != text.encode():
        faults.append(f"tokens of the response are not {text!r}")
    end = None
    if fitting and part == "content" and not calls:
        end = _turn_end(model, fitting[0], len(around.before) + len(text))
    seen = int(encoded.token_ids[-1]) if encoded.ends_turn else None
    if seen != end:
        faults.append(f"the turn ends with {seen}, not {end}")
    return [f"{where}: {fault}" for fault in faults]


def _wholes(model: ChatModel, chat: Mapping[str, Any], at: int, part: str, text: str) -> list[str]:
    """The chat up to a message with a text in it, as plain transformers renders it."""
    *before, last = chat["messages"][: at + 1]
    last = last | {key: last[key].strip() for key in ("reasoning_content",) if key in last}
    return model.whole([*before, last | {"content": last["content"].strip(), part: text}],
                       chat.get("tools", ()))  # fmt: skip


def _turn_end(model: ChatModel, whole: str, start: int) -> int | None:
    """The special token behind a place of a rendered chat, with nothing but white space before it."""
    encoding = model.tokens.encode(whole, add_special_tokens=False)
    special = {i for i, token in model.tokens.get_added_tokens_decoder().items() if token.special}
    for i, (first, _) in zip(encoding.ids, encoding.offsets, strict=True):
        if first < start:
            continue
        if i in special:
            return int(i) if not whole[start:first].strip() else None
    return None


# ------------------------------------------------------------------------------ long chats, read once

WORDS = """the tide comes in at noon and every boat that lies on the flats must wait until the water has
risen over its keel before anyone can leave harbour master says so twice a day when ferries from both
islands meet near red buoy while gulls follow them home to pier four where fish is sold"""
TURNS, NUM_CHATS = 6, 8


def long_chats(seed: int = 0, num_chats: int = NUM_CHATS) -> list[dict[str, Any]]:
    """Chats of six questions and six answers, each of some dozens of words."""
    rng, words = random.Random(seed), WORDS.split()

    def sentences() -> str:
        chosen = [rng.choice(words) for _ in range(rng.randint(24, 60))]
        return " ".join(chosen).capitalize() + "."

    return [
        {
            "id": f"chat-{i}",
            "messages": said(
                *(pair for _ in range(TURNS)
                  for pair in (("user", sentences()), ("assistant", sentences())))
            ),
        }
        for i in range(num_chats)
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sharing:
    """What reading turns together saves.

    Args:
        ratio: Tokens that models are fed where one input that begins another needs no pass of its own,
            over those of every turn in a pass of its own.
        rewrites: Whether the template writes an earlier turn otherwise once another one follows.
    """

    ratio: float
    rewrites: bool


def whole_over_turns(
    models: Sequence[ChatModel], chats: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Sharing]:
    """For each template that takes the chats.

    Args:
        models: Templates.
        chats: None makes some.
    """
    chats = long_chats() if chats is None else chats
    documents, _ = built(chats)
    segments = [segment_of(document, i) for i, document in enumerate(documents)]
    found = {}
    for model in models:
        inputs = [np.asarray(e.input_ids) for e in model.ours.encode(segments)]
        fed = sum(len(inputs[longest]) for longest, *_ in prefix_groups(inputs))
        ratio = fed / sum(map(len, inputs))
        found[model.name] = Sharing(ratio, any(_rewrites(model, chat) for chat in chats))
    return found


def _rewrites(model: ChatModel, chat: Mapping[str, Any]) -> bool:
    messages = chat["messages"]
    [all_of_it] = model.whole(messages)
    for at in range(1, len(messages), 2):
        text = messages[at]["content"]
        [up_to] = model.whole(messages[: at + 1])
        if not all_of_it.startswith(up_to[: up_to.rindex(text) + len(text)]):
            return True
    return False
