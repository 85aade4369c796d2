"""A Python whose libraries are loaded already: each start of it is a fork of one process.

Importing torch and transformers takes five seconds, and tests start some two hundred processes. One
process a session imports them (`python -m tests.forked_python SOCKET`); a small program that takes
the place of `sys.executable` hands it arguments, environment, folder and descriptors, and it forks. The
fork runs what was asked for as the main program, in the process group of whoever asked. Signals are
passed on, the exit code or the signal of its death is passed back, and it dies with the program that
stands for it, so kills and stops work as with a process of its own. Environments that libraries read
when they are loaded are not shared: with others the program becomes a plain Python.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent

THEIRS = (
    *("torch.distributed.run", "accelerate", "accelerate.commands.launch", "numba", "zarr"),
    *("pyarrow.parquet", "transformers.generation", "numcodecs", "pcodec"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt_neox", "mistral")),
    "transformers.models.qwen2.modeling_qwen2",
)
"""Libraries of others: all that is loaded where what we find on the path differs by the test."""
LIBRARIES = (
    *("extract.cli", "extract.run", "extract.engines.transformers_engine", "extract.corpus.corpus"),
    *("align.run", "fuse_train.cli", "fuse_train.training", "logitfuse", *THEIRS),
)
"""What is loaded before the first fork."""
VLLM_LIBRARIES = (
    *("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"),
    *("vllm.model_executor.models.llama", "vllm.model_executor.models.transformers"),
)
"""Of an engine on a CPU: `import vllm` alone leaves half of the work to each fork."""
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Of the process that forks, as extraction's children have them."""
AT_LOADING = (
    "OMP_",
    "GOMP_",
    "MKL_",
    "HF_",
    "TRANSFORMERS_",
    "NUMBA_",
    "LD_PRELOAD",
    "PYTHON",
    "TOKENIZERS_",
)
"""Environment variables that are read when a library is loaded begin like this."""
FREE = (
    *("PYTHONPATH", "PYTHON_EXEC", "PYTHONSAFEPATH", "PYTHONUNBUFFERED"),
    "PYTHONBREAKPOINT",  # set by Ray
)
"""Those of them that a fork can still take up."""

_PROGRAM = """\
#!{python} -IS
import json, os, signal, socket, sys
def loading(environment):
    return {{k: v for k, v in environment.items() if k.startswith({at_loading}) and k not in {free}}}
environment = dict(os.environ)
if loading(environment) != {loading}:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
inherited = []
for name in os.listdir("/proc/self/fd"):
    try:
        if os.get_inheritable(int(name)):
            inherited.append(int(name))
    except OSError:
        pass
server = socket.socket(socket.AF_UNIX)
server.connect("{socket}")
asked = {{"words": sys.argv[1:], "environment": environment, "folder": os.getcwd(),
         "descriptors": inherited, "group": os.getpgrp(), "program": sys.argv[0]}}
content = json.dumps(asked).encode()
socket.send_fds(server, [len(content).to_bytes(8, "little")], inherited)
server.sendall(content)
answers = server.makefile("rb")
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
for descriptor in inherited:
    os.close(descriptor)
status = int(answers.readline() or signal.SIGKILL)
if os.WIFEXITED(status):
    os._exit(os.WEXITSTATUS(status))
if os.WTERMSIG(status) != signal.SIGKILL:
    signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
os.kill(os.getpid(), os.WTERMSIG(status))
"""
"""What takes the place of `sys.executable`."""


def _at_loading() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(AT_LOADING) and name not in FREE
    }


@contextmanager
def forked_python(
    folder: Path, libraries: Sequence[str] = LIBRARIES, root: Path = REPOSITORY
) -> Iterator[Path]:
    """Start the process that forks; it ends with the block.

    Args:
        folder: For the program and its socket.
        libraries: Modules to load before the first fork.
        root: The repository, or a copy of it, whose `tests` the forks have.

    Yields:
        The program that takes the place of `sys.executable`.
    """
    program, place = folder / "python", folder / "socket"
    text = _PROGRAM.format(
        python=sys.executable, at_loading=AT_LOADING, free=FREE, loading=_at_loading(), socket=place
    )
    program.write_text(text)
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen(64)  # whoever asks before the libraries are loaded waits
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_python", str(listener.fileno()), *libraries],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            cwd=root,
            env=os.environ | QUIET,
        )
    try:
        yield program
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()


# ---- the process that forks --------------------------------------------------------------------------


def _serve(listener: socket.socket) -> dict[str, Any]:
    """Fork whenever asked to; returns in each fork, with what it is to run, and never otherwise."""
    ended_read, ended_write = os.pipe()
    os.set_blocking(ended_write, False)
    os.set_blocking(ended_read, False)
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(ended_write)
    forks: dict[int, socket.socket] = {}
    while True:
        watched: list[Any] = [0, ended_read, listener, *forks.values()]
        ready, _, _ = select.select(watched, [], [])
        for pid, client in list(forks.items()):
            if client in ready:  # it never says more than it did: it has died
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                _pass_back(forks, pid, os.waitpid(pid, 0)[1])
        if ended_read in ready:
            os.read(ended_read, 4096)
        for pid in list(forks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _pass_back(forks, pid, status)
        if 0 in ready:  # nobody is there any more
            for pid in forks:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if listener in ready:
            client = listener.accept()[0]
            asked, descriptors = _asked(client)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, before)
                for each in (listener, client, *forks.values()):
                    each.detach()  # their numbers belong to others from here on
                _become(asked, descriptors)
                return asked
            client.sendall(f"{pid}\n".encode())
            for descriptor in descriptors:
                os.close(descriptor)
            forks[pid] = client


def _asked(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, descriptors, _, _ = socket.recv_fds(client, 8, 64)
    content = b""
    while len(content) < int.from_bytes(head, "little"):
        content += client.recv(1 << 16)
    return json.loads(content), list(descriptors)


def _pass_back(forks: dict[int, socket.socket], pid: int, status: int) -> None:
    with forks.pop(pid) as client, suppress(OSError):
        client.sendall(f"{status}\n".encode())


def _become(asked: dict[str, Any], descriptors: Sequence[int]) -> None:
    """In a fork: the descriptors, group, environment and folder of whoever asked."""
    with suppress(OSError):  # of another session
        os.setpgid(0, asked["group"])
    high = [os.dup2(descriptor, 500 + descriptor) for descriptor in descriptors]
    os.closerange(0, 500)
    for descriptor, number in zip(high, asked["descriptors"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    tempfile.tempdir = None  # found before, in another environment


def _run(words: list[str], program: str) -> None:
    """As Python itself would run its arguments."""
    sys.executable = program
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    safe = words[0] == "-P" or os.environ.get("PYTHONSAFEPATH")
    here = [] if safe else [os.getcwd()]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*here, *paths, *sys.path[1:]]
    hook = importlib.util.find_spec("sitecustomize")
    if hook is not None and str(Path(str(hook.origin)).parent) in paths:
        runpy.run_path(str(hook.origin))
    while words[0] in ("-P", "-u"):
        words = words[1:]
    kind, what = words[0], words[1]
    if kind == "-m":
        sys.argv = [what, *words[2:]]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


def main() -> None:
    """Load the libraries and serve; each fork runs and ends here."""
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    code: object = 0
    try:
        _run(asked["words"], asked["program"])
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # As Python ends, but for tearing down what the libraries hold.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
