"""Options of sbatch: read from the command line, checked, merged for a stage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from launch.stages import Scope, Stage, split_scope
from store_schema.errors import ConfigError

OptionValue = bool | int | str | None
"""True: an option without a value. None and False: not given."""
Options = dict[str, OptionValue]

DEFAULTS: Options = {"signal": "B:USR1@120"}
"""The early warning comes two minutes before the time limit, to the script alone."""

_OURS = frozenset(
    (
        "array",
        "chdir",
        "clusters",
        "dependency",
        "error",
        "input",
        "job-name",
        "kill-on-invalid-dep",
        "no-requeue",
        "open-mode",
        "output",
        "parsable",
        "requeue",
        "test-only",
        "wait",
        "wrap",
    )
)
"""Options that `submit` sets itself."""
_ONE = frozenset({"nodes", "ntasks", "ntasks-per-node"})
_GPUS = ("gpus", "gpus-per-node", "gpus-per-task")
_WHY_ONE = {
    False: "a worker is one process, take more workers (training: train:nodes=N)",
    True: "one torchrun on each node starts its processes",
}
_TIMES = frozenset({"time", "time-min"})
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_VALUE = re.compile(r"[A-Za-z0-9_.,:;@%/+=*&|!()\[\]{}<>~^-]+")
_NEXT_OPTION = re.compile(r",(?=[a-z][a-z0-9-]*=)")


def checked_options(options: Mapping[str, OptionValue], scope: Scope = "all") -> Options:
    """The same options, checked; whether sbatch knows a name is left to sbatch.

    Args:
        options: Values by long name.
        scope: Stages that they are for. Only training may have several nodes.

    Raises:
        ValueError: An option that `submit` sets itself, or a value that a script cannot contain.
    """
    for name, value in options.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a long option of sbatch, such as cpus-per-task")
        if name in _OURS:
            raise ValueError(f"{name} is set by submit")
        if value is True and name in _ONE | {"signal"}:
            raise ValueError(f"{name} needs a value")
        if value is None or isinstance(value, bool):
            continue
        if name in _TIMES and isinstance(value, int):
            raise ValueError(f"{name} needs quotes: YAML reads 4:00:00 as 14400")
        if not _VALUE.fullmatch(str(value)):
            raise ValueError(f"{name} has a character that a script cannot contain: {value!r}")
        if name == "nodes" and scope == "train":
            if not re.fullmatch(r"[1-9][0-9]{0,5}", str(value)):
                raise ValueError(f"nodes can only be one number from 1: {value!r}")
        elif name in _ONE and str(value) != "1":
            raise ValueError(f"{name} can only be 1: {_WHY_ONE[scope == 'train']}")
        if name == "signal" and not re.fullmatch(r"B:USR1@\d+", str(value)):
            raise ValueError("signal can only be B:USR1@SECONDS")
    return dict(options)


def parse_options(texts: Sequence[str]) -> dict[Scope, Options]:
    """Options from the command line by scope; later ones override earlier ones.

    Args:
        texts: "[SCOPE:]NAME=VALUE[,NAME=VALUE...]" each; an empty value removes the option. A comma is
            part of the value unless NAME= follows. A NAME alone, or first, has no value.

    Raises:
        ConfigError: Not of this form, or refused by `checked_options`.
    """
    by_scope: dict[Scope, Options] = {}
    for text in texts:
        scope, rest = split_scope(text)
        options: Options = {}
        for part in _NEXT_OPTION.split(rest):
            name, equals, value = part.partition("=")
            options[name] = (value or None) if equals else True
        try:
            by_scope[scope] = by_scope.get(scope, {}) | checked_options(options, scope)
        except ValueError as error:
            raise ConfigError("option refused", where=f"--slurm {text}", got=str(error)) from error
    return by_scope


def options_of(
    stage: Stage, file: Mapping[Scope, Options], command_line: Mapping[Scope, Options]
) -> dict[str, str]:
    """Options of one stage's jobs. The command line overrides the file; a stage's options override
    those of all stages.

    Args:
        stage: The stage.
        file: Options of the run file.
        command_line: Options of the command line.

    Returns:
        Values by name, "" for an option without one.
    """
    layers = (
        options.get(scope, {}) for options in (file, command_line) for scope in ("all", stage)
    )
    return merged_options(*layers)


def merged_options(*layers: Mapping[str, OptionValue]) -> dict[str, str]:
    """Options of a job, "" for one without a value; later layers override earlier ones."""
    merged = dict(DEFAULTS)
    for options in layers:
        merged |= options
    return {
        name: "" if value is True else str(value)
        for name, value in merged.items()
        if value is not None and value is not False
    }


def gpus_of(options: Mapping[str, str]) -> int:
    """GPUs of one job, from its options gpus, gpus-per-node, gpus-per-task or gres, else 0."""
    return next(iter(gpu_counts(options).values()), 0)


def gpu_counts(options: Mapping[str, str]) -> dict[str, int]:
    """GPUs by the option that asks for them: gpus for a job, the others for each node of a job that
    has one task on a node. Several types are added up (`a100:2,v100:2`)."""
    counts = {name: sum(map(_count, options[name].split(","))) for name in _GPUS if name in options}
    resources = [part.removeprefix("gres/") for part in options.get("gres", "").split(",")]
    if gpus := [part for part in resources if part.partition(":")[0] == "gpu"]:
        counts["gres"] = sum(map(_count, gpus))
    return counts


def _count(part: str) -> int:
    """N of `TYPE:N` or `N`; without a number it is 1."""
    last = part.rpartition(":")[2]
    return int(last) if last.isdecimal() else 1
