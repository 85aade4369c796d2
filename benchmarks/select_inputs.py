"""What `make bench-select` measures on: text, small sources made on the spot, and their stores.

Text that no source was trained on, by domain:

========== ============================================================ =======================
code       standard library without its docstrings                      one domain per segment
prose      the docstrings, and other English that ships with CPython    one
facts      the demo's generated facts                                   one
plays      tinyshakespeare                                              one
documented standard library as it is: code with its docstrings          switches in a segment
worked     GSM8K test: a word problem, then its answer with equations   switches in a segment
========== ============================================================ =======================

Sources, each with a tokenizer of its own: code, prose, facts, plays, problems (questions of GSM8K
train), solutions (answers of GSM8K train), and `random`, whose weights were never trained. No source
has seen a switch. Splits: `models` trains sources, `train` selectors, `valid` chooses weights and
rates, `test` is measured.

Every stage is the command line's own (corpus, extract, align). Pieces are published whole and kept.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.align_student import stage_of
from first_run.demo.facts import fact_documents
from first_run.demo.make import code_files, publish, take
from first_run.demo.text import (
    Document,
    SplitSizes,
    assign_splits,
    drop_copies,
    library_documents,
    rank,
    size_bytes,
    write_jsonl,
)

ROOT = Path(__file__).resolve().parent.parent

PURE = ("code", "prose", "facts", "plays")
SWITCHING = ("documented", "worked")
DOMAINS = PURE + SWITCHING
RANDOM = "random"
SIZES = SplitSizes(train=70_000, valid=20_000, test=70_000)
"""UTF-8 bytes of each domain."""

PLAY_BYTES = 2_500
SHAPES = ("text", "facts", "tokenizers", "training", "muon")
"""Scripts whose own text shapes the output."""


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """One source; texts are those of the `models` split.

    Args:
        name: Of the source and of its text.
        architecture: Of `first_run.demo.training.Recipe`.
        rule: How its tokenizer splits text, of `first_run.demo.tokenizers`, or "unigram".
        vocab_size: Of its tokenizer.
        hidden_size: Of the model.
        num_steps: Of training; 0 leaves the weights random.
    """

    name: str
    architecture: str
    rule: str
    vocab_size: int = 1536
    hidden_size: int = 192
    num_steps: int = 260


SOURCES = (
    SourceSettings("code", "llama", "code", 1792),
    SourceSettings("prose", "gpt_neox", "prose"),
    SourceSettings("facts", "mistral", "unigram", 1792),
    SourceSettings("plays", "llama", "prose"),
    SourceSettings("problems", "mistral", "code", num_steps=200),
    SourceSettings("solutions", "llama", "target", num_steps=200),
    SourceSettings(RANDOM, "llama", "code", num_steps=0),
)
TARGET = SourceSettings("target", "llama", "target", 2048, num_steps=0)
"""Its tokenizer is what stores are aligned to; the model is never trained."""

NUM_LAYERS, BATCH_ROWS, LEARNING_RATE = 2, 8, 6e-3


def settings_fingerprint(seed: int, data: Path) -> str:
    """Of all that decides text and models."""
    digest = hashlib.sha256()
    for path in (*code_files(*SHAPES), *data_files(data)):
        digest.update(path.read_bytes())
    shape = (SIZES, SOURCES, TARGET, NUM_LAYERS, BATCH_ROWS, LEARNING_RATE, PLAY_BYTES)
    versions = [version(package) for package in ("torch", "transformers", "tokenizers")]
    digest.update(repr((seed, shape, platform.python_version(), versions)).encode())
    return digest.hexdigest()[:16]


def stores_fingerprint() -> str:
    """Of the code that decides what aligned stores hold."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "align").rglob("*.py")):
        digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]


def data_files(data: Path) -> tuple[Path, ...]:
    """The text that the project does not bring along.

    Raises:
        click.ClickException: A file is missing.
    """
    names = ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "tinyshakespeare/input.txt")
    found = tuple(data / name for name in names)
    for path in found:
        if not path.is_file():
            raise click.ClickException(f"{path} is missing: give the folder of texts with --data")
    return found


