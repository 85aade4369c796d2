"""The `logitfuse` command. Imports a stage's commands only when one of them is called."""

from __future__ import annotations

import importlib

import click
from click.shell_completion import CompletionItem

from launch.command import StageGroup

STAGES = {
    "demo": ("first_run.cli", "demo", "Make small models, fuse them, and write the report."),
    "init": ("first_run.cli", "init", "Write a run file for your models and data, with its cost."),
    "doctor": ("first_run.cli", "doctor", "Look for what would stop a run, with remedies."),
    "corpus": ("extract.cli", "corpus", "Turn text into documents."),
    "extract": ("extract.cli", "extract", "Plan segments and score them with each source."),
    "judge": ("extract.judging.cli", "judge", "Score the sources' answers, and choose the best."),
    "align": ("align.cli", "align", "Convert distributions to the target's tokens."),
    "train": ("fuse_train.cli", "train", "Train the target on ground truth and the fused sources."),
    "merge": ("fuse_train.merge.cli", "merge", "Merge the weights of models of one shape."),
    "eval": ("fuse_eval.cli", "evaluate", "Score models and pools of sources in bits per byte."),
    "study": ("fuse_eval.study.cli", "study", "Compare many trainings over shared stores."),
    "report": ("fuse_eval.cli", "report", "Write the report of a run."),
    "submit": ("launch.cli", "submit", "Run stages as Slurm jobs that wait for each other."),
    "status": ("launch.status_cli", "status", "Show how far a run is, and its workers."),
    "preset": ("launch.cli", "preset", "List and show the recipes of published papers."),
    "store": ("store_tools.cli", "store", "Tune, verify, repair, show, copy and export stores."),
}
FROM_ELSEWHERE = {"store": {"tune": ("extract.cli", "tune")}}
"""Commands of a group that another package owns: tuning a store needs its model."""


def _load(module: str, attribute: str) -> click.Command:
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


class LazyGroup(StageGroup):
    """Lists every stage from the table above and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(STAGES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in STAGES:
            return None
        module, attribute, _ = STAGES[cmd_name]
        command = _load(module, attribute)
        for name, place in FROM_ELSEWHERE.get(cmd_name, {}).items():
            assert isinstance(command, click.Group)
            command.add_command(_load(*place), name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        stages = [(name, text) for name, (_, _, text) in STAGES.items()]
        items = [CompletionItem(n, help=text) for n, text in stages if n.startswith(incomplete)]
        # Not of click.Group, which would import every stage for its help.
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Stages, in the order of a run"):
            formatter.write_dl([(name, text) for name, (_, _, text) in STAGES.items()])


@click.group(cls=LazyGroup)
@click.version_option(package_name="logitfuse")
def main() -> None:
    """Fuse several language models into one, through a store of their distributions.

    Every stage reads the same run file, does nothing when its output is complete, and resumes where
    it was stopped.
    """


if __name__ == "__main__":
    main(prog_name="logitfuse")
