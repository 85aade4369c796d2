"""`logitfuse merge`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from fuse_train.merge import MERGES
from fuse_train.merge.recipe import parse_recipe
from launch.command import echo_json, json_option, set_up_logging
from store_schema.errors import ConfigError

if TYPE_CHECKING:
    from fuse_train.merge.run import Merged


@click.command("merge")
@click.argument("out", type=click.Path())
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--method",
    required=True,
    metavar="METHOD",
    type=click.Choice(MERGES.names()),
    help=f"How to merge: {', '.join(MERGES.names())}.",
)
@click.option(
    "--base", metavar="MODEL", help="Model the others were trained from, if the method needs it."
)
@click.option(
    "--weights",
    metavar="W,W,...",
    help="Weight of each model, in their order; not for slerp, varm and sce.  [default: 1 each]",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the method, such as density=0.1 (may be repeated): docs/merging.md.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="dtype of the merged weights, such as bfloat16; auto: that of the base, or first model.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the random methods: dare_linear, dare_ties, della.",
)
@json_option
def merge(
    out: str,
    models: tuple[str, ...],
    method: str,
    base: str | None,
    weights: str | None,
    options: tuple[str, ...],
    dtype: str,
    seed: int,
    as_json: bool,
) -> None:
    """Merge the weights of models of one shape into the folder OUT.

    MODEL is a folder, a GGUF file or a name on the hub. Config and tokenizer are those of the base, or
    of the first model where the method has no base.
    """
    set_up_logging()
    fields: dict[str, Any] = {"method": method, "dtype": dtype, "seed": seed}
    if weights is not None:
        fields["weights"] = _numbers(weights)
    if options:
        fields[MERGES[method].field] = _options(method, options)
    recipe = parse_recipe(fields)
    recipe.require_models(len(models), with_base=base is not None)
    from fuse_train.merge.run import merge_models
    from launch.progress import Progress

    shown: list[Progress] = []

    def on_bytes(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress("merge", total, unit="B"))
        shown[0].add(done)

    merged = merge_models(
        Path(out), recipe, models, base, on_bytes=on_bytes if sys.stderr.isatty() else None
    )
    if shown:
        shown[0].__exit__(None, None, None)
    if as_json:
        echo_json(_object(out, merged))
    else:
        click.echo(_line(out, merged))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "weights refused", where="--weights", expected="numbers such as 0.5,0.5", got=text
        ) from error


def _options(method: str, texts: tuple[str, ...]) -> dict[str, Any]:
    if MERGES[method].section is None:
        raise ConfigError("the method has no options", where=f"merge by {method}", got=texts[0])
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError("option refused", where="--option", expected="key=value", got=text)
        try:
            options[key.removeprefix(f"{method}.")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError("option is not YAML", where="--option", got=text) from error
    return options


def _line(out: str, merged: Merged) -> str:
    from launch.quantities import duration_text, size_text

    record = merged.record
    what = f"{record.num_tensors} tensors, {size_text(record.num_bytes)}, {out}"
    if not merged.fresh:
        return f"merge: complete, nothing to do: {what}"
    return f"merged by {record.recipe['method']}: {what}, {duration_text(merged.seconds)}"


def _object(out: str, merged: Merged) -> dict[str, Any]:
    record = merged.record.model_dump(mode="json", exclude={"schema_version"})
    return {"out": out, "fresh": merged.fresh, "seconds": round(merged.seconds, 3)} | record