# ---- text ------------------------------------------------------------------------------------------


def make_documents(seed: int, data: Path) -> list[Document]:
    """Every document with its domain and split."""
    _, _, plays = data_files(data)
    documented = _documented(seed)
    held = {d.id.split("/", 1)[1] for d in documented}
    library = [
        d
        for domain in ("code", "prose")
        for d in library_documents(domain, SIZES, seed)
        if d.id.split("/", 1)[1] not in held
    ]
    facts = fact_documents(SIZES, seed)
    scenes = assign_splits(_scenes(plays.read_text(encoding="utf-8")), SIZES, seed)
    return [*library, *facts, *scenes, *documented, *_problems(seed, data)]


def _documented(seed: int) -> list[Document]:
    """Modules as they are, held out; nothing of them is in the text of the source code or prose."""
    names = [
        {d.id.split("/", 1)[1] for d in library_documents(domain, SIZES, seed)}
        for domain in ("code", "prose")
    ]
    root = Path(sysconfig.get_paths()["stdlib"])
    whole = [
        Document(f"documented/{name}", (root / name).read_text(encoding="utf-8"), "documented")
        for name in sorted(names[0] & names[1])
    ]
    return [d for d in assign_splits(drop_copies(whole), SIZES, seed) if d.split != "models"]


def _scenes(text: str) -> list[Document]:
    """Speeches in pieces of about `PLAY_BYTES`."""
    pieces, current = [], ""
    for speech in text.split("\n\n"):
        current += speech + "\n\n"
        if size_bytes(current) >= PLAY_BYTES:
            pieces.append(current)
            current = ""
    return [Document(f"plays/{i:04}", piece, "plays") for i, piece in enumerate(pieces)]


