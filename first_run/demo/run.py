"""`logitfuse demo`: the run file, the inputs, and one command for each stage."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import click

from launch.process import child_environment
from launch.signals import StopFlag, stop_on_signals
from store_schema.errors import ConfigError
from store_schema.yaml_file import read_yaml

STAGES = (
    ("corpus", "build"),
    ("extract", "plan"),
    ("extract", "run"),
    ("align", "run"),
    ("eval", "pool"),
    ("train", "run"),
    ("eval", "run"),
    ("report",),
)
"""As `make demo` has them."""

RUN_DIR = "runs/demo"
"""The run folder that `demo.yaml` names, as written in it."""

_PLAIN_PATH = re.compile(r"[\w./@+-]+")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_POLL_S = 0.2


def run_file_text(run_dir: Path, seed: int, engine: str) -> str:
    """The demo's run file for another folder, seed or engine, comments and all.

    Args:
        run_dir: Folder of the run's inputs and outputs.
        seed: Seed of the run.
        engine: What scores the sources: "vllm" or "transformers".

    Raises:
        ConfigError: The path has characters that YAML or a run file reads in another way.
    """
    folder = run_dir.as_posix()
    if not _PLAIN_PATH.fullmatch(folder):
        raise ConfigError(
            "a path that cannot stand in a run file as it is",
            where="--run-dir",
            expected="letters, digits and ./@+-_",
            got=repr(folder),
        )
    name = run_dir.name if _NAME.fullmatch(run_dir.name) else "demo"
    head = f"name: {name}"
    if folder != f"runs/{name}":
        head += f"\nrun_dir: {folder}"
    text = (files("first_run.demo") / "demo.yaml").read_text(encoding="utf-8")
    for line, wanted in (
        (r"^name: demo$", head),
        (r"^seed: 0$", f"seed: {seed}"),
        (r"^  engine: vllm$", f"  engine: {engine}"),
    ):
        text, count = re.subn(line, wanted, text, flags=re.MULTILINE)
        assert count == 1, f"demo.yaml has {count} lines {line}"
    return re.sub(rf"\b{RUN_DIR}/", f"{folder}/", text)


def write_run_file(run_dir: Path, seed: int, engine: str) -> tuple[Path, bool]:
    """Write `demo.yaml` into the run folder; one that is there is kept, since it may have been edited.

    Returns:
        Its path, and whether it was written.

    Raises:
        ConfigError: The file that is there has another seed.
    """
    path = run_dir / "demo.yaml"
    text = run_file_text(run_dir, seed, engine)
    if path.exists():
        there = read_yaml(path, "run file").get("seed")
        if there != seed:
            raise ConfigError(
                "the demo was made with another seed",
                where=path,
                expected=f"seed {seed}",
                got=there,
                hint="give that seed, or another --run-dir",
            )
        return path, False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path, True


def commands(run_dir: Path, seed: int, run_file: Path) -> list[list[str]]:
    """What is run, in order, as one would type it."""
    inputs = [*("python", "-m", "first_run.demo.make"), "--out", str(run_dir / "inputs")]
    return [
        [*inputs, "--seed", str(seed)],
        *(["logitfuse", *stage, str(run_file)] for stage in STAGES),
    ]


def engine_here() -> str:
    """The engine that is installed.

    Raises:
        ConfigError: Packages that the demo trains with are missing.
    """
    needed = ("torch", "accelerate", "safetensors", "sentencepiece")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "packages are missing",
            where="logitfuse demo",
            got=f"no {', '.join(missing)}",
            hint="pip install 'logitfuse[train]'",
        )
    return "transformers" if find_spec("vllm") is None else "vllm"


def run_demo(run_dir: Path, seed: int) -> None:
    """Run the demo; what is complete is not done again.

    Raises:
        ConfigError: See `write_run_file` and `engine_here`.
        Stopped: By a signal, passed on to the stage that was running.
        SystemExit: A stage failed, with its code; it has said why.
    """
    engine = engine_here()
    run_file, written = write_run_file(run_dir, seed, engine)
    said = "the run file" if written else "the run file as it is there"
    click.echo(f"{run_file}: {said}; engine here: {engine}")
    for words in commands(run_dir, seed, run_file):
        click.echo(f"\n$ {shlex.join(words)}")
        code = _call(words)
        if code:
            click.echo(
                f"stopped at `{shlex.join(words)}`; `logitfuse demo` goes on there", err=True
            )
            sys.exit(code)
    click.echo(f"\nopen {run_dir / 'report' / 'index.html'}")
    click.echo(f"change a line of {run_file} and give any of these commands again")


def _call(words: Sequence[str]) -> int:
    """Run a command of `commands` in a process of its own; its exit code."""
    module = words[2:] if words[0] == "python" else words
    # -P: a folder here may have the name of a package.
    program = [sys.executable, "-P", "-m", *module]
    with stop_on_signals() as stop:
        child = subprocess.Popen(program, env=child_environment())
        code = _wait(child, stop)
    stop.check()
    return code if code >= 0 else 128 - code


def _wait(child: subprocess.Popen[bytes], stop: StopFlag) -> int:
    asked = False
    while True:
        try:
            return child.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if stop.asked and not asked:
                child.terminate()
                asked = True
