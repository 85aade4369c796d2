"""`logitfuse submit`: finds pending work, asks Slurm for its limits, writes scripts, submits them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launch.config import NodeOptions
from launch.json_lines import append_line
from launch.slurm.script import ArrayLimits, Job, Place, sbatch_command, script_text
from launch.summary import logs_folder
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, StorageError

_DEADLINE_S = 300.0
"""Timeout of Slurm's commands, which themselves give up earlier."""
_PATIENCE_S = 10.0
"""Timeout if the answer is optional; without a cluster the commands would try for a minute."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that Slurm has accepted."""

    job: Job
    job_id: str


# ---- what the cluster reports ------------------------------------------------------------------------


def array_limits(*, needs_slurm: bool) -> ArrayLimits:
    """The cluster's limits of arrays.

    Args:
        needs_slurm: False takes Slurm's defaults if no cluster answers.

    Raises:
        ConfigError: No cluster answers, or it allows no arrays.
    """
    try:
        deadline_s = _DEADLINE_S if needs_slurm else _PATIENCE_S
        text = _slurm("scontrol", "show", "config", deadline_s=deadline_s)
    except ConfigError:
        if needs_slurm:
            raise
        return ArrayLimits()
    size = _number(r"^MaxArraySize\s*=\s*(\d+)", text) or 0
    if size == 0:
        raise ConfigError(
            "this cluster allows no job arrays", where="scontrol", got="MaxArraySize 0"
        )
    tasks = _number(r"^SchedulerParameters\s*=.*\bmax_array_tasks=(\d+)", text) or size
    return ArrayLimits(size, min(size, tasks))


def queued_scripts(folder: Path) -> dict[str, str]:
    """Queued and running jobs whose scripts are below a folder: stems of the scripts by job id.

    Raises:
        ConfigError: Slurm does not answer.
    """
    states = "PENDING,CONFIGURING,RUNNING,SUSPENDED"
    text = _slurm("squeue", "--noheader", f"--states={states}", "--format=%F %o")
    stems = {}
    for line in text.splitlines():
        job_id, _, command = line.strip().partition(" ")
        if folder in Path(command).parents:
            stems[job_id] = Path(command).stem
    return stems


def require_free(folder: Path, jobs: Sequence[Job]) -> None:
    """Refuse jobs whose work earlier jobs with scripts below `folder`, queued or running, will do.

    Raises:
        ConfigError: The message names the earlier jobs.
    """
    wanted = {(job.stage, job.source) for job in jobs}
    stems = {"-".join(filter(None, pair)) for pair in wanted}
    busy = [
        f"{stem} (job {job_id})"
        for job_id, stem in sorted(queued_scripts(folder).items())
        if stem.partition(".")[0] in stems
    ]
    if busy:
        raise ConfigError(
            "jobs of this run are still queued or running",
            where=folder,
            got=", ".join(busy),
            hint="wait for them, scancel them, or give --force: two workers on a shard waste work",
        )


def _number(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text, re.MULTILINE | re.IGNORECASE)
    return int(match[1]) if match else None


def _slurm(*words: str, deadline_s: float = _DEADLINE_S) -> str:
    """Output of one of Slurm's commands.

    Raises:
        ConfigError: It is not there, or failed; the message quotes its error.
    """
    program = words[0]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=deadline_s,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise ConfigError(
            "no Slurm here",
            where="PATH",
            expected=program,
            hint="submit where Slurm's commands are, or see the scripts with --dry-run",
        ) from error
    except subprocess.TimeoutExpired as error:
        waited = f"nothing in {deadline_s:.0f} s"
        raise ConfigError(f"{program} does not answer", got=waited) from error
    if done.returncode != 0:
        lines = [re.sub(r"^\w+: (error|fatal): ", "", line) for line in done.stderr.splitlines()]
        message = "; ".join(line.strip() for line in lines if line.strip())
        raise ConfigError(f"{program} refused", got=message or f"exit code {done.returncode}")
    return done.stdout


# ---- writing and submitting ------------------------------------------------------------------------


def scripts_folder(run: RunConfig) -> Path:
    """Folder of scripts, their output and the record of submissions."""
    return Path(os.path.abspath(logs_folder(run))) / "slurm"


def write_scripts(
    name: str,
    content: str,
    options: NodeOptions,
    folder: Path,
    jobs: Sequence[Job],
    file_name: str = "run.yaml",
) -> Place:
    """Write the scripts into a new folder below `folder`, with the file they will read.

    Args:
        name: Of the run or study, for the names of its jobs.
        content: Of the run file or study file, as it is now.
        options: What comes before a command.
        folder: Of all submissions.
        jobs: The jobs.
        file_name: What that file is called there.

    Raises:
        ConfigError: sbatch cannot be given the folder.
        StorageError: A file cannot be written.
    """
    try:
        place = Place(
            run_name=name,
            folder=_new_folder(folder),
            directory=Path.cwd(),
            python=options.python or (sys.executable,),
            setup=options.setup,
            max_requeues=options.max_requeues,
            file_name=file_name,
        )
        place.run_file.write_text(content, encoding="utf-8")
        for job in jobs:
            place.script(job).write_text(script_text(job, place), encoding="utf-8")
    except OSError as error:
        raise StorageError("scripts cannot be written", where=folder, got=error.strerror) from error
    return place


def _new_folder(parent: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in range(1, 1000):
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent}/{stamp}")


def submit_jobs(jobs: Sequence[Job], place: Place) -> list[Submitted]:
    """Submit all jobs, or none: if Slurm refuses one, those it accepted before are cancelled.

    Raises:
        ConfigError: sbatch refused; the message quotes its error.
    """
    ids: dict[str, str] = {}
    for job in jobs:
        after = [ids[stem] for stem in job.after]
        try:
            output = _slurm(*sbatch_command(job, place, after))
        except ConfigError as error:
            raise ConfigError(
                error.what,
                where=place.script(job),
                got=error.got,
                hint=_cancel(list(ids.values())),
            ) from error
        ids[job.stem] = output.strip().partition(";")[0]
        _record(job, ids[job.stem], after, place)
    return [Submitted(job, ids[job.stem]) for job in jobs]


def _cancel(ids: list[str]) -> str:
    if ids:
        try:
            _slurm("scancel", *ids)
        except ConfigError:
            return f"cancel what was submitted before: scancel {' '.join(ids)}"
    return "nothing was left in the queue"


def _record(job: Job, job_id: str, after: Sequence[str], place: Place) -> None:
    """Append one line to submitted.jsonl."""
    line = {
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "job_id": job_id,
        "stage": job.stage,
        "source": job.source,
        "workers": None if job.part is None else job.workers,
        "tasks": None if job.part is None else [job.part.offset + t for t in job.part.tasks],
        "after": list(after),
        "script": str(place.script(job)),
    }
    path = place.folder.parent / "submitted.jsonl"
    try:
        append_line(path, line)
    except OSError as error:
        raise StorageError("log cannot be written", where=path, got=error.strerror) from error
