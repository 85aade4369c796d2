"""The text of Slurm batch scripts, and job arrays for workers. Pure functions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.slurm.processes import Processes, training_processes
from launch.stages import Stage
from launch.work import range_text, shard_ranges
from store_schema.errors import ConfigError, StoppedMidway


@dataclass(frozen=True, slots=True)
class ArrayLimits:
    """A cluster's limits of job arrays; the defaults are Slurm's.

    Args:
        size: MaxArraySize: task ids are below it.
        tasks: Most tasks of one array.
    """

    size: int = 1001
    tasks: int = 1001


@dataclass(frozen=True, slots=True)
class ArrayPart:
    """One job array: task t is worker t + offset."""

    offset: int
    tasks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One call of sbatch.

    Args:
        stage: Stage that it runs, or a study.
        source: Source to extract or align, or whose pair to train; None for all of training. Of a
            study: its part, which names the script.
        options: sbatch's options, values by long name.
        workers: Number of workers of the source, of which the array's tasks are some.
        part: The array; None for training, which is one job.
        number: Number, from 1, of the part of an array that had to be split; 0 if it was not.
        after: Stems of the jobs that must succeed before this one starts.
        processes_per_node: Processes of a training on each node, where there are no GPUs.
        words: Further words of its command.
    """

    stage: Stage | Literal["study"]
    source: str | None
    options: Mapping[str, str]
    workers: int = 1
    part: ArrayPart | None = None
    number: int = 0
    after: tuple[str, ...] = ()
    processes_per_node: int | None = None
    words: tuple[str, ...] = ()

    @property
    def processes(self) -> Processes:
        """Of its command: a worker is one, training has one for each GPU.

        Raises:
            ConfigError: Options that contradict each other.
        """
        if self.stage != "train":
            return Processes()
        return training_processes(self.options, self.processes_per_node)

    @property
    def stem(self) -> str:
        """Name of its files without extension; a source's name has no dot."""
        number = f".{self.number}" if self.number else ""
        return "-".join(filter(None, (self.stage, self.source))) + number


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how the jobs of one submission run.

    Args:
        run_name: Name of the run.
        folder: Folder of the scripts, their output and the run file as it was submitted.
        directory: Working directory, which relative paths of the run file refer to.
        python: Words that start Python.
        setup: Lines of shell before the command.
        max_requeues: A job that was restarted this many times does not requeue itself.
        file_name: Of the run file or study file as it was submitted.
    """

    run_name: str
    folder: Path
    directory: Path
    python: Sequence[str]
    setup: Sequence[str] = ()
    max_requeues: int = 50
    file_name: str = "run.yaml"

    @property
    def run_file(self) -> Path:
        """The run file as it was submitted, every default filled in; of a study, the study file."""
        return self.folder / self.file_name

    def script(self, job: Job) -> Path:
        """The script of a job."""
        return self.folder / f"{job.stem}.sh"


def array_parts(workers: Iterable[int], limits: ArrayLimits) -> list[ArrayPart]:
    """Arrays whose tasks are exactly `workers`, each within the cluster's limits."""
    parts: list[ArrayPart] = []
    for worker in sorted(workers):
        offset = worker - worker % limits.size
        task = worker - offset
        if parts and parts[-1].offset == offset and len(parts[-1].tasks) < limits.tasks:
            parts[-1] = ArrayPart(offset, (*parts[-1].tasks, task))
        else:
            parts.append(ArrayPart(offset, (task,)))
    return parts


def directives(job: Job, place: Place) -> list[str]:
    """Options of sbatch for one job, as words of a command line."""
    options = {"job-name": f"{place.run_name}-{job.stem}"}
    if job.part is not None:
        options["array"] = range_text(shard_ranges(job.part.tasks))
    if job.processes.count > 1:
        options |= {"nodes": "1", "ntasks-per-node": "1"}
    options |= job.options
    number = "%j" if job.part is None else "%A_%a"
    options |= {
        "output": f"{_pattern(place.folder)}/{job.stem}-{number}.log",
        "open-mode": "append",
        "requeue": "",
    }
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]


def sbatch_command(job: Job, place: Place, after: Sequence[str]) -> list[str]:
    """The call that submits a job.

    It repeats the script's options, because SBATCH_ variables of the environment override a script.

    Args:
        job: The job.
        place: Where its script is.
        after: Ids of the jobs that must succeed before.
    """
    words = ["sbatch", "--parsable", *directives(job, place), *dependency_options(after)]
    return [*words, str(place.script(job))]


def dependency_options(after: Sequence[str]) -> list[str]:
    """Options of a job that starts when others have succeeded, and never when one has not."""
    if not after:
        return []
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]


def script_text(job: Job, place: Place) -> str:
    """The batch script of a job."""
    header = [f"#SBATCH {_quoted(word)}" for word in directives(job, place)]
    lines = [
        "#!/bin/bash",
        *header,
        "# Written by `logitfuse submit`. May be edited and given to sbatch again.",
        "",
        f"cd {shlex.quote(str(place.directory))} || exit 1",
        "export PYTHONSAFEPATH=1  # a folder here may have the name of a package",
        *place.setup,
        "",
        *_start(job, place),
        _tail(job, place),
    ]
    return "\n".join(lines) + "\n"


