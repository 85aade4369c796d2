"""`logitfuse preset`: the recipes of published papers, as pieces of a run file."""

from __future__ import annotations

import click

from launch.command import StageGroup


@click.group("preset", cls=StageGroup)
def preset() -> None:
    """Recipes of published papers: `preset: NAME` in a run file puts one under its values."""


@preset.command("list")
def list_presets() -> None:
    """Name every preset and the paper it is of."""
    from store_schema.papers import preset_names, preset_title

    width = max(map(len, preset_names()))
    for name in preset_names():
        click.echo(f"{name:{width}}  {preset_title(name)}")


@preset.command("show")
@click.argument("name")
def show_preset(name: str) -> None:
    """Print a preset as it could stand in a run file, with a comment at each value.

    A comment says where the value comes from: the paper, its public code, or us and why.
    """
    from store_schema.papers import preset_text

    click.echo(preset_text(name), nl=False)
