"""Make the dialogues of `make example-chat`: seeded, checkable, in two published shapes.

    python examples/make_chat.py --out runs/chat/inputs --seed 0

Output::

    messages.jsonl    id, domain, split, messages (as OpenAI has them, with reasoning_content), tools
    sharegpt.jsonl    id, domain, split, conversations (from, value), system, tools as JSON
    prompts.jsonl     of the test split: the turns before the last answer, that answer, and what a
                      right one holds

Guarantees: no question is asked twice in all dialogues, so no held-out question is in the text that is
trained on; the same seed gives the same bytes in every process.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import click
from chat_topics import TOPICS, WORDINGS, Exchange, Topic

from first_run.demo.make import publish

SHARES = {"test": 0.15, "valid": 0.1, "train": 0.75}
"""Of the dialogues, by split; half of each domain, and half of these in each shape."""
SHAPES = ("messages", "sharegpt")
SYSTEM_SHARE, THOUGHT_SHARE, SECOND_SHARE = 0.35, 0.6, 0.7
"""Dialogues with a system turn, answers with a thought (where the shape has a place for it), dialogues
with a second question."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A chat before it has a shape.

    Args:
        id: Of the dialogue.
        domain: "tools" or "talk".
        split: train | valid | test.
        shape: It is written in.
        system: Turn before the first question, or none.
        exchanges: In order, each with its topic and with whether its thought is told.
    """

    id: str
    domain: str
    split: str
    shape: str
    system: str | None
    exchanges: tuple[tuple[Topic, Exchange, bool], ...]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools, each once."""
        found = {topic.tool_name: topic.tool for topic, _, _ in self.exchanges if topic.tool}
        return list(found.values())


def dialogues(seed: int, count: int = 200) -> list[Dialogue]:
    """Dialogues of all splits.

    Args:
        seed: Of everything that is drawn.
        count: Of dialogues.
    """
    asked: set[str] = set()
    return [
        _dialogue(Random(f"{seed}/{split}/{number}"), split, number, asked)
        for split, share in SHARES.items()
        for number in range(round(share * count))
    ]


def _dialogue(random: Random, split: str, number: int, asked: set[str]) -> Dialogue:
    """One dialogue, whose questions are none of `asked`, which takes them."""
    domain = list(TOPICS)[number % 2]
    shape = SHAPES[number // 2 % 2]
    exchanges: list[tuple[Topic, Exchange, bool]] = []
    topic = random.choice(TOPICS[domain])
    for again in (False, True) if random.random() < SECOND_SHARE else (False,):
        told = shape == "messages" and random.random() < THOUGHT_SHARE
        exchange = topic.exchange(random, again=again)
        while exchange.question in asked:
            exchange = topic.exchange(random, again=again)
        asked.add(exchange.question)
        exchanges.append((topic, exchange, told))
    system = random.choice(WORDINGS["system"]) if random.random() < SYSTEM_SHARE else None
    name = f"{domain}-{split}-{number:03d}"
    return Dialogue(name, domain, split, shape, system, tuple(exchanges))


def openai_messages(dialogue: Dialogue) -> list[dict[str, Any]]:
    """The turns as OpenAI has them: calls have no content and arguments as JSON."""
    messages: list[dict[str, Any]] = []
    if dialogue.system is not None:
        messages.append({"role": "system", "content": dialogue.system})
    for number, (topic, exchange, told) in enumerate(dialogue.exchanges, 1):
        messages.append({"role": "user", "content": exchange.question})
        thought = {"reasoning_content": exchange.thought} if told else {}
        if exchange.drawn.call:
            function = {"name": topic.tool_name, "arguments": json.dumps(dict(exchange.drawn.call))}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            messages += [
                {"role": "assistant", "content": None, **thought, "tool_calls": [call]},
                {
                    "role": "tool",
                    "tool_call_id": call["id"],
                    "content": json.dumps(exchange.drawn.result),
                },
            ]
            thought = {}
        messages.append({"role": "assistant", "content": exchange.answer, **thought})
    return messages


def sharegpt_turns(dialogue: Dialogue) -> list[dict[str, str]]:
    """The turns as ShareGPT has them, tools as LLaMA-Factory has them; it has no place for thoughts."""
    turns = []
    for topic, exchange, _ in dialogue.exchanges:
        turns.append({"from": "human", "value": exchange.question})
        if exchange.drawn.call:
            call = {"name": topic.tool_name, "arguments": dict(exchange.drawn.call)}
            turns += [
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": json.dumps(exchange.drawn.result)},
            ]
        turns.append({"from": "gpt", "value": exchange.answer})
    return turns


def rows(found: list[Dialogue], shape: str) -> Iterator[dict[str, Any]]:
    """The rows of a shape's file."""
    for dialogue in found:
        if dialogue.shape != shape:
            continue
        row: dict[str, Any] = {
            "id": dialogue.id,
            "domain": dialogue.domain,
            "split": dialogue.split,
        }
        if shape == "messages":
            row["messages"] = openai_messages(dialogue)
            if dialogue.tools:
                row["tools"] = dialogue.tools
        else:
            row["conversations"] = sharegpt_turns(dialogue)
            if dialogue.system is not None:
                row["system"] = dialogue.system
            if dialogue.tools:
                row["tools"] = json.dumps([tool["function"] for tool in dialogue.tools])
        yield row


def prompts(found: list[Dialogue]) -> Iterator[dict[str, Any]]:
    """What models are asked: the held-out chats up to their last answer.

    Content of a call is "" and its arguments are an object, which every chat template takes.
    """
    for dialogue in found:
        if dialogue.split != "test":
            continue
        *before, last = openai_messages(dialogue)
        for message in before:
            message.pop("reasoning_content", None)
            message["content"] = message["content"] or ""
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        yield {
            "id": dialogue.id,
            "messages": before,
            "tools": dialogue.tools,
            "answer": last["content"],
            "facts": list(dialogue.exchanges[-1][1].drawn.facts),
        }


def write_rows(found: Iterator[dict[str, Any]], path: Path) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in found:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@click.command(help="Make the dialogues of `make example-chat`.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/chat/inputs"), show_default=True
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dialogues", "count", type=click.IntRange(min=20), default=200, show_default=True)
def main(out: Path, seed: int, count: int) -> None:
    """Entry point."""
    found = dialogues(seed, count)
    for shape in SHAPES:
        publish(out / f"{shape}.jsonl", partial(write_rows, rows(found, shape)))
    publish(out / "prompts.jsonl", partial(write_rows, prompts(found)))
    sizes = Counter(dialogue.split for dialogue in found)
    counts = ", ".join(f"{split} {size}" for split, size in sizes.items())
    calls = sum(bool(e.drawn.call) for d in found for _, e, _ in d.exchanges)
    thoughts = sum(told for d in found for _, _, told in d.exchanges)
    click.echo(
        f"{out}: {len(found)} dialogues ({counts}),"
        f" {sum(len(d.exchanges) for d in found)} answers, {calls} tool calls, {thoughts} thoughts"
    )


if __name__ == "__main__":
    sys.exit(main())
