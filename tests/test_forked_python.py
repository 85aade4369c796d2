"""The Python of the tests whose libraries are loaded: what it runs cannot tell it from a plain one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

LOADED = "import sys; print('torch' in sys.modules)"


def run(
    program: Path, *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *words], capture_output=True, text=True, cwd=cwd, env=os.environ | environment,
        timeout=60, check=False,
    )  # fmt: skip


def test_words_folder_environment_and_descriptors_are_those_that_were_asked_for(
    forked_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "told.py").write_text(
        "import os, sys\nprint(__name__, sys.argv[1:], os.getcwd(), "
        "os.environ['TOLD'], sys.executable)\n"
        "print(os.getpgrp(), file=sys.stderr)\n"
    )
    done = run(forked_python, "-m", "told", "a", "-P", cwd=tmp_path, TOLD="yes")
    expected = ["__main__", "['a',", "'-P']", str(tmp_path), "yes", str(forked_python)]
    assert done.stdout.split() == expected
    assert int(done.stderr) == os.getpgrp()
    read, write = os.pipe()
    with os.fdopen(read) as told:
        words = [forked_python, "-c", "import os, sys; os.write(int(sys.argv[1]), b'x')"]
        subprocess.run([*words, str(write)], pass_fds=[write], check=True, timeout=60)
        os.close(write)
        assert told.read() == "x"  # and nobody holds it any more


def test_how_it_ended_is_passed_back(forked_python: Path) -> None:
    assert run(forked_python, "-c", "raise SystemExit(75)").returncode == 75
    assert run(forked_python, "-c", "raise SystemExit()").returncode == 0
    spoken = run(forked_python, "-c", "raise SystemExit('no')")
    assert (spoken.returncode, spoken.stderr) == (1, "no\n")
    failed = run(forked_python, "-c", "1 / 0")
    assert failed.returncode == 1
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    killed = run(forked_python, "-c", "import os; os.kill(os.getpid(), 9)")
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1])
def test_signals_reach_it(forked_python: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time\n"
        "def told(number, frame):\n    print(number, flush=True)\n    sys.exit(number)\n"
        "for number in (2, 10, 15):\n    signal.signal(number, told)\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    words = [forked_python, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        rest = process.stdout.read()  # ends when the fork has ended
    if number == signal.SIGKILL:
        assert (rest, process.returncode) == ("", -number)
    else:
        assert (rest, process.returncode) == (f"{number:d}\n", number)


def test_what_libraries_read_when_they_are_loaded_is_no_others(forked_python: Path) -> None:
    assert run(forked_python, "-c", LOADED).stdout == "True\n"
    assert run(forked_python, "-c", LOADED, OMP_NUM_THREADS="7").stdout == "False\n"


def test_a_hook_on_the_path_is_run(forked_python: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('hook')\n")
    done = run(forked_python, "-c", "print('main')", PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ["hook", "main"]
