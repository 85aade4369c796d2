"""Programs that stand where Slurm's are, and write down what they are told."""

from __future__ import annotations

import shlex
from pathlib import Path


def fake_tools(folder: Path, **programs: str) -> Path:
    """Programs that append their arguments to `calls` and then run a line of shell."""
    folder.mkdir()
    for name, body in programs.items():
        program = folder / name
        log = shlex.quote(str(folder / "calls"))
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> {log}\n{body}\n')
        program.chmod(0o755)
    return folder


def calls(tools: Path) -> list[str]:
    log = tools / "calls"
    return log.read_text().splitlines() if log.exists() else []
