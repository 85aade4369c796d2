"""A process that has imported what every source needs, and forks a child for each.

torch and transformers take five seconds to import, more than a small model takes to score a small
corpus. The server imports them once and computes nothing: no device is touched, and no thread runs but
those of numpy's and pyarrow's allocators and products, which expect to be forked. So a child begins at
once. It speaks with the process that started it through a socket: a
message has the child's arguments and the file descriptor that tells it to stop; the answer is its exit
code, negative for a signal.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import TracebackType
from typing import Self

from launch.process import child_environment
from launch.signals import STOP_SIGNALS
from store_schema.config import section_models

AVAILABLE = sys.platform == "linux"
"""Elsewhere libraries do not bear a fork, or there is none."""
_IMPORTED = (
    "extract.run",
    "extract.engines.transformers_engine",
    "transformers.models.llama.modeling_llama",
)
STDERR = 2
_CODE = struct.Struct("!i")
_MOST_BYTES = 1 << 16


class ForkServer:
    """The side that asks for children; the server starts with the first one and ends with `with`."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()

    def start(self, arguments: Sequence[str], stop_read_fd: int) -> ForkedChild:
        """Fork a child that runs `python -m extract` with arguments.

        Args:
            arguments: Its words; "{fd}" among them is replaced by the number that the file descriptor
                has there.
            stop_read_fd: Passed on to it.
        """
        if self._socket is None or self._process is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                words = [sys.executable, "-P", "-m", "extract.scoring.fork_server"]
                self._process = subprocess.Popen(
                    [*words, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdout=STDERR,
                    env=child_environment(),
                )
        # A server that could not start is told by the answer that does not come.
        with suppress(BrokenPipeError):
            socket.send_fds(self._socket, [json.dumps(list(arguments)).encode()], [stop_read_fd])
        return ForkedChild(self._socket, self._process)


class ForkedChild:
    """One child, as `subprocess.Popen` would have it."""

    def __init__(self, ours: socket.socket, server: subprocess.Popen[bytes]) -> None:
        self._socket, self._server = ours, server

    def wait(self, timeout: float) -> int:
        """Exit code of the child, or of the server if that ended before.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        if not select.select([self._socket], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("python -m extract", timeout)
        try:
            answer = self._socket.recv(_CODE.size)
        except ConnectionResetError:
            answer = b""
        code: int = _CODE.unpack(answer)[0] if answer else self._server.wait()
        return code


def serve(ours: socket.socket) -> list[str]:
    """Fork a child for each message; returns in each child, with its arguments.

    Raises:
        SystemExit: In the server, when the other side has closed the socket.
    """
    for name in _IMPORTED:
        import_module(name)
    section_models()
    # A stop is for the children, and through their pipes: Ctrl-C reaches all processes of a terminal.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    while True:
        message, fds, _, _ = socket.recv_fds(ours, _MOST_BYTES, 1)
        if not message:
            raise SystemExit(0)
        pid = os.fork()
        if pid == 0:
            ours.close()
            for number, handler in before.items():
                signal.signal(number, handler)
            os.set_inheritable(fds[0], True)
            return [word.replace("{fd}", str(fds[0])) for word in json.loads(message)]
        os.close(fds[0])
        _, status = os.waitpid(pid, 0)
        try:
            ours.send(_CODE.pack(os.waitstatus_to_exitcode(status)))
        except BrokenPipeError:
            raise SystemExit(0) from None


def main() -> None:
    """The server, and then each child."""
    from extract.cli import extract

    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        extract(arguments, prog_name="python -m extract")
    except SystemExit as end:
        # Taking torch and transformers apart, as an interpreter does at its end, takes over a second.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    main()
