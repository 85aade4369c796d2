"""Stopping: asked by a signal, answered where it is safe, exit code 143."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.signals import STOP_SIGNALS, StopFlag, stop_on_signals, stop_when_closed
from store_schema.errors import Stopped, StoppedMidway

REPOSITORY = Path(__file__).resolve().parent.parent

STAGE = """
import sys, time
import click
from launch.command import StageGroup
from launch.signals import stop_on_signals
from store_schema.errors import ModelError

@click.group(cls=StageGroup)
def main(): pass

@main.command()
def starts():
    print("ready", flush=True)
    try:
        time.sleep(60)
    except Exception as error:  # as where a library loads a model: a stop is no damage of the file
        raise ModelError("model cannot be loaded") from error

@main.command()
def work():
    with stop_on_signals() as stop:
        print("ready", flush=True)
        for step in range(600):
            time.sleep(0.05 if sys.argv[2] == "hears" else 30)
            stop.check()

command = "starts" if sys.argv[1] == "starts" else "work"
sys.argv = [sys.argv[0], command, sys.argv[1]]
main(args=[command])
"""


def _start(how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, how],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_a_stage_starts_ends_in_one_line_too(number: signal.Signals) -> None:
    process = _start("starts")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors == f"error: stopped by {number.name}; rerun the same command to go on\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_one_signal_ends_in_one_line_and_143(number: signal.Signals) -> None:
    process = _start("hears")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors == (
        f"error: stopped by {number.name}, what is finished is kept; "
        "rerun the same command to go on\n"
    )


def test_second_interrupt_ends_at_once_repeated_terms_do_not() -> None:
    process = _start("is deaf")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


def test_flag() -> None:
    flag = StopFlag()
    flag.check()
    assert not flag.asked
    flag.ask(signal.SIGUSR1)
    flag.ask(signal.SIGTERM)  # the first is the reason
    assert flag.asked
    with pytest.raises(Stopped, match="SIGUSR1") as caught:
        flag.check()
    assert caught.value.exit_code == 143


def test_a_stop_after_something_was_finished_says_run_again() -> None:
    flag = StopFlag()
    flag.progressed = True
    flag.check()
    flag.ask(signal.SIGUSR1)
    with pytest.raises(StoppedMidway, match="rerun the same command") as caught:
        flag.check()
    assert caught.value.exit_code == 75


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_on_signals() as flag:
        signal.raise_signal(signal.SIGTERM)
        assert flag.asked
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_other_threads_get_a_flag_without_handlers() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen = []

    def work() -> None:
        with stop_on_signals() as flag:
            seen.append((flag.asked, [signal.getsignal(number) for number in STOP_SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_pipe_that_is_closed_asks_to_stop() -> None:
    flag, (read_fd, write_fd) = StopFlag(), os.pipe()
    stop_when_closed(flag, read_fd)
    time.sleep(0.05)
    assert not flag.asked
    os.close(write_fd)
    deadline = time.monotonic() + 30
    while not flag.asked:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(Stopped, match="SIGTERM"):
        flag.check()
