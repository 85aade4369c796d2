"""Scores sources through vLLM, each in a fork of one process: `python -m tests.vllm_families`.

vLLM takes ten seconds to import and leaves its mark on the process that an engine was opened in, so it
is imported once, and each source is scored in a fork. Reads run files from standard input, one a line;
answers each with one JSON line: {"config": path, "code": exit code, "said": standard error}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.forked_python import VLLM_LIBRARIES

SOURCE = "f"
"""The source's name in every run file."""


def main() -> None:
    """Score what is asked for until standard input ends."""
    for name in ("extract.run", *VLLM_LIBRARIES):  # what every fork shares
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        config = line.strip()
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "said"
            child = os.fork()
            if child == 0:
                _score(config, said)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            answer = {"config": config, "code": code, "said": said.read_text(errors="replace")}
        print(json.dumps(answer), flush=True)


def _score(config: str, said: Path) -> None:
    from extract.cli import extract

    with said.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        extract(["run-source", config, "--source", SOURCE], standalone_mode=True)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
