"""One small chat in the shapes in which chats are published, and what of each is expected."""

from __future__ import annotations

import json
from typing import Any

Q, A, Q2, A2, SYSTEM = "Where is ferry 7?", "At pier 3.", "And ferry 8?", "At pier 4.", "Be brief."
TOOL = {
    "type": "function",
    "function": {
        "name": "high_tide",
        "description": "Time of high tide",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "high_tide", "arguments": {"port": "Kiel"}}}


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    """Messages of role and content."""
    return [{"role": role, "content": content} for role, content in turns]


ONE = [(said(("user", Q)), A)]
SYSTEM_ONE = [(said(("system", SYSTEM), ("user", Q)), A)]
TWO = [
    (said(("system", SYSTEM), ("user", Q)), A),
    (said(("system", SYSTEM), ("user", Q), ("assistant", A), ("user", Q2)), A2),
]
TIDE = [
    (
        [
            *said(("user", Q)),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            *said(("tool", "04:10")),
        ],
        A,
    )
]
TIDE_GEMINI = [
    (
        [
            *said(("system", SYSTEM), ("user", Q)),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"at": "04:10"}', "name": "high_tide"},
        ],
        A,
    )
]
WITH_TOOLS = (TIDE, TIDE_GEMINI)
"""Responses behind the call of a tool that the row describes."""
MESSAGES = said(
    ("system", SYSTEM), ("user", Q), ("assistant", A), ("user", Q2), ("assistant", A2)
)  # fmt: skip


def renamed(role: str, content: str, names: dict[str, str]) -> list[dict[str, Any]]:
    """The messages with other names for fields and roles."""
    return [
        {role: names.get(m["role"], m["role"]), content: m["content"]} for m in MESSAGES
    ]  # fmt: skip


GPT = {"user": "human", "assistant": "gpt"}

