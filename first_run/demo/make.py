"""Make the demo's text and models where no hub can be reached: three specialists, one generalist.

    python -m first_run.demo.make --out runs/demo/inputs --seed 0

Output, each piece published by one rename, so a kill costs at most the current piece::

    text/{code,prose,facts}.jsonl      id, text, domain, split (models | train | valid | test)
    models/{code,prose,facts,target}/  config.json, model.safetensors, tokenizer files
    models/quality.json                bits per byte of each model on each domain's test split
    settings.json                      fingerprint of all that shaped the output

A second run with the same settings ends at once. Another seed, script, Python or torch is another
fingerprint: the old output is replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from first_run.demo.facts import fact_documents
from first_run.demo.text import (
    Document,
    SplitSizes,
    library_documents,
    rank,
    read_jsonl,
    size_bytes,
    write_jsonl,
)
from launch.process import set_torch_defaults
from launch.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from first_run.demo.training import Recipe

logger = logging.getLogger(__name__)

DOMAINS = ("code", "prose", "facts")
SIZES = {
    "code": SplitSizes(train=115_000, valid=25_000, test=40_000),
    "prose": SplitSizes(train=115_000, valid=25_000, test=40_000),
    "facts": SplitSizes(train=115_000, valid=25_000, test=40_000),
}
"""About 40,000 target tokens a domain for fusion: little text of one's own, as users have."""

FILES = ("make", "text", "facts", "tokenizers", "training", "muon")
LARGEST_RATIO = 0.85
"""A specialist must end 15 % or more below the target in its domain, else nothing can transfer."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model of the demo; the training fields are those of `first_run.demo.training.Recipe`."""

    name: str
    architecture: str
    vocab_size: int
    text_bytes: dict[str, int]
    """UTF-8 bytes of each domain's ``models`` split that it may see."""
    hidden_size: int
    num_layers: int
    num_steps: int
    batch_rows: int
    learning_rate: float

    def recipe(self) -> Recipe:
        """How it is trained."""
        from first_run.demo.training import Recipe  # torch

        return Recipe(
            self.architecture,
            self.hidden_size,
            self.num_layers,
            self.num_steps,
            self.batch_rows,
            self.learning_rate,
        )


MODELS = (
    ModelSettings("code", "llama", 2048, {"code": 10**8}, 192, 3, 260, 8, 6e-3),
    ModelSettings("prose", "gpt_neox", 1792, {"prose": 10**8}, 192, 3, 240, 8, 6e-3),
    ModelSettings("facts", "mistral", 2304, {"facts": 10**8}, 128, 3, 240, 8, 6e-3),
    ModelSettings("target", "llama", 2048, dict.fromkeys(DOMAINS, 250_000), 128, 3, 110, 8, 6e-3),
)


def code_files(*names: str) -> list[Path]:
    """Files of this package by name, for fingerprints of what they make."""
    return [Path(__file__).with_name(f"{name}.py") for name in names]


def fingerprint(seed: int) -> str:
    """Hash of all that decides the output: the code's own text, the seed, Python, torch."""
    digest = hashlib.sha256()
    for path in code_files(*FILES):
        digest.update(path.read_bytes())
    versions = [version(package) for package in ("torch", "transformers", "tokenizers")]
    digest.update(repr((seed, platform.python_version(), versions)).encode())
    return digest.hexdigest()


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary neighbour, then rename: `path` exists whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


