"""Make four small chat models: three that know one topic of easy questions, and a beginner.

    python examples/toy_chat_models.py --out runs/toy-chat/inputs --seed 0

Output::

    models/{numbers,times,romans,target}/    config.json, model.safetensors, tokenizer files
    models/settings.json                     what shaped them

Each source has an architecture, a tokenizer and a chat template of its own, and has seen a little of
the other topics. They are stopped early: the full ones answer about two thirds of their own topic's
questions right, the small ones up to a third. The target has seen a little of all three. None has seen
the questions of make_questions.py at the same seed: those are drawn first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from questions import Question, by_split, questions

from first_run.demo.make import code_files, publish
from first_run.demo.text import Document

LEARNED = 1500
"""Questions of its topic that a source has seen, at most."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large all models are, and what they learn.

    Args:
        level: Of the questions.
        held_out: Questions of each topic that no model has seen, by split.
        hidden_size: Width.
        num_layers: Layers.
        batch_rows: Rows of 256 tokens in a step.
        vocab_size: Of a tokenizer, at most: few questions have few pieces.
    """

    level: str
    held_out: dict[str, int]
    hidden_size: int
    num_layers: int
    batch_rows: int
    vocab_size: int


SIZES = {
    "small": Size("small", {"test": 60, "valid": 20, "train": 60}, 128, 2, 4, 500),
    "full": Size("easy", {"test": 150, "valid": 40, "train": 200}, 192, 3, 8, 800),
}


@dataclass(frozen=True, slots=True)
class ToyModel:
    """One model.

    Args:
        architecture: llama | gpt_neox | mistral.
        tokenizer: facts | prose | code | target: which of the demo's tokenizers it is like.
        vocab_size: Of its tokenizer.
        steps: Of its training.
        own: Questions of its topic that it sees; the target's of each topic.
        others: Questions of each other topic.
        user: Put before a question by its chat template.
        assistant: Put before an answer.
    """

    architecture: str
    tokenizer: str
    vocab_size: int
    steps: int
    own: int
    others: int
    user: str
    assistant: str


MODELS = {
    "numbers": ToyModel("mistral", "facts", 700, 245, LEARNED, 100, "Question\n", "\nReply\n"),
    "times": ToyModel("gpt_neox", "prose", 700, 245, LEARNED, 100, "[ask]\n", "\n[say]\n"),
    "romans": ToyModel("llama", "code", 700, 245, LEARNED, 100, "User\n", "\nBot\n"),
    "target": ToyModel("llama", "target", 800, 200, 300, 300, "### Ask\n", "\n### Answer\n"),
}


def template(model: ToyModel, *, bos: bool) -> str:
    """A chat template: user and assistant turns, the end of sequence behind the latter."""
    user, assistant = json.dumps(model.user), json.dumps(model.assistant)
    return (
        ("{{- bos_token }}" if bos else "")
        + "{%- for m in messages %}"
        + "{%- if m.role == 'user' %}{{- "
        + user
        + " + m.content }}"
        + "{%- else %}{{- "
        + assistant
        + " + m.content + eos_token }}{%- endif %}"
        + "{%- endfor %}"
        + "{%- if add_generation_prompt %}{{- "
        + assistant
        + " }}{%- endif %}"
    )


def written(question: Question, model: ToyModel) -> str:
    """A question with its answer as the model's template writes them, without special tokens."""
    return f"{model.user}{question.prompt}{model.assistant}{question.answer}"


def seen_by(name: str, learned: Sequence[Question]) -> list[Question]:
    """What a model sees of the questions that are there to learn from."""
    model = MODELS[name]

    def number(question: Question) -> int:
        return int(question.id.rpartition("/")[2])

    return [q for q in learned if number(q) < (model.own if q.topic == name else model.others)]


def tokenizer_of(name: str, texts: Sequence[str], most_tokens: int) -> Any:
    """A tokenizer that the texts have taught, with the model's chat template."""
    from first_run.demo.tokenizers import train_byte_level_bpe, train_unigram

    model = MODELS[name]
    vocab_size = min(model.vocab_size, most_tokens)
    if model.tokenizer == "facts":
        tokenizer = train_unigram(texts, vocab_size, "</s>")
    elif model.tokenizer == "prose":
        end = "<|endoftext|>"
        tokenizer = train_byte_level_bpe("prose", texts, vocab_size, end, False, end)
    else:
        bos, eos = ("<s>", "</s>") if model.tokenizer == "code" else ("<|bos|>", "<|eos|>")
        tokenizer = train_byte_level_bpe(model.tokenizer, texts, vocab_size, bos, True, eos)
    tokenizer.chat_template = template(model, bos=model.tokenizer in ("code", "target"))
    return tokenizer


def make_model(
    name: str, learned: Sequence[Question], seed: int, size: Size, scale: float, path: Path
) -> None:
    """Train one model and save it."""
    import torch

    from first_run.demo.training import Recipe, build_model, packed_rows, train

    model = MODELS[name]
    tokenizer = tokenizer_of(name, [written(q, model) for q in learned], size.vocab_size)
    steps = max(2, round(model.steps * scale))
    recipe = Recipe(
        model.architecture, size.hidden_size, size.num_layers, steps, size.batch_rows, 6e-3
    )
    documents = [
        Document(q.id, written(q, model), q.topic, "models") for q in seen_by(name, learned)
    ]
    torch.manual_seed(seed)
    made = build_model(recipe, tokenizer)
    rows = packed_rows(documents, tokenizer, steps * recipe.batch_rows, seed)
    train(made, rows, recipe, name)
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)


def make(out: Path, seed: int, size: Size, scale: float) -> None:
    """Make whatever is missing.

    Args:
        out: Where to.
        seed: Of questions and weights.
        size: Of all models.
        scale: Of the steps of all trainings.
    """
    settings = {
        "seed": seed, "size": asdict(size), "scale": scale, "code": _code(),
        "models": {name: asdict(model) for name, model in MODELS.items()},
    }  # fmt: skip
    note = out / "models" / "settings.json"
    if not note.is_file() or json.loads(note.read_text()) != settings:
        shutil.rmtree(out / "models", ignore_errors=True)
        text = json.dumps(settings) + "\n"
        publish(note, partial(_write, text))
    sizes = {**size.held_out, "models": LEARNED}
    learned = by_split(list(questions(size.level, sizes, seed)), "models")
    for name in MODELS:
        path = out / "models" / name
        if not path.is_dir():
            publish(path, partial(make_model, name, learned, seed, size, scale))


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def _code() -> str:
    digest = hashlib.sha256()
    here = Path(__file__)
    for path in (here, here.with_name("questions.py"), *code_files("training", "tokenizers")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@click.command(help="Make four small chat models.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/toy-chat/inputs"),
    show_default=True,
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--size", type=click.Choice(list(SIZES)), default="full", show_default=True)
@click.option("--scale", type=float, default=1.0, show_default=True, help="Of all steps.")
def main(out: Path, seed: int, size: str, scale: float) -> None:
    """Entry point."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make(out, seed, SIZES[size], scale)
    click.echo(f"{out}/models: {', '.join(MODELS)}")


if __name__ == "__main__":
    sys.exit(main())
