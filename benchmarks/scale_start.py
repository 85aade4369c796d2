"""What starting takes: opening a large tokenizer, and every stage of a run that is finished.

    python -m benchmarks.scale_start                            # after `make demo` and `make real`
    python -m benchmarks.scale_start --run FILE --tokenizer MODEL

`tokenizer_open_ratio` is that of `benchmarks.real_tokenizers`. `noop_seconds_ratio` is, by stage, the
time of a process that finds nothing to do over one that does `import torch, transformers`: the shortest
of several, in turn. The stages are called once before, since the first call on a machine asks
transformers about the models' files and keeps what it said. The run is copied, so that its logs stay as
they are. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_tokenizers import tokenizer_open_ratio
from store_schema.config import ModelRef, load_run
from store_schema.errors import MissingError
from store_schema.model.models import is_gguf, resolve_tokenizer
from tests.published_tokenizers import tokenizer_folder

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_FILE = "examples/demo.yaml"
TOKENIZER = "runs/real/inputs/models/gemma.gguf"
"""Gemma 3, 262,144 ids, as `make real` gets it."""
PUBLISHED = "gemma3"
"""The same as Google published it, if `tests/published_tokenizers.py` has fetched it."""

STAGES = (
    *("corpus build", "extract plan", "extract run", "align run", "eval pool", "train run"),
    *("eval run", "report", "status"),
)
IMPORTS = "import torch, transformers"


def start_figures(
    run_file: str | Path = RUN_FILE,
    tokenizers: Iterable[str | Path] | None = None,
    *,
    repeats: int = 5,
) -> dict[str, Any]:
    """Time to start.

    Args:
        run_file: Of a finished run whose folder is below the working directory.
        tokenizers: Model folders or GGUF files; None takes Gemma 3's.
        repeats: How often each side is measured.

    Returns:
        `tokenizer_open_ratio` by tokenizer (`tokenizer_open`: its seconds); `noop_seconds_ratio` by
        stage; `noop_seconds` of the stages, of `IMPORTS`, `--help` and `--version`.

    Raises:
        MissingError: The run is not finished.
        ModelError: There is no such tokenizer.
    """
    if tokenizers is None:
        published = tokenizer_folder(PUBLISHED)
        tokenizers = [TOKENIZER] if published is None else [TOKENIZER, published]
    folders = {Path(model).stem: _tokenizer_folder(str(model)) for model in tokenizers}
    opened = tokenizer_open_ratio(folders, repeats=repeats)
    seconds = noop_seconds(Path(run_file), repeats=repeats)
    return {
        "tokenizer_open_ratio": {name: figure["ratio"] for name, figure in opened.items()},
        "tokenizer_open": opened,
        "noop_seconds_ratio": {
            stage: round(seconds[stage] / seconds[IMPORTS], 3) for stage in STAGES
        },
        "noop_seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _tokenizer_folder(model: str) -> Path:
    ref = ModelRef(model=model)
    if is_gguf(ref) and not Path(model).is_file():
        raise MissingError(
            "no such GGUF file",
            where=model,
            hint="`python examples/make_real.py --models-only` makes Gemma's",
        )
    return resolve_tokenizer(ref, name="tokenizer")


def noop_seconds(run_file: Path, *, repeats: int) -> dict[str, float]:
    """Wall seconds of the stages on a copy of a finished run, and of what they are compared with.

    Raises:
        MissingError: A stage has something to do.
    """
    run = load_run(str(run_file))
    if Path(run.folder).is_absolute() or not Path(run.folder).is_dir():
        raise MissingError(
            "no finished run below this folder", where=run.folder, hint="run `make demo` first"
        )
    logitfuse = ("-m", "logitfuse")
    commands: dict[str, tuple[str, ...]] = {IMPORTS: ("-c", IMPORTS)}
    commands |= {option: (*logitfuse, option) for option in ("--help", "--version")}
    commands |= {stage: (*logitfuse, *stage.split(), "run.yaml") for stage in STAGES}
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(run.folder, Path(place, run.folder), symlinks=True)
        shutil.copyfile(run_file, Path(place, "run.yaml"))
        for stage in STAGES:
            _, said = _timed(commands[stage], place)
            if stage != "status" and "nothing to do" not in said:
                raise MissingError(
                    "the run is not finished", where=f"{run_file}, {stage}", got=said.strip()[-200:]
                )
        rounds = [
            {name: _timed(words, place)[0] for name, words in commands.items()}
            for _ in range(repeats)
        ]
    return {name: min(seconds[name] for seconds in rounds) for name in commands}


def _timed(words: Sequence[str], folder: str) -> tuple[float, str]:
    """Seconds of a Python process, and what it wrote to standard output and standard error."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryFile() as written:
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            check=False,
        )
        seconds = time.monotonic() - begin
        written.seek(0)
        said = written.read().decode(errors="replace")
    if done.returncode:
        raise MissingError(
            "the command failed", where=" ".join(words), got=" ".join(said.split())[-300:]
        )
    return seconds, said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", default=RUN_FILE, metavar="FILE", help="run file of a finished run"
    )
    parser.add_argument(
        "--tokenizer", action="append", metavar="MODEL", help="model folder or GGUF file"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    figures = start_figures(options.run, options.tokenizer, repeats=options.repeats)
    for name, opened in figures["tokenizer_open"].items():
        print(
            f"{name:<28} {opened['num_ids']:>8,} ids {opened['seconds']:6.2f} s  "
            f"transformers {opened['theirs']:6.2f} s  ratio {opened['ratio']:.2f}"
        )
    for name, seconds in figures["noop_seconds"].items():
        ratio = figures["noop_seconds_ratio"].get(name)
        print(f"{name:<28} {seconds:6.2f} s" + ("" if ratio is None else f"  ratio {ratio:.2f}"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
