"""Ask fused model, control and target before training held-out prompts: do their answers end?

    python examples/ask_chat.py --run runs/chat --prompts runs/chat/inputs/prompts.jsonl

Each model is asked twice, through plain transformers and through vLLM, with its folder's own chat
template and nothing of this project (chat_engines.py, a process for each). An answer has ended when
the token that the template puts behind a turn came before the limit; it is right when it holds what
it must.

Prints a table and some answers side by side. Output, RUN/answers.json::

    {"fused": {"asked": 60, "ended": 60, "engines": {"transformers": {"asked", "ended", "right",
      "mean_tokens", "answers": [{"id", "text", "ended", "right", "num_tokens"}]}, "vllm": {...}}},
     "control": {...}, "target": {...}}
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from first_run.demo.make import publish
from store_schema.config import ModelRef
from store_schema.errors import LogitfuseError
from store_schema.model.models import resolve_model

SHOWN = 4
"""Prompts whose answers are printed."""
WIDTH = 160
"""Characters of an answer that are printed."""


def counted(found: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of the answers of one model through one engine.

    Args:
        found: Output of chat_engines.py.
        prompts: In the same order, each with the facts of a right answer.

    Returns:
        asked, ended, right, mean_tokens (without the end), answers.
    """
    answers = [
        {
            "id": answer["id"],
            "text": answer["text"],
            "ended": answer["ended"],
            "right": is_right(answer["text"], prompt["facts"]),
            "num_tokens": len(answer["token_ids"]),
        }
        for answer, prompt in zip(found["answers"], prompts, strict=True)
    ]
    return {
        "asked": len(answers),
        "ended": sum(answer["ended"] for answer in answers),
        "right": sum(answer["right"] for answer in answers),
        "mean_tokens": sum(answer["num_tokens"] for answer in answers) / len(answers),
        "answers": answers,
    }


def is_right(text: str, facts: Sequence[str]) -> bool:
    """Whether an answer holds all that a right one must."""
    return all(fact.lower() in text.lower() for fact in facts)


def whole(engines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What stands in answers.json of one model."""
    sums = {name: sum(engine[name] for engine in engines.values()) for name in ("asked", "ended")}
    return sums | {"engines": dict(engines)}


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Models by engines, for people."""
    lines = [f"{'model':8}  {'engine':12}  {'ended':>7}  {'right':>7}  mean tokens"]
    for model, found in figures.items():
        for engine, f in found["engines"].items():
            ended, right = (f"{f[name]}/{f['asked']}" for name in ("ended", "right"))
            lines.append(
                f"{model:8}  {engine:12}  {ended:>7}  {right:>7}  {f['mean_tokens']:11.1f}"
            )
    return "\n".join(lines)


def side_by_side(
    figures: Mapping[str, Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]]
) -> str:
    """Some answers of all models, through the first engine of each."""
    lines = []
    for number in sorted({i * len(prompts) // SHOWN for i in range(SHOWN)}):
        prompt = prompts[number]
        asked = [m["content"] for m in prompt["messages"] if m["role"] == "user"][-1]
        lines += [f"\n{prompt['id']}: {asked}", f"  {'expected':9} {prompt['answer']}"]
        for model, found in figures.items():
            answer = next(iter(found["engines"].values()))["answers"][number]
            text = " ".join(answer["text"].split())
            cut = f"{text[:WIDTH]} ..." if len(text) > WIDTH else text
            lines.append(f"  {model:9} {cut}{'' if answer['ended'] else ' [did not end]'}")
    return "\n".join(lines)


def ask(engine: str, folder: Path, prompts: Path) -> dict[str, Any]:
    """Run chat_engines.py in a process of its own.

    Raises:
        SystemExit: It failed; what it said stands above.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "answers.json"
        script = Path(__file__).with_name("chat_engines.py")
        command = [sys.executable, str(script), engine, str(folder), str(prompts), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not out.is_file():
            click.echo(done.stderr[-3000:], err=True)
            sys.exit(f"{engine} could not be asked for answers of {folder}")
        return dict(json.loads(out.read_text(encoding="utf-8")))


def ask_all(
    folders: Mapping[str, Path], engines: Sequence[str], prompts: Path
) -> dict[str, dict[str, Any]]:
    """Figures of all models; says where two engines were asked different tokens."""
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    figures = {}
    for model, folder in folders.items():
        found = {}
        for engine in engines:
            click.echo(f"asking {model} through {engine}", err=True)
            found[engine] = ask(engine, folder, prompts)
        asked = {
            tuple(tuple(answer["prompt_ids"]) for answer in f["answers"]) for f in found.values()
        }
        if len(asked) > 1:
            click.echo(f"{model}: the engines were not asked the same tokens", err=True)
        figures[model] = whole({engine: counted(f, rows) for engine, f in found.items()})
    return figures


@click.command(help="Ask the models of a run held-out prompts, and count the answers that end.")
@click.option(
    "--run", type=click.Path(path_type=Path), default=Path("runs/chat"), show_default=True
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="Default: RUN/inputs/prompts.jsonl."
)
@click.option("--target", default="runs/real/inputs/models/target.gguf", show_default=True)
def main(run: Path, prompts: Path | None, target: str) -> None:
    """Entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    prompts = prompts or run / "inputs" / "prompts.jsonl"
    engines = ["transformers"]
    if importlib.util.find_spec("vllm") is None:
        click.echo("vLLM is not installed: transformers alone is asked", err=True)
    else:
        engines.append("vllm")
    try:
        untrained = resolve_model(ModelRef(model=target))
    except LogitfuseError as error:
        click.echo(error.line(), err=True)
        sys.exit(error.exit_code)
    folders = {"fused": run / "final", "control": run / "control" / "final"}
    for folder in folders.values():
        if not (folder / "config.json").is_file():
            sys.exit(f"{folder} is no model: run `logitfuse train run` first")
    figures = ask_all({**folders, "target": Path(untrained)}, engines, prompts)
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    click.echo(table(figures))
    click.echo(side_by_side(figures, rows))
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    publish(run / "answers.json", lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
