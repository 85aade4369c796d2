"""Progress: lines in a log, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from launch import progress as module
from launch.progress import Progress


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_log_has_a_line_now_and_then_and_one_at_the_end(clock: _Clock) -> None:
    out = io.StringIO()
    with Progress("extract code", 1000, unit="tok", stream=out) as progress:
        for _ in range(4):
            clock.now += 4
            progress.add(100, "2 MB written")
        assert out.getvalue() == "extract code: 300/1,000 tok, 25 tok/s, 28 s left, 2 MB written\n"
        clock.now += 4
        progress.add(600)
        progress.add(0, "5 MB written")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[-1] == "extract code: 1,000/1,000 tok, 50 tok/s, 0 s left, 5 MB written"


def test_a_note_stays_until_the_next(clock: _Clock) -> None:
    out = io.StringIO()
    with Progress("extract code", 7_200_000, unit="tok", stream=out) as progress:
        progress.add(1, "2 MB written")
        clock.now += 10
        progress.add(9_999)
    assert out.getvalue().endswith(
        "extract code: 10,000/7,200,000 tok, 1,000 tok/s, 2 h 00 min left, 2 MB written\n"
    )


def test_earlier_work_is_not_part_of_the_rate(clock: _Clock) -> None:
    out = io.StringIO()
    with Progress("align", 1000, unit="tok", done=900, stream=out) as progress:
        clock.now += 10
        progress.add(100)
        assert progress.rate == 10
    assert "1,000/1,000" in out.getvalue()


def test_nothing_done_says_nothing(clock: _Clock) -> None:
    out = io.StringIO()
    with Progress("align", 10, unit="tok", done=10, stream=out) as progress:
        assert progress.rate == 0
    assert out.getvalue() == ""


def test_no_time_passed(clock: _Clock) -> None:
    out = io.StringIO()
    with Progress("quick", 2, unit="shard", stream=out) as progress:
        progress.add(2)
    assert out.getvalue() == "quick: 2/2 shard\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_bar() -> None:
    out = _Terminal()
    with Progress("train", 10, unit="step", done=2, stream=out) as progress:
        progress.add(6, "loss 2.5")
        progress.add(2)
    assert "train: 100%" in out.getvalue()
    assert "loss 2.5" in out.getvalue().splitlines()[-1].split("\r")[-1]


def test_error_inside_still_closes(clock: _Clock) -> None:
    out = io.StringIO()

    def work() -> None:
        with Progress("x", 10, unit="tok", stream=out) as progress:
            clock.now += 1
            progress.add(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert out.getvalue() == "x: 3/10 tok, 3 tok/s, 2 s left\n"
