"""`make mutants`: do the tests notice when a line of what must be right is wrong?

    python -m benchmarks.mutants                           # one of each module
    python -m benchmarks.mutants --count 20 --seed 1       # others, and more
    python -m benchmarks.mutants --only align/chain,fuse_train/losses

Modules of `mutants.yaml` are changed in one place each (`benchmarks/mutations.py`), in a copy of the
tree, and their tests are run on it; the first failure ends them. A mutant is *killed* if a test fails,
*timed out*, which counts as killed, if its tests need several times their CPU seconds, and *survived*
otherwise; survivors are shown. Tests run in forks of a process with the libraries loaded, and without
caches: no bytecode is written, Numba's machine code is named by a digest of all sources
(`store_schema.compiled`), and hypothesis is seeded and remembers nothing.

What was found is kept in a file: mutants killed before are not run again, survivors are.

The last line is one JSON object; `mutants_killed` is the share without the mutants that `mutants.yaml`
says no test can kill, `mutants_killed_of_all` the share with them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.environments import UnavailableError
from benchmarks.mutations import Mutant, sample
from tests.forked_python import THEIRS, forked_python

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path(__file__).with_name("mutants.yaml")
KEPT = ROOT / "runs" / "mutants.jsonl"

NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", "runs", "build", "dist", "__pycache__", "*.egg-info", ".hypothesis"),
    ".*_cache",
)
LIBRARIES = (*THEIRS, "torch", "pytest", "hypothesis.strategies", "hypothesis.extra.numpy")
CALM = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0",
    "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
OPTIONS = (
    *("-x", "-q", "--tb=no", "--no-header", "-o", "addopts=", "-p", "no:cacheprovider"),
    *("-p", "no:xdist", "-m", "not vllm and not gpu and not slurm", "--hypothesis-seed=0"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # libraries are loaded before
)
AS_COMPILED = (
    *("-W", "ignore:overflow encountered in scalar:RuntimeWarning"),
    *("-W", "ignore:divide by zero encountered in:RuntimeWarning"),
    *("-W", "ignore:invalid value encountered in scalar:RuntimeWarning"),
)
"""For compiled functions that run as plain Python: compiled ones say nothing of such numbers."""
TIMES, AND_S = 4, 20
"""Limit of a mutant's tests, in CPU seconds: so many times what they need without it, and some more."""
CLOCK = 30
"""Limit by the clock, in CPU seconds' limits: for tests that wait for ever."""
MOST_S = 1800
"""CPU seconds that tests may need without a mutant."""

_TESTS = """\
import resource, sys, time
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1]) + 5))
import pytest
from hypothesis import Phase, settings
class Quick:
    @staticmethod
    def pytest_configure():
        phases = (Phase.explicit, Phase.generate)  # a failure is enough, it need not be small
        settings.register_profile("mutants", settings(), phases=phases, database=None)
        settings.load_profile("mutants")
code = pytest.main(sys.argv[2:], plugins=[Quick])
print(f"\\n{time.process_time():.3f}")
sys.exit(code)
"""


@dataclass(frozen=True, slots=True)
class Subject:
    """A module that is mutated.

    Args:
        path: In the repository.
        tests: Files in tests/ that must kill its mutants.
        interpreted: Whether compiled functions run as plain Python.
    """

    path: str
    tests: tuple[str, ...]
    interpreted: bool


@dataclass(frozen=True, slots=True)
class Equivalent:
    """A line of a module as it is and as no test can tell it from; white space does not count."""

    module: str
    line: str
    becomes: str

    def is_it(self, mutant: Mutant, code: str) -> bool:
        """Whether a mutant is it.

        Args:
            mutant: Any.
            code: Its module without it.
        """
        changed = [_bare(line[1:]) for line in changes(mutant, code) if line[0] in "-+"]
        return mutant.module == self.module and changed == [_bare(self.line), _bare(self.becomes)]


def _bare(line: str) -> str:
    return re.sub(r"\s+", "", line)


def read_config(path: Path = CONFIG) -> tuple[list[Subject], list[Equivalent]]:
    """What is mutated, and what no test can kill."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    subjects = [
        Subject(module, tuple(tests), group["interpreted"])
        for group in config["groups"]
        for module, tests in group["modules"].items()
    ]
    names = ("module", "line", "becomes")
    return subjects, [Equivalent(*(e[n] for n in names)) for e in config["equivalent"]]


def changes(mutant: Mutant, code: str) -> list[str]:
    """The lines that a mutant has changed, "-" before them as they are and "+" as it has them."""
    lines = difflib.unified_diff(code.splitlines(), mutant.code.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


@contextmanager
def copied(root: Path = ROOT) -> Iterator[Path]:
    """A copy of the tree, without what git does not know."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(root, Path(folder) / "tree", ignore=NOT_COPIED))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True, slots=True)
