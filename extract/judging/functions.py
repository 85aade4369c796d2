"""A function that judges, in a process of its own: what it does to itself is counted, not suffered."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from extract.judge_kinds.kind import Score
from store_schema.errors import ConfigError

CHILD = Path(__file__).with_name("function_child.py")
START_S = 120.0
"""That loading a function's module may take."""

TIME, CRASHED = "time", "crashed"
_FAILURES = {"memory": "memory", "none": "no score"}


class FunctionProcess:
    """The process of one function; begun again after it had to be ended."""

    def __init__(self, options: Any) -> None:
        """Start it.

        Args:
            options: Of judge python (extract/judge_kinds/python.py).

        Raises:
            ConfigError: The function cannot be loaded.
        """
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self.digest = self._start()
        """SHA-256 of the function's file; None where it has none."""

    def score(self, asked: dict[str, Any]) -> Score:
        """What the function says of an answer.

        Args:
            asked: What it is called with.

        Returns:
            Its number, or why there is none: too much time or memory, an error, a crash.
        """
        if self._process is None:
            self._start()
        process, to_it, _ = self._pipes()
        try:
            to_it.write(json.dumps(asked).encode() + b"\n")
            to_it.flush()
        except OSError:
            line: bytes | None = None
        else:
            line = self._line(self._options.seconds)
        if line is None:
            late = process.poll() is None
            self.close()
            return Score(None, TIME if late else CRASHED)
        answer = json.loads(line)
        if "score" in answer:
            return Score(answer["score"])
        if answer["failed"] == "raised":
            return Score(None, f"raised {answer['said'].partition(':')[0]}")
        return Score(None, _FAILURES[answer["failed"]])

    def close(self) -> None:
        """End the process and those that it began."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        # Before it is waited for: until then nobody else can have its number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> str | None:
        options = self._options
        words = [sys.executable, "-P", str(CHILD), options.function]
        words += [str(options.memory_mib << 20), str(options.seconds)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {"PYTHONHASHSEED": "0"},
        )  # fmt: skip
        line = self._line(START_S)
        said: dict[str, Any] = {"ready": False, "said": "its process ended, or hangs"}
        if line is not None:
            said = json.loads(line)
        if not said["ready"]:
            self.close()
            raise ConfigError(
                f"function of judge {options.title} cannot be loaded",
                where="judge.judges",
                expected="module:function, the module installed or in this folder, or file.py:function",
                got=f"{options.function}: {said['said']}",
            )
        digest: str | None = said["digest"]
        return digest

    def _pipes(self) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
        """The process that runs, what it reads and what it writes."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise TypeError("no process was started with pipes")
        return process, process.stdin, process.stdout

    def _line(self, seconds: float) -> bytes | None:
        """A line that the process writes; None where it does not come in time or at all."""
        process, _, from_it = self._pipes()
        until = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([from_it], [], [], left)[0]:
                return None
            data = os.read(from_it.fileno(), 1 << 16)
            if not data:
                with suppress(subprocess.TimeoutExpired):  # it lets go of its output when it ends
                    process.wait(1.0)
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
