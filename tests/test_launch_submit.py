"""`submit` without a cluster: which jobs a run needs, and what sbatch is told."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

import logitfuse
from fuse_train.publish.done import DONE_FILE
from fuse_train.run import final_folder
from launch.pending import Pending
from launch.slurm.jobs import Request, needed_jobs, unaligned
from launch.slurm.script import ArrayLimits, ArrayPart, Job, Place, script_text
from launch.stages import STAGES, Stage, stages_from
from launch.work import Worker, parse_worker
from store_schema.config import load_run
from store_schema.errors import LogitfuseError, MissingError
from tests import command, planned_store
from tests.fake_slurm import calls, fake_tools
from tests.test_launch_slurm import directives_of

submit = partial(command.call, "submit")
accepted = partial(command.ok, "submit")
refused = partial(command.refused, "submit")


REPOSITORY = Path(__file__).resolve().parent.parent

# ---- which jobs --------------------------------------------------------------------------------------


def request(
    stage: Stage = "extract",
    sources: Sequence[str] = ("a", "b"),
    only: bool = False,
    limits: ArrayLimits | None = None,
    **workers: int,
) -> Request:
    return Request(
        stages_from(stage, only=only),
        tuple(sources),
        {each: {} for each in STAGES},
        workers,  # type: ignore[arg-type]
        limits or ArrayLimits(),
    )


def pending(
    extract: Mapping[str, Sequence[int]], align: Mapping[str, Sequence[int]], train: bool = True
) -> Pending:
    return Pending(extract, align, train)


ALL = pending({"a": range(4), "b": range(4)}, {"a": range(4), "b": range(4)})


def after(jobs: Sequence[Job]) -> dict[str, tuple[str, ...]]:
    return {job.stem: job.after for job in jobs}


def test_each_pair_of_a_pairwise_training_is_a_job_and_the_last_one_merges() -> None:
    done = {"a": (), "b": (), "pivot": ()}
    sources = ["a", "b", "pivot"]
    left = replace(ALL, extract=done, align=done, pairs=("a", "b"))
    jobs = needed_jobs(request("train", sources), left)
    assert after(jobs) == {"train-a": (), "train-b": (), "train": ("train-a", "train-b")}
    assert [job.source for job in jobs] == ["a", "b", None]
    one = needed_jobs(request("train", sources), replace(left, pairs=("b",)))
    assert after(one) == {"train": ()}
    place = Place("mine", Path("scripts"), Path("."), ("python",))
    assert "-m logitfuse train run scripts/run.yaml --pair a &" in script_text(jobs[0], place)
    assert "--pair" not in script_text(jobs[2], place)


def test_a_source_is_aligned_when_extracted_and_all_are_trained_on() -> None:
    jobs = needed_jobs(request(extract=3, align=2), ALL)
    assert after(jobs) == {
        "extract-a": (),
        "align-a": ("extract-a",),
        "extract-b": (),
        "align-b": ("extract-b",),
        "train": ("align-a", "align-b"),
    }
    assert [job.workers for job in jobs] == [3, 2, 3, 2, 1]
    assert [job.part and job.part.tasks for job in jobs] == [
        (0, 1, 2),
        (0, 1),
        (0, 1, 2),
        (0, 1),
        None,
    ]


def test_what_is_committed_is_left_out() -> None:
    left = pending({"a": [], "b": [4, 7]}, {"a": [1], "b": range(9)})
    jobs = needed_jobs(request(extract=3), left)
    assert after(jobs) == {
        "align-a": (),
        "extract-b": (),
        "align-b": ("extract-b",),
        "train": ("align-a", "align-b"),
    }
    (extract_b,) = [job for job in jobs if job.stem == "extract-b"]
    assert extract_b.part == ArrayPart(0, (1,))  # 4 % 3 and 7 % 3
    nothing = pending({"a": [], "b": []}, {"a": [], "b": []})
    assert after(needed_jobs(request(), nothing)) == {"train": ()}
    assert needed_jobs(request(), Pending(nothing.extract, nothing.align, False)) == []


def test_split_arrays_are_waited_for_whole() -> None:
    jobs = needed_jobs(request(sources=["a"], limits=ArrayLimits(2, 2), extract=3), ALL)
    assert after(jobs)["align-a"] == ("extract-a.1", "extract-a.2")
    first, second = jobs[:2]
    assert (first.part, second.part) == (ArrayPart(0, (0, 1)), ArrayPart(2, (0,)))


def test_stages_from_the_one_asked_for() -> None:
    extracted = pending({"a": [], "b": []}, ALL.align)
    assert list(after(needed_jobs(request("align"), extracted))) == ["align-a", "align-b", "train"]
    assert list(after(needed_jobs(request("align", only=True), extracted))) == [
        "align-a",
        "align-b",
    ]
    assert list(after(needed_jobs(request(only=True), ALL))) == ["extract-a", "extract-b"]
    aligned = pending({"a": [], "b": []}, {"a": [], "b": []})
    assert list(after(needed_jobs(request("train"), aligned))) == ["train"]


def test_training_waits_for_sources_that_are_not_asked_for() -> None:
    one = request(sources=["a"])
    assert list(after(needed_jobs(one, ALL))) == ["extract-a", "align-a"]
    assert unaligned(one, ALL) == ["b"]
    other_done = pending({"a": [0], "b": []}, {"a": [0], "b": []})
    assert list(after(needed_jobs(one, other_done))) == ["extract-a", "align-a", "train"]


def test_stages_whose_input_is_missing_are_refused() -> None:
    with pytest.raises(MissingError, match=r"not extracted in a.*4 shards.*submit extract"):
        needed_jobs(request("align"), ALL)
    # What is aligned needs no extraction: its source store may be gone.
    aligned = pending({"a": range(4), "b": []}, {"a": [], "b": [2]})
    assert list(after(needed_jobs(request("align"), aligned))) == ["align-b", "train"]
    with pytest.raises(MissingError, match=r"not aligned in a, b.*submit extract"):
        needed_jobs(request("train"), ALL)


# ---- the command, with programs that answer like Slurm's ---------------------------------------------

NEXT_ID = 'n=$(cat {0}/n 2>/dev/null || echo 100); echo $((n + 1)) > {0}/n; echo "$n;cluster"'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands on PATH; what they are told is in `calls`."""
    folder = tmp_path / "slurm"
    fake_tools(
        folder,
        sbatch=NEXT_ID.format(folder),
        scontrol='echo "MaxArraySize            = 2"; echo "SchedulerParameters     = a,b=1"',
        squeue=f"cat {folder}/queue 2>/dev/null; true",
        scancel="",
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def submissions(slurm: Path) -> list[list[str]]:
    return [shlex.split(line) for line in calls(slurm) if line.startswith("sbatch ")]


def scripts_of(run_file: Path) -> Path:
    (folder,) = (run_file.parent / "run/logs/slurm").glob("2*")
    return folder


def test_submit_chains_the_stages(tmp_path: Path, slurm: Path) -> None:
    run_file = planned_store.make_run(tmp_path, leave_out=[1, 2])
    out = accepted(
        "extract", "--config", run_file, "--slurm", "partition=gpu,gpus=1", "--workers", 3
    )
    folder = scripts_of(run_file)
    assert [words[-1] for words in submissions(slurm)] == [
        str(folder / f"{stem}.sh")
        for stem in ("extract-s.1", "extract-s.2", "align-s.1", "align-s.2", "train")
    ]
    waits = [[w for w in words if w.startswith("--dep")] for words in submissions(slurm)]
    assert waits == [
        [],
        [],
        ["--dependency=afterok:100:101"],
        ["--dependency=afterok:100:101"],
        ["--dependency=afterok:102:103"],
    ]
    assert all(
        ("--kill-on-invalid-dep=yes" in w) == ("--dep" in str(w)) for w in submissions(slurm)
    )
    assert "1-2 of 3" not in out
    assert re.search(r"^101 +extract-s\.2 +- +2 of 3$", out, re.MULTILINE)
    for words in submissions(slurm):
        # sbatch's variables in the environment stand over a script, options over both
        assert set(directives_of(Path(words[-1]).read_text())) <= set(words)
    lines = [json.loads(t) for t in (folder.parent / "submitted.jsonl").read_text().splitlines()]
    assert [line["job_id"] for line in lines] == ["100", "101", "102", "103", "104"]
    assert [line["tasks"] for line in lines] == [[1], [2], [0, 1], [2], None]
    assert lines[-1]["after"] == ["102", "103"]
    assert load_run(folder / "run.yaml") == load_run(run_file)


def test_jobs_read_the_run_file_as_it_was_submitted(tmp_path: Path, slurm: Path) -> None:
    run_file = planned_store.make_run(tmp_path)
    accepted("align", run_file, "--set", "train.lr=0.25", "--set", "launch.workers.align=2")
    folder = scripts_of(run_file)
    assert load_run(folder / "run.yaml").sections["train"].lr == 0.25  # type: ignore[attr-defined]
    text = (folder / "align-s.sh").read_text()
    assert f"-m logitfuse align run {folder}/run.yaml --source s --worker" in text
    assert f"{sys.executable} -m" in text
    assert f"cd {Path.cwd()} ||" in text


def test_what_sbatch_says_is_told_and_nothing_stays_queued(tmp_path: Path, slurm: Path) -> None:
    run_file = planned_store.make_run(tmp_path, kinds=())
    (slurm / "sbatch").write_text(
        f'#!/bin/bash\n[[ "$*" == *align* ]] || {{ {NEXT_ID.format(slurm)}; exit 0; }}\n'
        'echo "sbatch: error: invalid partition specified: gqu" >&2\n'
        'echo "sbatch: error: Batch job submission failed: Invalid partition name" >&2\nexit 1\n'
    )
    line = refused("extract", run_file, "--workers", "3")
    assert "got invalid partition specified: gqu; Batch job submission failed" in line
    assert "align-s.1.sh" in line
    assert "nothing was left in the queue" in line
    assert calls(slurm)[-1] == "scancel 100 101"
    (slurm / "scancel").write_text("#!/bin/bash\nexit 1\n")
    assert "cancel what was submitted before: scancel 102 103" in refused(
        "extract", run_file, "--workers", "3"
    )


def test_earlier_jobs_must_end_first(tmp_path: Path, slurm: Path) -> None:
    run_file = planned_store.make_run(tmp_path, kinds=())
    accepted("extract", run_file, "--only")
    folder = scripts_of(run_file)
    queue = slurm / "queue"
    queue.write_text(f"100 {folder}/extract-s.1.sh\n7 /elsewhere/extract-s.sh\n9 (null)\n")
    line = refused("extract", run_file)
    assert "got extract-s.1 (job 100);" in line
    assert "--force" in line
    number = len(submissions(slurm))
    accepted("extract", run_file, "--force", "--only")
    assert len(submissions(slurm)) > number
    queue.write_text(f"100 {folder}/align-s.sh\n")
    accepted("extract", run_file, "--only")  # other work


def test_print_needs_no_slurm_and_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = planned_store.make_run(tmp_path, kinds=())
    monkeypatch.setenv("PATH", str(tmp_path))
    out = accepted("extract", run_file, "--slurm", "align:cpus-per-task=8", "--dry-run")
    folder = scripts_of(run_file)
    scripts = sorted(path.name for path in folder.glob("*.sh"))
    assert scripts == ["align-s.sh", "extract-s.sh", "train.sh"]
    for name in scripts:
        assert (folder / name).read_text() in out
    assert f"### sbatch {folder}/extract-s.sh\n" in out
    wait = "--dependency=afterok:<extract-s> --kill-on-invalid-dep=yes"
    assert f"### sbatch {wait} {folder}/align-s.sh\n" in out
    assert out.count("--cpus-per-task=8") == 1
    assert not (folder.parent / "submitted.jsonl").exists()
    line = refused("extract", run_file)
    assert "no Slurm here" in line
    assert "--dry-run" in line


def test_a_finished_run_submits_nothing(tmp_path: Path, slurm: Path) -> None:
    run_file = planned_store.make_run(tmp_path, kinds=("source", "aligned"))
    assert "train" in accepted("extract", run_file)
    run = load_run(run_file)
    for label in ("fused", "control"):
        folder = tmp_path / "run" / final_folder(run, label).relative_to(run.folder)
        folder.mkdir(parents=True)
        before = len(submissions(slurm))
        assert "train" in accepted("train", run_file)
        assert len(submissions(slurm)) == before + 1
        (folder / DONE_FILE).write_text("{}")
    before = len(submissions(slurm))
    for stage in STAGES:
        assert accepted(stage, run_file) == "nothing to do, nothing submitted\n"
    assert len(submissions(slurm)) == before


def test_bad_requests_are_one_line(tmp_path: Path, slurm: Path) -> None:
    run_file = planned_store.make_run(tmp_path, kinds=())
    assert "no such source" in refused("extract", run_file, "--source", "gone")
    assert "--slurm array=3" in refused("extract", run_file, "--slurm", "array=3")
    assert "--workers" in refused("extract", run_file, "--workers", "none")
    assert "not extracted" in refused("align", run_file)
    (slurm / "scontrol").write_text('#!/bin/bash\necho "MaxArraySize = 0"\n')
    assert "no job arrays" in refused("extract", run_file)
    (tmp_path / "run/plan/plan.json").unlink()
    (slurm / "scontrol").write_text('#!/bin/bash\necho "MaxArraySize = 10"\n')
    assert "no plan" in refused("extract", run_file)
    assert submissions(slurm) == []
    assert not (tmp_path / "run/logs").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--gpus-per-worker", "1.5", "1.5 is neither a whole number nor a part of one"),
        ("--gpus-per-worker", "nan", "nan is neither 0 nor a number from 0.0001"),
        ("--cpus-per-worker", "0.00001", "0.00001 is neither 0"),
        ("--node-timeout", "inf", "inf is neither 0"),
        ("--gpus-per-worker", "-1", "-1.0 is not in the range"),
    ],
)
def test_amounts_that_ray_does_not_take_are_refused_before_it_is_asked(
    tmp_path: Path, option: str, value: str, words: str
) -> None:
    run_file = planned_store.make_run(tmp_path, kinds=())
    assert words in refused("extract", run_file, "--ray", "nowhere:1", option, value)


