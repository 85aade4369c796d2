"""One JSON line per run of a stage, in <run>/logs/<stage>.jsonl: seconds, memory, figures."""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path
from typing import Any

from launch.json_lines import append_line, read_lines
from store_schema.config import RunConfig
from store_schema.errors import StorageError

logger = logging.getLogger(__name__)


def logs_folder(run: RunConfig) -> Path:
    """Folder of the logs: in the run's folder if it is local, else in runs/<name>."""
    return Path(f"runs/{run.name}" if "://" in run.folder else run.folder) / "logs"


def pair_folders(run: RunConfig) -> dict[str, Path]:
    """Folder of each pair of a pairwise training (`train.pairwise`), by the source that is paired with
    the pivot; {} without pairwise training."""
    pairwise = getattr(run.sections.get("train"), "pairwise", None)
    if pairwise is None:
        return {}
    folder = logs_folder(run).parent
    remote = "://" in run.folder
    return {
        name: folder.parent / f"{run.name}-{name}" if remote else folder / "pairs" / name
        for name in run.sources
        if name != pairwise.pivot
    }


def peak_rss_bytes() -> int:
    """Largest resident size of this process or of any child it waited for."""
    kib = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return kib * 1024


def append_summary(run: RunConfig, stage: str, seconds: float, figures: dict[str, Any]) -> None:
    """Append one line.

    Raises:
        StorageError: A file cannot be written.
    """
    line = {
        "stage": stage,
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    } | figures
    path = logs_folder(run) / f"{stage}.jsonl"
    try:
        append_line(path, line)
    except OSError as error:
        raise StorageError("log cannot be written", where=path, got=error.strerror) from error


def read_summaries(run: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """All lines by stage, oldest first. Incomplete lines are left out with a warning."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(logs_folder(run).glob("*.jsonl")):
        by_stage[path.stem], cut = read_lines(path)
        for number in cut:
            logger.warning("%s, line %d is cut, left out", path, number)
    return by_stage
