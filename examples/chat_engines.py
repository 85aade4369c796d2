"""Ask a chat model's folder with nothing but transformers or vLLM: the other half of ask_chat.py.

    python examples/chat_engines.py transformers runs/chat/final prompts.jsonl answers.json

Runs in a process of its own, since vLLM changes classes of the process that it is started in.
Greedy, in float32, in the chat template of the folder; an answer may have three times the tokens of
the longest answer in the prompts.

Output: {"turn_end": id or null, "answers": [{"id", "prompt_ids", "token_ids", "text", "ended"}]}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

ROOM = 3
"""Longest answer that is waited for, in multiples of the longest one there is."""
BATCH = 10
"""Prompts that transformers answers at a time, like lengths together."""
_MARK = "What stands here is an answer"


def turn_end(tokenizer: Any) -> int | None:
    """Id of the first special token that a chat template writes behind an answer; None without one."""
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(_MARK)[2]
    table = tokenizer.added_tokens_decoder
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in table and table[i].special), None)


def cut_at(token_ids: Sequence[int], end: int | None) -> tuple[list[int], bool]:
    """An answer's tokens before the end of its turn, and whether it came there by itself.

    Args:
        token_ids: Whatever was generated, without padding.
        end: Token that ends a turn; None where the template has none.
    """
    ids = list(token_ids)
    if end in ids:
        return ids[: ids.index(end)], True
    return ids, False


def most_tokens(prompts: Sequence[dict[str, Any]], tokenizer: Any) -> int:
    """Tokens that an answer may have, at most."""
    return ROOM * max(len(tokenizer(prompt["answer"])["input_ids"]) for prompt in prompts)


def prompt_ids(prompt: dict[str, Any], tokenizer: Any) -> list[int]:
    """The chat as the model is asked, up to where it begins to answer."""
    asked = tokenizer.apply_chat_template(
        prompt["messages"],
        tools=prompt["tools"] or None,
        add_generation_prompt=True,
        return_dict=True,
    )
    return list(asked["input_ids"])


def ask_transformers(
    folder: str, prompts: Sequence[dict[str, Any]], tokenizer: Any
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Index, ids of the prompt and what plain `generate` wrote behind it, with what stopped it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}
    asked = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        padded = tokenizer.pad({"input_ids": [asked[i] for i in batch]}, return_tensors="pt")
        written = model.generate(
            **padded,
            do_sample=False,
            max_new_tokens=most_tokens(prompts, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, ids in zip(batch, written[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            stop = next((n for n, token_id in enumerate(ids) if token_id in stops), len(ids))
            yield i, asked[i], ids[: stop + 1]  # behind it is padding


def ask_vllm(
    folder: str, prompts: Sequence[dict[str, Any]], tokenizer: Any
) -> Iterator[tuple[int, list[int], list[int]]]:
    """The same from `LLM.chat`, which takes the same tools for all chats of a call."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    settings = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    for name, value in (quiet | settings).items():
        os.environ.setdefault(name, value)
    import torch
    from vllm import LLM, SamplingParams

    most = most_tokens(prompts, tokenizer)
    longest = max(len(prompt_ids(prompt, tokenizer)) for prompt in prompts)
    on_cpu = {} if torch.cuda.is_available() else {"distributed_executor_backend": "uni"}
    llm = LLM(
        folder,
        dtype="float32",
        max_model_len=longest + most,
        enforce_eager=True,
        use_tqdm_on_load=False,
        **on_cpu,
    )
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(json.dumps(prompt["tools"]), []).append(i)
    params = SamplingParams(temperature=0, max_tokens=most)
    for tools, group in groups.items():
        outputs = llm.chat(
            [prompts[i]["messages"] for i in group],
            params,
            tools=json.loads(tools) or None,
            use_tqdm=False,
        )
        for i, output in zip(group, outputs, strict=True):
            yield i, list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    llm.llm_engine.engine_core.shutdown()


ENGINES = {"transformers": ask_transformers, "vllm": ask_vllm}


@click.command(help="Ask a model's folder the prompts of a file.")
@click.argument("engine", type=click.Choice(list(ENGINES)))
@click.argument("folder")
@click.argument("prompts", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(engine: str, folder: str, prompts: Path, out: Path) -> None:
    """Entry point."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    end = turn_end(tokenizer)
    answers = {}
    for i, asked, written in ENGINES[engine](folder, rows, tokenizer):
        ids, ended = cut_at(written, end)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answers[i] = {
            "id": rows[i]["id"],
            "prompt_ids": asked,
            "token_ids": ids,
            "text": text,
            "ended": ended,
        }
    found = {"turn_end": end, "answers": [answers[i] for i in range(len(rows))]}
    out.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
