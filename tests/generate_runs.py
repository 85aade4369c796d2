"""Runs whose corpus has prompts, and models that end their answers, for the tests of generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from extract.generation.generate import ANSWERING
from extract.run import run_source
from launch.work import Part
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.store.reader import StoreReader
from tests.extract_runs import plan_run, write_jsonl, write_run
from tests.tiny import SAMPLE_TEXTS, tiny_model, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GENERATE = {"answers": 3, "temperature": 1.2, "top_p": 0.95, "max_tokens": 24, "stop": ["a."]}
POSITIONS = 100
"""Of the models: plan and answers together are longer, so some prompts do not fit."""


def make_chat_models(root: Path) -> dict[str, Path]:
    """A source with padded rows and BOS, one with a dummy prefix, and a target; all with chats."""
    coder = tiny_tokenizer("byte_level", bos=True)
    writer = tiny_tokenizer("metaspace_bpe", vocab_size=500)
    for tokenizer in (coder, writer):
        tokenizer.chat_template = CHAT_TEMPLATE
    models = {
        "coder": tiny_model(root / "coder", "llama", coder, vocab_padding=61),
        "writer": tiny_model(root / "writer", "qwen2", writer, seed=1, scale=0.15),
        "target": tiny_model(root / "target", "llama", coder, seed=3),
    }
    for folder in models.values():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": POSITIONS})
        )
        # Random models seldom end by themselves: each 29th id ends a turn.
        ends = {"eos_token_id": list(range(29, 290, 29))}
        (folder / "generation_config.json").write_text(json.dumps(ends))
    return models


def documents() -> list[dict[str, Any]]:
    """Prompts as text and as chats, a document without one, and one of several segments."""
    texts = [text for domain in ("prose", "odd") for text in SAMPLE_TEXTS[domain]]
    found: list[dict[str, Any]] = [
        {"id": f"p{i}", "prompt": f"Question {i}: {text[:20]}", "response": "Yes. It is."}
        for i, text in enumerate(texts)
    ]
    found += [
        {"id": "plain", "text": "No prompt here, only text. " * 3},
        {"id": "long", "prompt": "Tell:", "response": "And then came another day. " * 40},
        {"id": "wide", "prompt": "ZQXJ" * 20, "response": "Short."},
        # With the longest answer it fills the last position.
        {"id": "edge", "prompt": "ZQXJ" * 18 + "ZQX", "response": "Short."},
        {
            "id": "talk",
            "messages": [
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "Me."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "Because."},
            ],
        },
    ]
    return [{"domain": "d", "split": "train"} | document for document in found]


def planned(folder: Path, models: Mapping[str, Path], **sections: Any) -> Path:
    """A run with a corpus of prompts and a plan."""
    write_jsonl(folder / "docs.jsonl", documents())
    write_jsonl(
        folder / "chats.jsonl",
        [{"id": "c", "prompt": "Hi!", "response": "Hello.", "domain": "chat", "split": "test"}],
    )
    inputs = [
        {"path": str(folder / "docs.jsonl")},
        {"path": str(folder / "chats.jsonl"), "prompt_as": "chat"},
    ]
    path = write_run(
        folder,
        models,
        **({"corpus": {"inputs": inputs}, "generate": GENERATE} | sections),
    )
    return plan_run(path)


def spoilt(model: Path, folder: Path) -> Path:
    """A copy of a model with NaN among the weights of its head."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.lm_head.weight.data[3] = torch.nan
    loaded.save_pretrained(folder)
    return folder


def one_source(models: Mapping[str, Path], name: str = "coder") -> dict[str, Path]:
    return {name: models[name], "target": models["target"]}


def generate(path: Path, name: str = "coder", part: Part | None = None, **options: Any) -> None:
    run_source(load_run(path), name, part or Part(), ANSWERING, **options)


def store_of(path: Path, name: str = "coder") -> StoreReader:
    return StoreReader.open(open_location(load_run(path).generated_url(name)))


def contents(path: Path, name: str = "coder") -> dict[int, str]:
    return {shard: c.content_sha256 for shard, c in store_of(path, name).commits.items()}


def tokens_of(path: Path, name: str = "coder") -> dict[tuple[int, int], list[int]]:
    """Tokens of every answer by segment and number."""
    store, found = store_of(path, name), {}
    for shard in sorted(store.commits):
        arrays = store.read(shard)
        for d, place in enumerate(zip(arrays["segment_ids"], arrays["answer_index"], strict=True)):
            start, stop = arrays["token_offsets"][d : d + 2]
            found[int(place[0]), int(place[1])] = arrays["token_ids"][start:stop].tolist()
    return found
