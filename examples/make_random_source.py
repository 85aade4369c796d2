"""Make a source that knows nothing: the demo's facts specialist with random weights.

    python examples/make_random_source.py --inputs runs/demo/inputs

Output: models/random, beside what make_demo.py made there before. A study adds it to the sources, to
see whether a selector leaves it out.
"""

from __future__ import annotations

from pathlib import Path

import click

from first_run.demo.make import publish


@click.command(help="Make a source that knows nothing.")
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    default=Path("runs/demo/inputs"),
    show_default=True,
    help="What make_demo.py made.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights.")
def main(inputs: Path, seed: int) -> None:
    """Entry point."""
    made = inputs / "models" / "facts"
    if not (made / "config.json").is_file():
        raise click.ClickException(f"{made} is not there: run make_demo.py first")
    path = inputs / "models" / "random"
    if path.is_dir():
        click.echo(f"{path}: complete, nothing to do")
        return
    publish(path, lambda temporary: _write(made, temporary, seed))
    click.echo(str(path))


def _write(made: Path, path: Path, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made), dtype=torch.float32)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(made).save_pretrained(path)


if __name__ == "__main__":
    main()
