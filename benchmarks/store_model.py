"""Real models with real vocabularies, made once and kept: what benchmarks measure on.

They are trained on the code and prose that ship with the running Python (the demo's text at the
demo's splits, one pass), so their distributions have the shape that stores will hold: sure after
"self.", broad after "the". How good one is stands beside it as bits per byte of held-out text. Where
only speed is measured, fewer steps do.

    python -m benchmarks.store_model --out runs/bench/store-model
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from first_run.demo.text import Document, SplitSizes, library_documents, rank, size_bytes
from first_run.demo.tokenizers import train_byte_level_bpe
from first_run.demo.training import (
    ROW_TOKENS,
    Recipe,
    bits_per_byte,
    build_model,
    packed_rows,
    train,
)
from fuse_train.machine.allocator import keep_freed_memory

VOCAB_SIZE = 32_768
SIZES = SplitSizes(train=0, valid=100_000, test=100_000)
RECIPE = Recipe(
    architecture="llama",
    hidden_size=256,
    num_layers=4,
    num_steps=1_200,
    batch_rows=8,
    learning_rate=3e-3,
)
DONE = "made.json"


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A finished model.

    Args:
        folder: Of the checkpoint and tokenizer.
        vocab_size: Its ids.
        bpb: Bits per byte of held-out text.
        documents: Held-out text.
        other_documents: Text it was trained on, in a fixed shuffled order.
    """

    folder: Path
    vocab_size: int
    bpb: float
    documents: tuple[Document, ...]
    other_documents: tuple[Document, ...]


def make_model(
    out: Path, *, vocab_size: int = VOCAB_SIZE, num_steps: int = RECIPE.num_steps
) -> BenchModel:
    """Make a model, or take the one that stands there.

    Args:
        out: Its folder.
        vocab_size: Ids of its tokenizer.
        num_steps: Of training, 8 rows of 256 tokens each.
    """
    documents = [
        d for domain in ("code", "prose") for d in library_documents(domain, SIZES, seed=0)
    ]
    held_out = tuple(d for d in documents if d.split == "test")
    seen = [d for d in documents if d.split == "models"]
    if not (out / DONE).exists():
        made = _train(seen, held_out, out, vocab_size, num_steps)
        (out / DONE).write_text(json.dumps(made, indent=1) + "\n")
    made = json.loads((out / DONE).read_text())
    seen.sort(key=lambda d: rank(0, d.id))
    return BenchModel(out, made["vocab_size"], made["bpb"], held_out, tuple(seen))


def _train(
    documents: list[Document],
    held_out: tuple[Document, ...],
    out: Path,
    vocab_size: int,
    num_steps: int,
) -> dict[str, float | int]:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    keep_freed_memory()
    torch.manual_seed(0)
    texts = [d.text for d in documents]
    tokenizer = train_byte_level_bpe("code", texts, vocab_size, "<s>", True, "</s>")
    recipe = replace(RECIPE, num_steps=num_steps)
    model = build_model(recipe, tokenizer)
    num_rows = num_steps * recipe.batch_rows
    rows = packed_rows(documents, tokenizer, num_rows, seed=0)
    train(model, rows, recipe, f"train the benchmark's model of {vocab_size:,} ids")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "vocab_size": len(tokenizer),
        "bpb": bits_per_byte(model, tokenizer, held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_tokens": num_rows * ROW_TOKENS,
        "trained_bytes": sum(map(size_bytes, texts)),
        "held_out_bytes": sum(size_bytes(d.text) for d in held_out),
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench/store-model")
def main(out: Path) -> None:
    """Make the model and say how good it is."""
    made = make_model(out)
    print(f"{made.folder}: vocabulary {made.vocab_size:,}, {made.bpb:.3f} bpb on held-out text")


if __name__ == "__main__":
    main()