def test_a_training_on_two_nodes(tmp_path: Path, slurm: Path) -> None:
    run_file = planned_store.make_run(tmp_path, kinds=("source", "aligned"))
    options = ("--slurm", "train:nodes=2,gpus-per-node=4")
    accepted("train", run_file, *options)
    text = (scripts_of(run_file) / "train.sh").read_text()
    assert "--nnodes=2 --nproc-per-node=4" in text
    accepted("train", run_file, "--force", "--set", "launch.processes_per_node.train=3")
    newest = max(path.parent for path in (tmp_path / "run/logs/slurm").glob("2*/train.sh"))
    assert "--nnodes=1 --nproc-per-node=3" in (newest / "train.sh").read_text()


def test_more_processes_than_segments_of_a_step_are_refused(tmp_path: Path, slurm: Path) -> None:
    run_file = planned_store.make_run(tmp_path, kinds=("source", "aligned"))
    options = ("--set", "train.batch_segments=7", "--slurm", "train:nodes=2,gpus-per-node=4")
    line = refused("train", run_file, *options)
    assert "more processes than segments in a step in train.batch_segments" in line
    assert "at least 8 (2 nodes of 4 processes), got 7" in line
    assert "conflict" in refused("train", run_file, "--slurm", "train:nodes=2,gpus=8")
    assert submissions(slurm) == []
    assert not (tmp_path / "run/logs/slurm").exists()


