"""Checks of a run file: its models, its data, its folders or buckets, its scheduler, its disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from extract.config import CorpusSection, ExtractSection
from extract.corpus.inputs import input_files
from extract.engines.memory import free_host_bytes
from extract.estimate.costs import at_most_bytes, likely_bytes
from extract.estimate.models import ModelFacts, look_at_model
from first_run.doctor.check import Check, error, ok, outcomes, refusal, warning
from first_run.doctor.machine import LEAST_DISK, existing
from fuse_train.config import TrainSection
from fuse_train.stages_config import check_stages
from launch.config import LaunchSection
from launch.quantities import size_text
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.dtypes import DTYPES
from store_schema.errors import LogitfuseError
from store_schema.model.lfs_pointer import is_pointer
from store_schema.model.models import local_copy
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import plan_location
from store_schema.presets import StoreSection

_NODE_LOCAL = ("/tmp", "/dev/shm", "/var/tmp")
_SLURM = ("sbatch", "squeue", "scontrol", "srun", "scancel")


def check_models(run: RunConfig) -> Iterator[Check]:
    """Every model of the run: whether it is here or can be fetched, and whether it fits."""
    for name, ref in {**run.sources, "target": run.target}.items():
        title = f"model {name}"
        try:
            facts = look_at_model(name, ref)
        except LogitfuseError as fault:
            yield refusal(title, fault, "correct the model in the run file")
            continue
        yield from outcomes(title, partial(_model, run, facts, title))


def _model(run: RunConfig, facts: ModelFacts, title: str) -> Iterator[Check]:
    if facts.problem is not None:
        remedy = "check the name, HF_TOKEN, HF_HUB_OFFLINE and network; or give a local folder"
        yield error(title, facts.problem, remedy)
        return
    if facts.place == "folder" and facts.size_bytes is None:
        yield error(title, facts.notes[0], "fetch the weights: `git lfs pull`, or copy them again")
        return
    where = {"folder": "here", "GGUF file": "a GGUF file", "hub": "on the hub"}[facts.place]
    size = f", {size_text(facts.size_bytes)}" if facts.size_bytes is not None else ""
    found = f"{facts.ref.model}: {where}{size}"
    if facts.place == "hub":
        if local_copy(facts.ref) is not None:
            found = f"{facts.ref.model}: in the hub's cache"
        else:
            found += ", downloaded when a stage needs it"
        if facts.ref.revision is None:
            remedy = "write `revision:` with a commit: a store belongs to one version of a model"
            yield warning(title, f"{found}; its revision is not pinned", remedy)
            return
    yield _fitting(run, facts, title, found)


def _fitting(run: RunConfig, facts: ModelFacts, title: str, found: str) -> Check:
    """Whether the weights fit into the memory that is free here."""
    if facts.parameters is None:
        return ok(title, found)
    import torch

    need = facts.parameters * DTYPES.get(facts.dtype or "float32", 4)
    if not torch.cuda.is_available():
        room, device = free_host_bytes(), "memory"
    else:
        section = run.section("extract", ExtractSection)
        gpus = section.tensor_parallel_size * section.pipeline_parallel_size
        gpus = torch.cuda.device_count() if facts.name == "target" else gpus
        total = torch.cuda.get_device_properties(0).total_memory
        room, device = int(total * section.gpu_memory_utilization) * gpus, f"{gpus} GPU(s)"
    if need > room:
        remedy = "more GPUs (extract.tensor_parallel_size; train.parallel: fsdp2), or other nodes"
        shown = f"{found}; {size_text(need)} of weights, {size_text(room)} in {device}"
        return warning(title, shown, remedy)
    return ok(title, found)


def check_data(run: RunConfig) -> Iterator[Check]:
    """Whether every input is there."""
    inputs = run.section("corpus", CorpusSection).inputs
    if run.data_dir is not None and not inputs:
        return
    if not inputs:
        yield warning("data", "no inputs", "name at least one file under corpus.inputs")
        return
    files = 0
    for entry in inputs:
        try:
            found = input_files(entry)
        except LogitfuseError as fault:
            yield refusal("data", fault, "correct corpus.inputs")
            continue
        pointers = [f.path for f in found if f.path.is_file() and is_pointer(f.path)]
        if pointers:
            yield error("data", f"{pointers[0]} is a pointer of git-lfs", "`git lfs pull`")
            continue
        files += len(found)
    check_stages(run, run.section("train", TrainSection).stages)
    if files:
        yield ok("data", f"files: {files:,}, inputs: {len(inputs)}")


def folders(run: RunConfig) -> list[str]:
    """Folders and URLs that the run writes or reads, each once."""
    places = [run.folder, run.data_folder, *([run.aligned_dir] if run.aligned_dir else [])]
    return list(dict.fromkeys(place.rstrip("/") for place in places))


def check_storage(run: RunConfig) -> Iterator[Check]:
    """Whether the run's folders can be written; in an object store, by writing an object."""
    for place in folders(run):
        name = "bucket" if "://" in place else "folder"
        if "://" in place:
            yield from outcomes(name, partial(_bucket, place))
            continue
        there = existing(Path(place))
        if not there.is_dir() or not os.access(there, os.W_OK):
            yield error(
                name, f"{place}: {there} cannot be written", "correct run_dir, or its rights"
            )
        else:
            yield ok(
                name, f"{place}: can be written, {size_text(shutil.disk_usage(there).free)} free"
            )