PUBLISHED: dict[str, tuple[dict[str, Any], list[tuple[Any, str]]]] = {
    # OpenAI's fine-tuning files, UltraChat 200k, no_robots
    "messages": ({"messages": MESSAGES}, TWO),
    # LMSYS-Chat-1M
    "conversation": ({"conversation": MESSAGES}, TWO),
    # Vicuna, OpenHermes 2.5, SlimOrca
    "sharegpt": ({"conversations": renamed("from", "value", GPT)}, TWO),
    # LLaMA-Factory's variant with columns for the system turn and the tools
    "sharegpt system": (
        {"system": SYSTEM, "conversations": renamed("from", "value", GPT)[1:]},
        TWO,
    ),
    "sharegpt tools": (
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "04:10"},
                {"from": "gpt", "value": A},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
        TIDE,
    ),
    # OpenAI's and TRL's multimodal form
    "parts": (
        {
            "messages": [
                {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
                for m in MESSAGES
            ]
        },
        TWO,
    ),
    # Chats in a string column, as tables and databases hand them out
    "json string": ({"messages": json.dumps(MESSAGES)}, TWO),
    # Sequence features of `datasets`: one object of lists
    "struct of lists": (
        {"messages": {key: [m[key] for m in MESSAGES] for key in ("role", "content")}},
        TWO,
    ),
    # Gemini: contents and parts, the model's turns called `model`
    "gemini": (
        {
            "system": SYSTEM,
            "contents": [
                {
                    "role": {"assistant": "model"}.get(m["role"], m["role"]),
                    "parts": [{"text": m["content"]}],
                }
                for m in MESSAGES[1:]
            ],
        },
        TWO,
    ),
    # Gemini's tuning files: the system turn beside, tools in one object, calls among the parts
    "gemini tools": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": SYSTEM}]},
            "contents": [
                {"role": "user", "parts": [{"text": Q}]},
                {
                    "role": "model",
                    "parts": [{"functionCall": {"name": "high_tide", "args": {"port": "Kiel"}}}],
                },
                {
                    "role": "function",
                    "parts": [
                        {"functionResponse": {"name": "high_tide", "response": {"at": "04:10"}}}
                    ],
                },
                {"role": "model", "parts": [{"text": A}]},
            ],
            "tools": [{"functionDeclarations": [TOOL["function"]]}],
        },
        TIDE_GEMINI,
    ),
    # Anthropic: blocks, tools in them, the system turn beside
    "anthropic": (
        {
            "messages": [
                {"role": "user", "content": Q},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "name": "high_tide", "input": {"port": "Kiel"}}
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "content": "04:10"}]},
                {"role": "assistant", "content": [{"type": "text", "text": A}]},
            ],
            "tools": [
                {
                    "name": "high_tide",
                    "description": "Time of high tide",
                    "input_schema": TOOL["function"]["parameters"],  # type: ignore[index]
                }
            ],
        },
        TIDE,
    ),
    # OpenAI: tool calls beside no content, arguments as a string
    "tool calls": (
        {
            "messages": [
                {"role": "user", "content": Q},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "high_tide", "arguments": '{"port": "Kiel"}'},
                        }
                    ],
                },
                {"role": "tool", "content": "04:10"},
                {"role": "assistant", "content": A},
            ],
            "tools": [TOOL],
        },
        TIDE,
    ),
    # OpenAI before tools: one function_call, the role `function`, a column `functions`
    "function call": (
        {
            "messages": [
                {"role": "user", "content": Q},
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "content": "04:10"},
                {"role": "assistant", "content": A},
            ],
            "functions": [TOOL["function"]],
        },
        TIDE,
    ),
    # TRL: prompt and completion as messages, and as text
    "prompt completion": (
        {"prompt": said(("user", Q)), "completion": said(("assistant", A))},
        ONE,
    ),
    "prompt completion text": ({"prompt": Q, "completion": A}, [(Q, A)]),
    "prompt response": ({"prompt": Q, "response": A}, [(Q, A)]),
    # Stanford Alpaca, with the text that it was made into beside
    "alpaca": (
        {"instruction": "Where is it?", "input": Q, "output": A, "text": "Below is ..."},
        [(said(("user", f"Where is it?\n\n{Q}")), A)],
    ),
    # LLaMA-Factory's Alpaca with earlier exchanges
    "alpaca history": (
        {"instruction": Q2, "input": "", "output": A2, "system": SYSTEM, "history": [[Q, A]]},
        TWO[1:],
    ),
    # Databricks Dolly 15k
    "dolly": (
        {"instruction": Q, "context": "", "response": A, "category": "open_qa"},
        ONE,
    ),
    # OpenOrca
    "orca": ({"system_prompt": SYSTEM, "question": Q, "response": A}, SYSTEM_ONE),
    # ms-swift
    "query": ({"query": Q2, "response": A2, "history": [[Q, A]], "system": SYSTEM}, TWO[1:]),
    # GSM8K and others
    "question answer": ({"question": Q, "answer": A}, ONE),
    # UltraFeedback binarized: the chosen chat, whole or behind its prompt
    "preference": (
        {
            "prompt": Q,
            "chosen": said(("user", Q), ("assistant", A)),
            "rejected": said(("user", Q), ("assistant", "No.")),
        },
        ONE,
    ),
    "preference behind": (
        {"prompt": said(("user", Q)), "chosen": said(("assistant", A)), "rejected": None},
        ONE,
    ),
    # Anthropic HH-RLHF: a chat in one text
    "transcript": ({"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}"}, ONE),
    # Firefly and MOSS: a list of exchanges; XTuner: the same with other names
    "exchanges": ({"conversation": [{"human": Q, "assistant": A}]}, ONE),
    "xtuner": (
        {
            "conversation": [
                {"system": SYSTEM, "input": Q, "output": A},
                {"input": Q2, "output": A2},
            ]
        },
        TWO,
    ),
    # UltraChat as first published: texts in turn
    "texts": (
        {"data": [Q, A, Q2, A2]},
        [ONE[0], (said(("user", Q), ("assistant", A), ("user", Q2)), A2)],
    ),
}
"""A row and what its responses must be: (messages or prompt before it, text)."""
