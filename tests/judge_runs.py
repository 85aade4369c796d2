"""Runs whose sources have answered with texts that a test chose, and reward models, for `judge`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from extract.engines.protocol import Answer
from extract.generation.answers import NO_ANSWER, answer_arrays, kept_answer
from extract.generation.generate import answer_rules, check_answering
from extract.judging.records import BestRow, ScoreRow, judged_location, read_best, read_scores
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.layout import Finish
from store_schema.plan.run_plan import open_plan
from tests import command
from tests.extract_runs import plan_run, write_jsonl, write_run
from tests.generate_runs import CHAT_TEMPLATE, make_chat_models
from tests.tiny import tiny_tokenizer

DOCUMENTS: list[dict[str, Any]] = [
    {"id": "sum", "prompt": "What is 3 + 4?", "response": "3 + 4 is 7."},
    {"id": "half", "prompt": "What is 1 / 2?", "response": "It is 0.5"},
    {"id": "word", "prompt": "Name a colour.", "response": "The colour is 1 red thing."},
    {"id": "far", "prompt": "What is 10 * 10?", "response": "#### 100", "split": "test"},
    {"id": "held", "prompt": "What is 2 + 2? The answer is 4.", "response": "4"},
    {
        "id": "talk",
        "messages": [
            {"role": "user", "content": "Hi, what is 5 - 3?"},
            {"role": "assistant", "content": "That is 2."},
        ],
        "domain": "chat",
    },
    {"id": "plain", "text": "No prompt here. " * 4},
]
PROMPTS = ("sum", "half", "word", "far", "held", "talk/turn-0")
RIGHT = {
    "sum": "7", "half": "1/2", "word": "A red thing, 1.", "far": "100.0", "held": "4",
    "talk/turn-0": "2",
}  # fmt: skip
Said = Callable[[str, int], str | tuple[str, Finish]]
"""What a source answers, by document and number; "" is no answer."""


def right(document: str, number: int) -> str:
    """The right answer."""
    return RIGHT[document]


def wrong(document: str, number: int) -> str:
    """An answer that is wrong."""
    return f"Perhaps {number + 91}, who knows?"


def half_right(document: str, number: int) -> str:
    """Right for two of the prompts."""
    return right(document, number) if document in ("half", "far") else wrong(document, number)


def make_models(root: Path) -> dict[str, Path]:
    """Two sources and a target that end their answers with </s> alone."""
    models = make_chat_models(root)
    for folder in models.values():
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return models


def answered(
    folder: Path, models: Mapping[str, Path], said: Mapping[str, Said], **sections: Any
) -> Path:
    """A run whose sources have answered."""
    folder.mkdir(exist_ok=True)
    rows = [{"domain": "sums", "split": "train"} | row for row in DOCUMENTS]
    write_jsonl(folder / "docs.jsonl", rows)
    defaults = {
        "plan": {"max_tokens": 96, "shard_tokens": 16},
        "generate": {"max_tokens": 40, "temperature": 0.0},
    }
    path = plan_run(write_run(folder, models, **(defaults | sections)))
    for name, texts in said.items():
        say(path, name, texts)
    return path


def say(path: Path, name: str, texts: Said) -> None:
    """Write a source's store of answers."""
    run = load_run(path)
    plan = open_plan(run)
    source = check_answering(run, name, plan)
    rules = answer_rules(source)
    by_byte = {token: i for i, token in reversed(list(enumerate(rules.tokens))) if len(token) == 1}
    open_location(run.generated_url(name)).delete("commits")
    writer = source.open_store()
    for shard in plan.shards:
        kept = []
        for segment in plan.segments(shard):
            for number in range(rules.section.answers) if segment.has_prompt else ():
                text = texts(segment.document_id, number)
                text, finish = text if isinstance(text, tuple) else (text, Finish.STOP)
                if finish == Finish.PROMPT_TOO_LONG:
                    kept.append(kept_answer(segment, number, NO_ANSWER, rules))
                    continue
                ids = [by_byte[bytes([byte])] for byte in text.encode()]
                if not ids:
                    finish = Finish.EMPTY
                if finish in (Finish.STOP, Finish.EMPTY):
                    ids.append(min(rules.end_ids))
                kept.append(kept_answer(segment, number, Answer(np.array(ids), finish), rules))
        writer.write(shard, answer_arrays(kept), {"seconds": 1.0})


call_judge = partial(command.call, "judge")
judged = partial(command.ok, "judge")
not_judged = partial(command.refused, "judge")


def judges(*given: Any, **more: Any) -> list[str]:
    """`--set` words for the section `judge`."""
    found = {"judge.judges": list(given)} | {f"judge.{name}": value for name, value in more.items()}
    return [
        word for name, value in found.items() for word in ("--set", f"{name}={json.dumps(value)}")
    ]


def best_of(path: Path) -> dict[str, BestRow]:
    """Rows of best.parquet by prompt."""
    return {row.prompt_id: row for row in read_best(judged_location(load_run(path)))}


def scores_of(path: Path) -> list[ScoreRow]:
    """Rows of scores.parquet."""
    return read_scores(judged_location(load_run(path)))


def authors(path: Path, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """Authors of the best answers."""
    best = best_of(path)
    return [best[name].author for name in prompts]


def reward_model(
    folder: Path, *, labels: int = 1, template: str | None = CHAT_TEMPLATE, pad: bool = False
) -> Path:
    """Save a random reward model of two layers."""
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = template
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, num_labels=labels, pad_token_id=2 if pad else None,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FUNCTIONS = """
import os, signal, sys, time
from pathlib import Path

def length(asked):
    print("noise", file=sys.stdout)
    return len(asked["answer"])

def trouble(asked):
    if asked["source"] == "writer":
        return len(asked["answer"])
    what = asked["id"]
    if what == "sum":
        time.sleep(60)
    if what == "half":
        os._exit(0)
    if what == "word":
        return len(bytearray(1 << 40))
    if what == "far":
        raise ValueError("no")
    if what == "held":
        os.kill(os.getpid(), signal.SIGSEGV)
    return None

def slow(asked):
    time.sleep(0.3)
    return len(asked["answer"])

def broken(asked):
    return asked["no such key"]

def nan(asked):
    return float("nan")

def stopper(asked):
    log = Path(__file__).with_name("log")
    with log.open("a") as file:
        file.write(asked["id"] + " " + asked["source"] + chr(10))
    if len(log.read_text().splitlines()) == 7:
        os.kill(os.getppid(), int(Path(__file__).with_name("signal").read_text()))
        time.sleep(1)
    return len(asked["answer"]) + len(asked.get("prompt", "")) / 100

no_function = 3
"""


def write_functions(folder: Path) -> Path:
    """A file of functions that judge, or fail to."""
    path = folder / "functions.py"
    path.write_text(FUNCTIONS)
    return path
