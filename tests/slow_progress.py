"""Workers that are as slow as a file says, so that they can be ended in the middle of a shard."""

from __future__ import annotations

from pathlib import Path

_HOOK = """\
import os, time
from pathlib import Path
from launch.progress import Progress

plain = Progress.add

def add(self, *arguments, **options):
    time.sleep(float(Path(os.environ["SLOW_FILE"]).read_text()))
    plain(self, *arguments, **options)

Progress.add = add
"""


def slow_hook(folder: Path, seconds: float) -> tuple[Path, Path]:
    """A folder for a worker's PYTHONPATH, and the file that its SLOW_FILE must name.

    Each report of progress then takes as many seconds as the file says at the moment.
    """
    hook = folder / "hook"
    hook.mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(_HOOK)
    slow = folder / "seconds"
    slow.write_text(str(seconds))
    return hook, slow