def _problems(seed: int, data: Path) -> list[Document]:
    """Questions and answers of GSM8K train apart, for models; test problems whole, held out."""
    train, test, _ = data_files(data)
    documents = []
    for i, row in enumerate(_rows(train)):
        documents.append(Document(f"problems/{i}", row["question"] + "\n", "problems"))
        documents.append(Document(f"solutions/{i}", row["answer"] + "\n", "solutions"))
    wanted = {"test": SIZES.test, "valid": SIZES.valid, "train": SIZES.train}
    rows = list(enumerate(_rows(test)))
    for i, row in sorted(rows, key=lambda item: rank(seed, f"worked/{item[0]}")):
        split = next((name for name, left in wanted.items() if left > 0), None)
        if split is None:
            break
        text = f"{row['question']}\n{row['answer']}\n"
        wanted[split] -= size_bytes(text)
        documents.append(Document(f"worked/{i}", text, "worked", split))
    return documents


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- one seed --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Text, models and stores of one seed, in a folder of its own.

    Args:
        seed: Of text, weights, order.
        root: Folder of the benchmark.
        data: Folder of the texts that the project does not bring along.
    """

    seed: int
    root: Path
    data: Path

    @cached_property
    def folder(self) -> Path:
        """Of this seed and these settings."""
        return self.root / f"seed-{self.seed}-{settings_fingerprint(self.seed, self.data)}"

    @property
    def run_file(self) -> Path:
        """With all sources, `random` last."""
        return self.folder / "run.yaml"

    @cached_property
    def documents(self) -> list[Document]:
        """Text of all domains."""
        return make_documents(self.seed, self.data)

    def make(self) -> None:
        """Make whatever is missing."""
        self.make_models()
        self.make_stores()

    def make_models(self) -> None:
        """Text and models."""
        text = self.folder / "text.jsonl"
        if not text.is_file():
            held_out = [d for d in self.documents if d.split != "models"]
            publish(text, partial(write_jsonl, held_out))
        for settings in (*SOURCES, TARGET):
            path = self.folder / "models" / settings.name
            if not path.is_dir():
                publish(path, partial(self._make_model, settings))

    def make_stores(self) -> None:
        """Plan, source stores and aligned stores."""
        self._write_run()
        mark, made_by = self.folder / "stores.done", stores_fingerprint()
        if mark.is_file():
            if mark.read_text() == made_by:
                return
            mark.unlink()
            shutil.rmtree(self.folder / "data")  # made by another alignment
            for path in self.folder.glob("figures-*.json"):
                path.unlink()
        for stage in ("corpus", "build"), ("extract", "plan"), ("extract", "run"), ("align", "run"):
            stage_of(*stage, self.run_file)
        shutil.rmtree(self.folder / "data" / "stores")  # aligned stores are all that is read
        mark.write_text(made_by)

    def _make_model(self, settings: SourceSettings, path: Path) -> None:
        import torch

        from first_run.demo.training import Recipe, build_model, packed_rows, train
        from fuse_train.machine.allocator import keep_freed_memory

        keep_freed_memory()
        recipe = Recipe(
            settings.architecture,
            settings.hidden_size,
            NUM_LAYERS,
            settings.num_steps,
            BATCH_ROWS,
            LEARNING_RATE,
        )
        tokenizer = self._tokenizer(settings)
        torch.manual_seed(self.seed)
        model = build_model(recipe, tokenizer)
        if settings.num_steps:
            text = self._text(settings.name)
            rows = packed_rows(text, tokenizer, recipe.num_steps * recipe.batch_rows, self.seed)
            train(model, rows, recipe, f"seed {self.seed} {settings.name}")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    def _text(self, domain: str, limit_bytes: int = 10**8) -> list[Document]:
        return take([d for d in self.documents if d.domain == domain], limit_bytes, self.seed)

    def _tokenizer(self, settings: SourceSettings) -> Any:
        """Mainly of the source's own text, with enough of the rest that it stays in pieces."""
        from first_run.demo.tokenizers import train_byte_level_bpe, train_unigram

        texts = [
            d.text
            for domain in (*PURE, "problems", "solutions")
            for d in self._text(domain, 600_000 if domain == settings.name else 150_000)
        ]
        if settings.rule == "unigram":
            return train_unigram(texts, settings.vocab_size, "</s>")
        adds_bos = settings.rule != "prose"
        return train_byte_level_bpe(
            settings.rule, texts, settings.vocab_size, "<s>", adds_bos, "</s>"
        )

    def _write_run(self) -> None:
        models = self.folder / "models"
        content = {
            "name": f"select-{self.seed}",
            "run_dir": str(self.folder / "data"),
            "seed": self.seed,
            "sources": {s.name: _reference(models / s.name) for s in SOURCES},
            "target": _reference(models / TARGET.name),
            "corpus": {
                "inputs": [{"path": str(self.folder / "text.jsonl")}],
                "splits": ["train", "valid", "test"],
                "on_bad": "drop",
            },
            "plan": {"max_tokens": 256, "shard_tokens": 16_384},
            "extract": {"engine": "transformers", "device": "cpu", "top_k": 32},
            "train": {"selector": "asn"},
        }
        text = yaml.safe_dump(content, sort_keys=False)
        if not self.run_file.is_file() or self.run_file.read_text() != text:
            publish(self.run_file, lambda path: _write(path, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _reference(folder: Path) -> dict[str, str]:
    return {"model": str(folder), "dtype": "float32"}


@click.command()
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench/select"))
@click.option("--data", type=click.Path(path_type=Path), default=ROOT.parent / "shared" / "data")
@click.option("--models-only", is_flag=True)
def main(seeds: Sequence[int], out: Path, data: Path, models_only: bool) -> None:
    """Make models and stores of some seeds, ahead of the measurement."""
    for seed in seeds:
        inputs = Inputs(seed, out.resolve(), data.resolve())
        inputs.make_models()
        if not models_only:
            inputs.make_stores()
        click.echo(f"{inputs.folder}: ready")


if __name__ == "__main__":
    main()
