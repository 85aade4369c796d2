"""Folders of cases, each with a `run.sh` that prints `FAULT: ...` for each thing that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("logitfuse")


def without_fault(cases: Path) -> dict[str, bool]:
    """Whether each case's script ends well and without a fault; what it printed goes to standard error
    where it does not.

    Args:
        cases: Holds a folder for each case.
    """
    found = {}
    for script in sorted(cases.glob("*/run.sh")):
        done = subprocess.run(
            ["bash", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"LOGITFUSE": str(COMMAND)},
        )
        found[script.parent.name] = done.returncode == 0 and "FAULT" not in done.stdout
        if not found[script.parent.name]:
            print(done.stdout, file=sys.stderr)
    return found
