"""`logitfuse demo`, `logitfuse init` and `logitfuse doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from launch.command import cost_options, echo_json, json_option, set_up_logging
from store_schema.errors import ConfigError

PRESETS = ("exact", "fine", "compact", "tiny")


@click.command("demo")
@click.option(
    "--run-dir",
    metavar="PATH",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of all inputs and outputs. Default: runs/demo, with another seed runs/demo-SEED.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Of text, models and training.",
)
def demo(run_dir: Path | None, seed: int) -> None:
    """Make small models and text on the spot, run every stage on them, and write the report.

    Needs no network, no GPU and no repository: two cores and 6 GB of memory, about
    20 minutes. Shows each command before it runs it. Does nothing where all is complete, and goes on
    where it was stopped.
    """
    set_up_logging()
    from first_run.demo.run import RUN_DIR, run_demo

    run_demo(run_dir or Path(RUN_DIR if seed == 0 else f"{RUN_DIR}-{seed}"), seed)


@click.command("init")
@click.argument("place", metavar="FOLDER_OR_FILE")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="A model to fuse: a folder, a GGUF file, a hub name, or `target` (may be repeated).",
)
@click.option("--target", metavar="MODEL", help="The model to train.")
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="A file, folder or glob of text or chats (may be repeated).",
)
@click.option(
    "--run-dir",
    metavar="PATH",
    help="Folder or URL of all outputs. Default: FOLDER, or runs/ and the file's name.",
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default="fine",
    show_default=True,
    help="How much stores keep.",
)
@cost_options
@click.option("--yes", is_flag=True, help="Ask nothing; what is missing is then an error.")
@click.option("--dry-run", is_flag=True, help="Only look, and write nothing.")
@json_option
def init(
    place: str,
    sources: tuple[str, ...],
    target: str | None,
    data: tuple[str, ...],
    run_dir: str | None,
    **options: object,
) -> None:
    """Write a run file for your models and data, and show what the run will cost.

    Asks for what no option gives. Looks at the models' configs and tokenizers and at the first thousand
    rows of the data; weights are neither loaded nor downloaded. Never replaces a file.
    """
    set_up_logging()
    from extract.estimate.costs import Assumed
    from first_run.init.findings import find_out
    from first_run.init.report import facts, next_steps, report
    from first_run.init.run_file import parsed, run_file_text, write_run_file
    from first_run.init.wanted import Place, complete

    asks = not options["yes"]
    where = Place.of(place, run_dir)
    asked = asks and not (sources and target and data)
    preset = str(options["preset"])
    wanted = complete(where, sources, target, data, asks=asks, preset=preset)  # type: ignore[arg-type]
    found = find_out(wanted, Assumed(float(str(options["tflops"])), float(str(options["rate"]))))
    text = run_file_text(found)
    parsed(text, wanted.file)
    if not options["as_json"]:
        click.echo(report(found))
    writes = not options["dry_run"]
    if writes and asked:
        writes = _confirmed(f"write {wanted.file}?")
    if writes:
        write_run_file(text, wanted.file)
    if options["as_json"]:
        echo_json(facts(found, written=writes))
        return
    if not writes:
        click.echo("\nnothing written")
        return
    click.echo(f"\nwrote {wanted.file}; next:")
    click.echo("\n".join(f"  {step}" for step in next_steps(found)))


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question, default=True, err=True)
    except click.Abort as error:
        click.echo(err=True)
        raise ConfigError("not answered, nothing was written", where="init") from error


@click.command("doctor")
@click.argument("run_file", metavar="[RUN_FILE]", required=False, type=click.Path(dir_okay=False))
@json_option
@click.pass_context
def doctor(context: click.Context, run_file: str | None, as_json: bool) -> None:
    """Look for what would stop a run: environment, GPUs, disk, and what RUN_FILE needs.

    Each finding has a remedy. Exit code 0 with warnings, 2 with an error. Secrets are looked for by
    name and never printed. A bucket of the run file gets a small object, which is deleted again.
    """
    set_up_logging()
    from first_run.doctor.report import as_json as checks_json
    from first_run.doctor.report import check_lines, summary
    from first_run.doctor.run import examine

    checks = []
    for check in examine(run_file):
        checks.append(check)
        if not as_json:
            click.echo("\n".join(check_lines(check)))
    if as_json:
        echo_json(checks_json(checks))
    else:
        click.echo(f"\n{summary(checks)}")
    if any(check.state == "error" for check in checks):
        context.exit(2)
