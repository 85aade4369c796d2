"""Run the function of judge python in another process, so that its errors and crashes are only
counted."""

from __future__ import annotations

import json
import logging
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

logger = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("function_child.py")
START_S = 120.0
"""Seconds that loading the function's module may take."""

TIME, CRASHED = "time", "crashed"
_FAILURES = {"memory": "memory", "none": "no score"}


class FunctionProcess:
    """The process of one function; started again after it had to be ended."""

    def __init__(self, options: Any) -> None:
        """Start the process.

        Args:
            options: Options of judge python (extract/judge_kinds/python.py).

        Raises:
            ConfigError: The function cannot be loaded.
        """
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._warned = False
        """Whether an error of the function was shown: the first one is, the others are counted."""
        self.digest = self._start()
        """SHA-256 of the function's file; None where it has none."""

    def score(self, arguments: dict[str, Any]) -> Score:
        """The function's score of an answer.

        Args:
            arguments: The dict that it is called with.

        Returns:
            Its score, or the reason for none: too much time or memory, an error, a crash.
        """
        if self._process is None:
            self._start()
        process, to_it, _ = self._pipes()
        try:
            to_it.write(json.dumps(arguments).encode() + b"\n")
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
            if not self._warned:
                self._warned = True
                where = f"{arguments['id']}, {arguments['source']}"
                error = " ".join(answer["error"].split())
                logger.warning("judge %s, %s: %s", self._options.title, where, error)
            return Score(None, f"raised {answer['error'].partition(':')[0]}")
        return Score(None, _FAILURES[answer["failed"]])

    def close(self) -> None:
        """End the process and those that it started."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        # Before `wait`, since until then no other process can have its id.
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
        reply: dict[str, Any] = {"ready": False, "error": "its process ended, or hangs"}
        if line is not None:
            reply = json.loads(line)
        if not reply["ready"]:
            self.close()
            raise ConfigError(
                f"function of judge {options.title} cannot be loaded",
                where="judge.judges",
                expected="module:function, the module installed or in this folder, or file.py:function",
                got=f"{options.function}: {reply['error']}",
            )
        digest: str | None = reply["digest"]
        return digest

    def _pipes(self) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
        """The running process, its standard input and its standard output."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise TypeError("no process was started with pipes")
        return process, process.stdin, process.stdout

    def _line(self, seconds: float) -> bytes | None:
        """The next line of the process; None if it does not come in time, or the process ended."""
        process, _, from_it = self._pipes()
        until = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([from_it], [], [], left)[0]:
                return None
            data = os.read(from_it.fileno(), 1 << 16)
            if not data:
                with suppress(subprocess.TimeoutExpired):  # its output is closed when it ends
                    process.wait(1.0)
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
