"""All checks of `logitfuse doctor`, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from first_run.doctor import environment, machine, reach
from first_run.doctor.check import Check, error, ok, outcomes
from store_schema.config import RunConfig, load_run
from store_schema.errors import ConfigError


def examine(path: str | None) -> Iterator[Check]:
    """Every check, each as soon as it is known.

    Args:
        path: A run file; None for the machine alone. One that is refused is an error among the others.
    """
    run, refused = None, None
    if path is not None:
        try:
            run = load_run(path)
        except ConfigError as fault:
            refused = error("run file", fault.line(), "correct it; `logitfuse init` writes one")
    looks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", environment.check_python),
        ("packages", partial(environment.check_packages, run)),
        ("imports", environment.check_transformers_imports),
        ("vllm", partial(environment.check_vllm, run)),
        ("GPU", partial(machine.check_gpus, run)),
        ("CPU", machine.check_cpu),
        ("memory", machine.check_memory),
        ("open files", machine.check_files),
        ("cache", machine.check_cache),
        ("credentials", partial(environment.check_secrets, run)),
    ]
    for name, look in looks:
        yield from outcomes(name, look)
    if refused is not None:
        yield refused
    if run is not None:
        yield from _of_run(run, str(path))


def _of_run(run: RunConfig, path: str) -> Iterator[Check]:
    yield ok("run file", path)
    for name, look in (
        ("models", reach.check_models),
        ("data", reach.check_data),
        ("storage", reach.check_storage),
        ("scheduler", reach.check_scheduler),
        ("disk", reach.check_disk),
    ):
        yield from outcomes(name, partial(look, run))
