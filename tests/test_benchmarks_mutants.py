"""What `make mutants` makes and runs: a mutant that must die does, whatever was compiled before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.environments import UnavailableError
from benchmarks.mutants import ROOT, Bench, Equivalent, Kept, Subject
from benchmarks.mutations import Mutant, sample

ROWS = "align/chain/rows.py"
PLANTED = """\
import numpy as np
from align.chain.rows import non_label_scale

def test_what_the_label_leaves_is_tail():
    ids, offsets, entries = np.array([0]), np.array([0, 2]), np.array([0, 1])
    scales, tails = non_label_scale(ids, offsets, entries, np.array([0.5, 0.2]), np.array([0.5]))
    assert scales.tolist() == [1.0]
    assert abs(tails[0] - 0.3) < 1e-9
"""
CODE = """\
from dataclasses import dataclass
@dataclass(frozen=True)
class Place:
    at: int | None
def after(place: int | str, *, step: float = 1.5) -> int | None:
    return place + 2 if place < 3 else None
"""


@pytest.fixture(scope="module")
def here() -> Iterator[Bench]:
    with mutants.bench(interpreted=False) as found:
        (found.tree / "tests" / "test_planted.py").write_text(PLANTED)
        yield found


def changed(module: str, before: str, after: str) -> Mutant:
    """A mutant made by hand."""
    code = (ROOT / module).read_text()
    assert code.count(before) == 1
    return Mutant(module, "by hand", 1, code.replace(before, after))


@pytest.mark.slow
def test_compiled_code_is_that_of_the_mutant(here: Bench) -> None:
    """The machine code of the original lies in the copy's cache when the mutant comes."""
    tests = ("test_planted.py",)
    assert 0 < here.baseline(tests) < 60
    compiled = here.tree / "align" / "__pycache__"
    assert list(compiled.rglob("*.nbc"))
    assert not list(here.tree.rglob("*.pyc"))
    wrong = changed(ROWS, "total += probabilities[k]", "total -= probabilities[k]")
    assert here.meet(wrong, tests, 60) == "killed"
    # Nothing of the mutant is left, and its tests can tell what makes no difference.
    same = changed(ROWS, "total += probabilities[k]", "total += 1.0 * probabilities[k]")
    assert here.meet(same, tests, 60) == "survived"
    assert (here.tree / ROWS).read_text() == (ROOT / ROWS).read_text()
    never = changed(ROWS, "import math\n", "import math\nwhile True:\n    pass\n")
    assert here.meet(never, tests, 5) == "timed out"
    here_only = here.tree / "tests" / "test_red.py"
    here_only.write_text("def test_red():\n    assert False\n")
    with pytest.raises(RuntimeError, match=r"test_red\.py: killed without a mutant"):
        here.baseline(("test_red.py",))


def made(codes: dict[str, str], count: int, seed: int) -> list[Mutant]:
    """Mutants of cosmic-ray; skips the test where it cannot be had."""
    try:
        return sample(codes, count, seed)
    except UnavailableError as error:
        if os.environ.get("LOGITFUSE_REQUIRE_MUTANTS"):
            raise
        pytest.skip(f"no cosmic-ray: {error}")


def test_each_site_is_changed_once_and_types_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITFUSE_CACHE")  # the environment is made once
    every = made({"a.py": CODE}, 99, 0)
    lines = [mutants.changes(m, CODE) for m in every]
    # The default, `+`, 2, the condition, `<` and 3.
    assert [m.line for m in every] == [5, *[6] * 5]
    assert all(len(change) == 2 for change in lines)
    assert all("int | None" in change[1] for change in lines if "def " in change[1])
    few = made({"a.py": CODE, "b.py": CODE}, 2, 1)
    assert [m.module for m in few] == ["a.py", "a.py", "b.py", "b.py"]
    assert few == made({"a.py": CODE}, 2, 1) + made({"b.py": CODE}, 2, 1)
    assert all(m.code != CODE and compile(m.code, m.module, "exec") for m in every)


def mutant(line: str) -> Mutant:
    return Mutant("a.py", "NumberReplacer", 6, CODE.replace("place + 2", line))


class FakeBench:
    """Of each mutant, what is said of its text."""

    def __init__(self, outcomes: dict[str, str]) -> None:
        self.outcomes, self.met = outcomes, 0

    def baseline(self, tests: tuple[str, ...]) -> float:
        return 1.0

    def meet(self, mutant: Mutant, tests: tuple[str, ...], limit_s: int) -> str:
        assert limit_s == mutants.TIMES + mutants.AND_S
        self.met += 1
        return next(o for text, o in self.outcomes.items() if text in mutant.code)


def test_survivors_are_run_again_and_notes_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = Subject("a.py", ("test_a.py",), False)
    every = [mutant(line) for line in ("place + 1", "place + 3", "place + 2 + 0", "place - 2")]
    is_now = "return place + 2 if place < 3 else None"
    becomes = is_now.replace("+ 2", "+  2 + 0")
    notes = [Equivalent("a.py", is_now, becomes)]
    said = {"+ 1 if": "killed", "+ 3 if": "survived", "+ 0 if": "survived", "- 2 if": "timed out"}

    def outcomes(here: FakeBench) -> dict[str, int]:
        kept = Kept(tmp_path / "runs" / "kept.jsonl")
        return dict(mutants._of_module(here, subject, every, CODE, notes, kept, {}))

    first = FakeBench(said)
    assert outcomes(first) == {"killed": 1, "survived": 1, "equivalent": 1, "timed out": 1}
    shown = capsys.readouterr().out
    assert "+    return place + 3 if place < 3 else None" in shown
    assert "place + 1" not in shown
    # A new test kills both that had survived; one of them was said to be as good as the original.
    second = FakeBench(dict.fromkeys(said, "killed"))
    last = outcomes(second)
    assert second.met == 2
    assert last == {"killed": 2, "killed, not equivalent": 1, "timed out": 1}
    found = mutants.figures({"a.py": mutants.Counter(last)})
    assert found["notes_that_are_wrong"] == 1


def test_shares() -> None:
    counted = {
        "a.py": mutants.Counter({"killed": 5, "survived": 1}),
        "b.py": mutants.Counter({"timed out": 1, "equivalent": 3}),
    }
    found = mutants.figures(counted)
    assert found["mutants"] == 10
    assert found["mutants_killed"] == pytest.approx(6 / 7)
    assert found["mutants_killed_of_all"] == pytest.approx(0.6)
    assert "85.7% of those that can be are killed" in mutants.table(found)
    assert mutants.figures({})["mutants_killed"] is None


def test_configured_modules_and_tests_exist() -> None:
    subjects, equivalent = mutants.read_config()
    assert len({s.path for s in subjects}) == len(subjects) > 20
    for subject in subjects:
        assert (ROOT / subject.path).is_file(), subject.path
        assert all((ROOT / "tests" / name.split("::")[0]).is_file() for name in subject.tests)
    for note in equivalent:
        lines = [line.strip() for line in (ROOT / note.module).read_text().splitlines()]
        assert note.line.strip() in lines, note
        assert note.becomes != note.line
    assert {s.path.split("/")[1] for s in mutants.chosen("fuse_train/losses,align/chain")} == {
        "losses",
        "chain",
    }
