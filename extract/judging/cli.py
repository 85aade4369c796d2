"""The commands `judge` (or `judge run`) and `judge show`."""

from __future__ import annotations

import click

from launch.command import (
    StageGroup,
    echo_json,
    echo_next,
    echo_pages,
    json_option,
    run_options,
    timed_stage,
)
from store_schema.config import RunConfig


class _JudgeGroup(StageGroup):
    """`judge RUN` is `judge run RUN`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_JudgeGroup)
def judge() -> None:
    """Score the sources' answers, choose the best and write them as a corpus: `judge RUN`."""


@judge.command("run")
@run_options
@json_option
def run_judges(run: RunConfig, as_json: bool) -> None:
    """Score all answers that are not scored yet, and choose the best (the same as `judge RUN`)."""
    from extract.judging.records import judged_location
    from extract.judging.report import judged_report
    from extract.judging.run import judge_answers

    with timed_stage(run, "judge") as figures:
        record, changed = judge_answers(run)
        figures |= {"prompts": sum(record.settled_by.values()), "silent": record.silent}
    folder = judged_location(run).url
    if as_json:
        content = record.model_dump(mode="json", exclude={"schema_version"})
        echo_json(content | {"folder": folder, "fresh": changed})
        return
    if not changed:
        click.echo("judge complete, nothing to do")
    else:
        click.echo(judged_report(record, folder))
    echo_next("judge show")


@judge.command("show")
@run_options
@json_option
@click.option(
    "--prompt", "prompts", multiple=True, metavar="ID", help="Only this prompt (may be repeated)."
)
@click.option(
    "--author",
    "authors",
    multiple=True,
    metavar="SOURCE",
    help="Only prompts whose best answer is this source's (may be repeated).",
)
@click.option(
    "--domain", "domains", multiple=True, metavar="NAME", help="Only this domain (may be repeated)."
)
@click.option("--disputed", is_flag=True, help="Only prompts on which the judges disagree.")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="At most N prompts. Default: all."
)
def show(
    run: RunConfig,
    prompts: tuple[str, ...],
    authors: tuple[str, ...],
    domains: tuple[str, ...],
    disputed: bool,
    limit: int | None,
    as_json: bool,
) -> None:
    """Show prompts with their best answer, all scores and votes; page by page on a terminal."""
    from extract.judging.show import chosen_prompts, prompt_objects, shown_prompts

    chosen = chosen_prompts(
        run, prompts=prompts, authors=authors, domains=domains, disputed=disputed, limit=limit
    )
    if not as_json:
        echo_pages("".join(shown_prompts(chosen)) or "no prompt is as asked for\n")
        return
    for prompt in prompt_objects(chosen):
        echo_json(prompt)