def prepare_folder(out: Path, seed: int) -> None:
    """Keep finished pieces of the same fingerprint; remove those of another."""
    settings = {"fingerprint": fingerprint(seed), "seed": seed}
    path = out / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        logger.info("settings changed: making %s again", out)
        path.unlink()
    if not path.is_file():
        for name in ("text", "models"):
            shutil.rmtree(out / name, ignore_errors=True)
        publish(path, lambda p: _write_json(p, settings))
    for leftover in (*out.glob("text/.*"), *out.glob("models/.*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def make_text(out: Path, seed: int) -> dict[str, list[Document]]:
    """Documents of each domain, made or read."""
    documents = {}
    for domain in DOMAINS:
        print(f"text of domain {domain}", flush=True)
        path = out / "text" / f"{domain}.jsonl"
        if not path.is_file():
            made = (
                fact_documents(SIZES[domain], seed)
                if domain == "facts"
                else library_documents(domain, SIZES[domain], seed)
            )
            publish(path, partial(write_jsonl, made))
        documents[domain] = read_jsonl(path)
    return documents


def take(documents: Sequence[Document], limit_bytes: int, seed: int) -> list[Document]:
    """Documents of the ``models`` split in a shuffled order until the limit is reached."""
    taken, total = [], 0
    for document in sorted(documents, key=lambda d: rank(seed, f"take/{d.id}")):
        if document.split != "models" or total >= limit_bytes:
            continue
        taken.append(document)
        total += size_bytes(document.text)
    return taken


def make_tokenizer(
    name: str, documents: dict[str, list[Document]], seed: int
) -> PreTrainedTokenizerFast:
    """A tokenizer of its own for each model.

    A specialist's learns mainly from its domain, with enough of the others that their text does
    not fall apart into single bytes: segments have to fit every tokenizer of a run.
    """
    from first_run.demo.tokenizers import train_byte_level_bpe, train_unigram

    texts = [
        document.text
        for domain in DOMAINS
        for document in take(documents[domain], 1_000_000 if domain == name else 350_000, seed)
    ]
    vocab_size = next(m.vocab_size for m in MODELS if m.name == name)
    if name == "facts":
        return train_unigram(texts, vocab_size, "</s>")
    if name == "prose":
        return train_byte_level_bpe(
            name, texts, vocab_size, "<|endoftext|>", False, "<|endoftext|>"
        )
    bos, eos = ("<s>", "</s>") if name == "code" else ("<|bos|>", "<|eos|>")
    return train_byte_level_bpe(name, texts, vocab_size, bos, True, eos)


def make_model(
    settings: ModelSettings, documents: dict[str, list[Document]], seed: int, path: Path
) -> None:
    """Train one model and its tokenizer, and save both in the standard layout."""
    import torch

    from first_run.demo.training import build_model, packed_rows, train

    recipe = settings.recipe()
    tokenizer = make_tokenizer(settings.name, documents, seed)
    text = [
        d
        for domain, limit in settings.text_bytes.items()
        for d in take(documents[domain], limit, seed)
    ]
    torch.manual_seed(seed)
    model = build_model(recipe, tokenizer)
    rows = packed_rows(text, tokenizer, recipe.num_steps * recipe.batch_rows, seed)
    num_million = sum(p.numel() for p in model.parameters()) / 1e6
    train(model, rows, recipe, f"{settings.name:6} {settings.architecture} {num_million:.1f}M")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def measure(out: Path, documents: dict[str, list[Document]]) -> dict[str, dict[str, float]]:
    """Bits per byte of each model on each domain's test split."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from first_run.demo.training import bits_per_byte

    table: dict[str, dict[str, float]] = {}
    with Progress("quality", len(MODELS) * len(DOMAINS), unit="score") as progress:
        for settings in MODELS:
            folder = out / "models" / settings.name
            model = AutoModelForCausalLM.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            table[settings.name] = {}
            for domain in DOMAINS:
                held_out = [d for d in documents[domain] if d.split == "test"]
                table[settings.name][domain] = bits_per_byte(model, tokenizer, held_out)
                progress.add(1)
    return table


def show(table: dict[str, dict[str, float]]) -> bool:
    """Print the table; whether every specialist is good enough to teach."""
    click.echo(f"\n{'bits per byte (test)':22}" + "".join(f"{domain:>9}" for domain in DOMAINS))
    for name, row in table.items():
        click.echo(f"{name:22}" + "".join(f"{row[domain]:9.3f}" for domain in DOMAINS))
    ratios = {domain: table[domain][domain] / table["target"][domain] for domain in DOMAINS}
    click.echo(f"{'specialist : target':22}" + "".join(f"{ratios[d] - 1:9.1%}" for d in DOMAINS))
    return all(ratio <= LARGEST_RATIO for ratio in ratios.values())


def make(out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Make whatever is missing, and return the quality table."""
    import torch
    import transformers

    from fuse_train.machine.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(min(2, torch.get_num_threads()))  # small models gain from no more
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prepare_folder(out, seed)
    documents = make_text(out, seed)
    for settings in MODELS:
        path = out / "models" / settings.name
        if not path.is_dir():
            started = time.perf_counter()
            publish(path, partial(make_model, settings, documents, seed))
            logger.info("%s made in %.0f s", settings.name, time.perf_counter() - started)
    quality = out / "models" / "quality.json"
    table = measure(out, documents)
    publish(
        quality, lambda p: _write_json(p, {"bpb": table, "settings": [asdict(m) for m in MODELS]})
    )
    return table


def finished(out: Path, seed: int) -> bool:
    """Whether all pieces of this very fingerprint are there."""
    path = out / "settings.json"
    return (
        path.is_file()
        and (out / "models" / "quality.json").is_file()
        and json.loads(path.read_text()) == {"fingerprint": fingerprint(seed), "seed": seed}
    )


@click.command(help="Make the demo's text and models.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo/inputs"), show_default=True
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Splits, weights, order of text."
)
def main(out: Path, seed: int) -> None:
    """Entry point."""
    set_torch_defaults()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if finished(out, seed):
        table = json.loads((out / "models" / "quality.json").read_text())["bpb"]
        click.echo(f"{out}: complete, nothing to do")
    else:
        table = make(out, seed)
    if not show(table):
        click.echo(
            f"a specialist is less than {1 - LARGEST_RATIO:.0%} below the target: no transfer"
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