def _bucket(url: str) -> Iterator[Check]:
    """List, write, read and delete a small object."""
    key, content = f".doctor-{uuid.uuid4().hex}", b"logitfuse doctor"
    remedy = "check the bucket, its rights (list, get, put, delete), AWS_* and AWS_ENDPOINT_URL"
    try:
        location = open_location(url)
        location.names("")
        location.write_atomic(key, content)
        same = location.read_bytes(key) == content
        location.delete(key)
    except LogitfuseError as fault:
        yield refusal("bucket", fault, remedy)
        return
    if not same:
        yield error("bucket", f"{url}: an object is not read as it was written", remedy)
        return
    yield ok("bucket", f"{url}: an object was listed, written, read and deleted")


def check_scheduler(run: RunConfig) -> Iterator[Check]:
    """Slurm's commands where the run file asks for it; Ray where there is a cluster's address."""
    section = run.section("launch", LaunchSection)
    if section.slurm or section.workers:
        missing = [name for name in _SLURM if shutil.which(name) is None]
        if missing:
            remedy = "submit on a login node, or with --ray ADDRESS"
            yield warning("Slurm", f"not found: {', '.join(missing)}", remedy)
        else:
            yield ok("Slurm", f"commands found, {shutil.which('sbatch')}")
        local = [p for p in folders(run) if p.startswith(_NODE_LOCAL)]
        if local:
            remedy = "give run_dir on a file system that all nodes see, or in a bucket"
            yield warning("shared folder", f"{local[0]} is seen by one node only", remedy)
    if "RAY_ADDRESS" in os.environ:
        if importlib.util.find_spec("ray") is None:
            yield error("Ray", "RAY_ADDRESS is set, ray is not installed", "pip install ray")
        else:
            yield ok("Ray", "installed, RAY_ADDRESS is set")


def check_disk(run: RunConfig) -> Iterator[Check]:
    """Free space against what the plan's stores will take."""
    if "://" in run.data_folder:
        return
    free = shutil.disk_usage(existing(Path(run.data_folder))).free
    plan = Plan.find(plan_location(run.data_folder))
    if plan is None:
        found = f"{size_text(free)} free; no plan yet, so the need is not known"
        if free < LEAST_DISK:
            yield warning("disk", found, "free space, or give another run_dir")
        else:
            yield ok("disk", found)
        return
    entries = run.section("extract", ExtractSection).max_entries
    preset = run.section("store", StoreSection).preset
    shards = plan.shards
    tokens = [sum(s.num_tokens.get(n, 0) for s in shards) for n in run.sources]
    target = sum(s.num_tokens.get("target", 0) for s in shards) * len(run.sources)
    positions = sum(tokens) + target
    likely, most = likely_bytes(positions, entries, preset), at_most_bytes(positions, entries)
    found = (
        f"{size_text(free)} free; stores and aligned stores take about {size_text(likely)} "
        f"({preset}), at most {size_text(most)}"
    )
    remedy = "free space, give another run_dir, or a smaller store.preset (compact, tiny)"
    if free < likely:
        yield error("disk", found, remedy)
    elif free < most and preset == "exact":
        yield warning("disk", found, remedy)
    else:
        yield ok("disk", found)