def test_a_store_of_another_plan_is_refused(tmp_path: Path, slurm: Path) -> None:
    plan = planned_store.make_plan(tmp_path / "run/plan")
    others = {s.index: s.model_copy(update={"fingerprint": "d" * 32}) for s in plan.shards}
    run_file = planned_store.make_run(tmp_path, records={0: others[0]})
    assert "shard 0 was written from other segments" in refused("extract", run_file)
    assert submissions(slurm) == []


# ---- other schedulers --------------------------------------------------------------------------------


def test_the_indexed_job_calls_our_command_with_as_many_workers_as_it_has() -> None:
    manifest = yaml.safe_load((REPOSITORY / "examples/kubernetes/extract-job.yaml").read_text())
    spec = manifest["spec"]
    assert (manifest["kind"], spec["completionMode"]) == ("Job", "Indexed")
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy needs
    assert pod["terminationGracePeriodSeconds"] >= 60
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"]}
    assert rules["Ignore"]["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert rules["FailJob"]["onExitCodes"]["values"] == [LogitfuseError.exit_code]
    assert rules["FailJob"]["onExitCodes"]["containerName"] == container["name"]
    program, *words = container["command"] + container["args"]
    assert program == "logitfuse"
    worker = words[words.index("--worker") + 1].replace("$(JOB_COMPLETION_INDEX)", "15")
    assert parse_worker(worker, {}) == Worker(15, spec["completions"])
    group, name, *options = words
    command = logitfuse.main.get_command(None, group).get_command(None, name)  # type: ignore
    context = command.make_context(name, options)
    assert context.params["names"] == ("coder",)