_TOO_SHORT = {
    "extract": "shard: raise it (--slurm extract:time=...), or plan smaller shards",
    "align": "shard: raise it (--slurm align:time=...), or plan smaller shards",
    "train": "step: raise it (--slurm train:time=...)",
    "study": "step: raise it (--slurm time=...)",
}

_TAIL = """\
pid=$!

# Slurm tells this shell when the time limit is near (USR1) and when the job is to end (TERM). Pass
# it on, and wait until the command has really ended: what it has finished is kept.
warned=
trap 'warned=yes; kill -USR1 "$pid" 2>/dev/null' USR1
trap 'kill -{term} "$pid" 2>/dev/null' TERM
while wait "$pid"; kill -0 "$pid" 2>/dev/null; do :; done
wait "$pid"
code=$?

if [ "$warned" ] && [ "$code" -eq {resumable} ]; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
        echo "{stage}: the time limit is near, requeued to go on" >&2
        scontrol requeue "{task}"
    else
        echo "{stage}: started again {most} times or more, not requeued; submit again to go on" >&2
    fi
elif [ "$warned" ] && [ "$code" -gt 128 ]; then
    echo "{stage}: the time limit is too short for one {too_short}" >&2
fi
exit "$code\""""


def _tail(job: Job, place: Place) -> str:
    """The script's lines after the start of the command."""
    array = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    return _TAIL.format(
        stage=job.stage,
        # srun would kill its tasks on TERM; those that Slurm tells to end have TERM from Slurm.
        term="USR1" if job.processes.count > 1 else "TERM",
        resumable=StoppedMidway.exit_code,
        task="$SLURM_JOB_ID" if job.part is None else array,
        most=place.max_requeues,
        too_short=_TOO_SHORT[job.stage],
    )


_RENDEZVOUS = f"""\
if ! command -v srun > /dev/null; then
    echo "error: no srun on $HOSTNAME, which starts the processes of a training: \
install Slurm's client commands on the nodes, or train on one GPU" >&2
    exit {ConfigError.exit_code}
fi
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((10000 + SLURM_JOB_ID % 20000))  # jobs that meet on a node have different ones\
"""
"""Linux gives clients ports from 32768."""


def _start(job: Job, place: Place) -> list[str]:
    """The lines that start the command in the background."""
    if job.processes.count > 1:
        return _start_several(job, place)
    program = ["-m", "logitfuse", job.stage, "run"]
    given = (*place.python, *program, str(place.run_file), *job.words)
    words = [shlex.quote(word) for word in given]
    if job.part is None:
        return [f"{' '.join([*words, *_pair(job)])} &"]
    index = "$SLURM_ARRAY_TASK_ID"
    if job.part.offset:
        index = f"$((SLURM_ARRAY_TASK_ID + {job.part.offset}))"
    of_source = [] if job.stage == "study" else ["--source", str(job.source)]
    words += [*of_source, "--worker", f'"{index}/{job.workers}"']
    return [f"{' '.join(words)} &"]


def _start_several(job: Job, place: Place) -> list[str]:
    """The lines that start one torchrun on each node, and through it the processes."""
    count = job.processes
    srun = ["srun", f"--nodes={count.nodes}", "--ntasks-per-node=1"]
    if "cpus-per-task" in job.options:  # srun does not take it from the job
        srun.append(f"--cpus-per-task={shlex.quote(job.options['cpus-per-task'])}")
    # The processes of a node share its CPUs; a process that fails ends those of other nodes.
    srun += ["--cpu-bind=none", "--kill-on-bad-exit=1"]
    torchrun = [
        "-m fuse_train.machine.torchrun",
        f"--nnodes={count.nodes}",
        f"--nproc-per-node={count.per_node}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        '--rdzv-id="$SLURM_JOB_ID"',
        '--rdzv-endpoint="$host:$port"',
    ]
    python = [shlex.quote(word) for word in place.python]
    program = ["-m fuse_train run", shlex.quote(str(place.run_file)), *_pair(job)]
    lines = [" ".join(part) for part in (srun, [*python, torchrun[0]], torchrun[1:], program)]
    # Where the first node that fails leaves its exit code, which the others end with, too.
    stem = shlex.quote(f"{place.folder}/{job.stem}.exit-")
    leave = f'export LOGITFUSE_EXIT_FILE={stem}"$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"'
    return [_RENDEZVOUS, leave, " \\\n    ".join(lines) + " &"]


def _pair(job: Job) -> list[str]:
    """Options of a training of one pair."""
    if job.stage != "train" or job.source is None:
        return []
    return ["--pair", shlex.quote(job.source)]


def _pattern(folder: Path) -> str:
    """A folder in the syntax of sbatch's file name patterns.

    Raises:
        ConfigError: It has a character that sbatch would misread.
    """
    text = str(folder)
    if re.search(r'["\\\x00-\x1f]', text):
        raise ConfigError(
            "sbatch cannot be given this path",
            where="run_dir",
            expected="no quote, backslash or control character",
            got=repr(text),
        )
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """An option in the syntax of a script's #SBATCH line."""
    name, equals, value = word.partition("=")
    return f'{name}="{value}"' if equals and re.search(r"[\s'#]", value) else word
