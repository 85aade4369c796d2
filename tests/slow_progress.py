"""Workers that are as slow as a file says, so that they can be ended in the middle of a shard."""

from __future__ import annotations

from pathlib import Path

_HOOK = """\
import os, time
from pathlib import Path
from launch.progress import Progress

plain = Progress.add

def add(self, units, note=""):
    slow = Path(os.environ["SLOW_FILE"])
    seconds = slow.read_text()
    slow.with_name(f"{{slow.name}}-{{os.getpid()}}").write_text(seconds)
    time.sleep(float(seconds) * {factor})
    plain(self, units, note)

Progress.add = add
"""


def slow_hook(folder: Path, seconds: float, *, per_unit: bool = False) -> tuple[Path, Path]:
    """A folder for a worker's PYTHONPATH, and the file that its SLOW_FILE must name.

    Each report of progress, or each unit that it reports, then takes as many seconds as the file says
    at the moment. Beside the file, SECONDS-PID holds what a process last read there.
    """
    hook = folder / "hook"
    hook.mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(_HOOK.format(factor="units" if per_unit else "1"))
    slow = folder / "seconds"
    slow.write_text(str(seconds))
    return hook, slow