class Bench:
    """A copy of the tree, and the Python that its tests run in."""

    tree: Path
    python: Path
    interpreted: bool = False

    def run(self, tests: Sequence[str], limit_s: int) -> tuple[str, float, str]:
        """Run tests on the copy as it is.

        Args:
            tests: Files or names of tests, in tests/.
            limit_s: CPU seconds.

        Returns:
            "survived", "killed" or "timed out", CPU seconds, and what pytest said.
        """
        words = [str(self.python), "-c", _TESTS, str(limit_s), *OPTIONS]
        words += [*(AS_COMPILED if self.interpreted else ()), *(f"tests/{t}" for t in tests)]
        process = subprocess.Popen(
            words, cwd=self.tree, env=os.environ | {"PYTHONPATH": str(self.tree)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=CLOCK * limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "timed out", float(limit_s), ""
        if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "timed out", float(limit_s), said
        seconds = re.search(r"^(\d+\.\d+)\s*\Z", said, re.MULTILINE)
        outcome = "killed" if process.returncode else "survived"
        return outcome, float(seconds[1]) if seconds else 0.0, said

    def baseline(self, tests: Sequence[str]) -> float:
        """CPU seconds of tests on the tree without a mutant.

        Raises:
            RuntimeError: They fail.
        """
        outcome, seconds, said = self.run(tests, MOST_S)
        if outcome != "survived":
            raise RuntimeError(f"{' '.join(tests)}: {outcome} without a mutant\n{said[-3000:]}")
        return seconds

    def meet(self, mutant: Mutant, tests: Sequence[str], limit_s: int) -> str:
        """What becomes of a mutant; the copy is as it was afterwards."""
        path = self.tree / mutant.module
        code = path.read_text(encoding="utf-8")
        path.write_text(mutant.code, encoding="utf-8")
        try:
            return self.run(tests, limit_s)[0]
        finally:
            path.write_text(code, encoding="utf-8")


@contextmanager
def bench(interpreted: bool, root: Path = ROOT) -> Iterator[Bench]:
    """A copy of the tree that can be mutated.

    Args:
        interpreted: Whether compiled functions run as plain Python.
        root: The tree.
    """
    environment = CALM | ({"NUMBA_DISABLE_JIT": "1"} if interpreted else {})
    with copied(root) as tree, tempfile.TemporaryDirectory() as folder, _environment(**environment):
        with forked_python(Path(folder), LIBRARIES, tree) as python:
            yield Bench(tree, python, interpreted)


class Kept:
    """Outcomes in a file of JSON Lines, by digest of module and change."""

    def __init__(self, path: Path) -> None:
        self.path = path  # need not exist
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.outcomes = {row["digest"]: row["outcome"] for row in map(json.loads, lines)}

    @staticmethod
    def digest(mutant: Mutant) -> str:
        """Name of a mutant."""
        return hashlib.sha256(f"{mutant.module}\0{mutant.code}".encode()).hexdigest()[:24]

    def killed(self, mutant: Mutant) -> str | None:
        """How a mutant was killed, if it was."""
        outcome = self.outcomes.get(self.digest(mutant))
        return None if outcome == "survived" else outcome

    def add(self, mutant: Mutant, outcome: str) -> None:
        """Keep an outcome."""
        row = {"digest": self.digest(mutant), "module": mutant.module, "line": mutant.line}
        row |= {"operator": mutant.operator, "outcome": outcome}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def measure(
    subjects: Sequence[Subject],
    equivalent: Sequence[Equivalent] = (),
    *,
    count: int,
    seed: int,
    kept: Kept,
) -> dict[str, Any]:
    """Make mutants of modules, run their tests and say what became of them.

    Args:
        subjects: The modules.
        equivalent: Mutants that no test can kill.
        count: Mutants of each module.
        seed: Of the sample.
        kept: Outcomes of earlier runs.
    """
    codes = {s.path: (ROOT / s.path).read_text(encoding="utf-8") for s in subjects}
    mutants: defaultdict[str, list[Mutant]] = defaultdict(list)
    for mutant in sample(codes, count, seed):
        mutants[mutant.module].append(mutant)
    found: dict[str, Counter[str]] = {}
    for interpreted in (True, False):
        group = [s for s in subjects if s.interpreted == interpreted]
        limits: dict[tuple[str, ...], int] = {}
        with ExitStack() as stack:
            to_run = any(kept.killed(m) is None for s in group for m in mutants[s.path])
            here = stack.enter_context(bench(interpreted)) if to_run else None
            for s in group:
                found[s.path] = _of_module(
                    here, s, mutants[s.path], codes[s.path], equivalent, kept, limits
                )
    return figures({s.path: found[s.path] for s in subjects})


def _of_module(
    here: Bench | None,
    subject: Subject,
    mutants: Sequence[Mutant],
    code: str,
    equivalent: Sequence[Equivalent],
    kept: Kept,
    limits: dict[tuple[str, ...], int],
) -> Counter[str]:
    """How many mutants have each outcome; `limits` of tests are measured where they lack."""
    outcomes: Counter[str] = Counter()
    for mutant in mutants:
        outcome, start = kept.killed(mutant), time.monotonic()
        if outcome is None:
            assert here is not None
            if subject.tests not in limits:
                limits[subject.tests] = round(TIMES * here.baseline(subject.tests) + AND_S)
            outcome = here.meet(mutant, subject.tests, limits[subject.tests])
            kept.add(mutant, outcome)
        if any(e.is_it(mutant, code) for e in equivalent):
            outcome = "equivalent" if outcome == "survived" else f"{outcome}, not equivalent"
        outcomes[outcome] += 1
        seconds = f"{time.monotonic() - start:.0f} s"
        print(f"{outcome}: {mutant.module}:{mutant.line} {mutant.operator}, {seconds}", flush=True)
        if outcome in ("survived", "equivalent"):
            print("\n".join(f"    {line}" for line in changes(mutant, code)), flush=True)
    return outcomes


def figures(found: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Shares of all modules together.

    Args:
        found: By module, how many mutants had each outcome.
    """
    total: Counter[str] = Counter()
    for outcomes in found.values():
        total += outcomes
    alive, dead = total["survived"], total.total() - total["survived"] - total["equivalent"]
    return {
        "mutants": total.total(),
        "mutants_killed": dead / (dead + alive) if dead + alive else None,
        "mutants_killed_of_all": dead / total.total() if total else None,
        "mutants_survived": alive,
        "mutants_equivalent": total["equivalent"],
        "notes_that_are_wrong": sum(n for name, n in total.items() if "not equivalent" in name),
        "modules": {module: dict(outcomes) for module, outcomes in found.items()},
    }


COLUMNS = ("killed", "timed out", "survived", "equivalent")


def table(found: Mapping[str, Any]) -> str:
    """The figures of `measure`, for people."""
    rows = [f"{'module':<42}{'mutants':>9}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for module, outcomes in found["modules"].items():
        cells = "".join(f"{outcomes.get(name, 0):>12}" for name in COLUMNS)
        rows.append(f"{module:<42}{sum(outcomes.values()):>9}{cells}")
    share = found["mutants_killed"]
    rows.append("" if share is None else f"{share:.1%} of those that can be are killed")
    return "\n".join(rows)


def chosen(only: str | None) -> list[Subject]:
    """Modules of mutants.yaml whose paths begin with one of some, by commas; all for None."""
    subjects, _ = read_config()
    starts = tuple(only.split(",")) if only else ("",)
    return [s for s in subjects if s.path.startswith(starts)]


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="A module.")
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
@click.option("--only", help="Modules whose paths begin so, by commas.")
@click.option("--kept", type=click.Path(path_type=Path), default=KEPT, help="File of outcomes.")
def main(count: int, seed: int, only: str | None, kept: Path) -> None:
    """Print a table, and one JSON object as the last line."""
    subjects = chosen(only)
    if not subjects:
        raise click.ClickException(f"no module of {CONFIG.name} begins with {only}")
    try:
        found = measure(subjects, read_config()[1], count=count, seed=seed, kept=Kept(kept))
    except UnavailableError as error:
        raise click.ClickException(f"no cosmic-ray here: {error}") from error
    print(table(found))
    print(json.dumps(found))
    if found["notes_that_are_wrong"]:
        raise click.ClickException(f"a mutant that {CONFIG.name} calls equivalent was killed")


if __name__ == "__main__":
    main()
