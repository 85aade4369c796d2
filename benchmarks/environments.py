"""Environments of their own for packages that ours should not have, above the packages of ours.

Each is made once, below the cache folder of unpacked GGUF files: the package and what it needs, in
front of the packages of this environment, so that both use the same torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import uuid
import venv
from pathlib import Path

from store_schema.disk.cache_folder import cache_folder

SECONDS = 900


class UnavailableError(Exception):
    """A package cannot be had here."""


def environment(package: str, version: str, module: str) -> Path:
    """Python of the environment that has a package; made on the first call.

    Args:
        package: Name in the registry.
        version: Its version.
        module: Must be importable, or the environment is not kept.

    Raises:
        UnavailableError: It cannot be made; says why.
    """
    folder = cache_folder() / f"{package}-{version}-py{sysconfig.get_python_version()}"
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    making = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        venv.create(making, with_pip=True, symlinks=True)
        own = packages_of(making / "bin" / "python")
        (own / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        words = ["-m", "pip", "install", "--quiet", "--retries", "1"]
        run_python(making / "bin" / "python", *words, f"{package}=={version}")
        run_python(making / "bin" / "python", "-c", f"import {module}")
        making.rename(folder)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise UnavailableError(said[-1] if said else type(error).__name__) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return python


def packages_of(python: Path) -> Path:
    """Folder of the packages that an environment has of its own."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(python.parents[1])}))


def run_python(python: Path, *words: str, given: str | None = None) -> None:
    """Run a Python without a hub.

    Raises:
        CalledProcessError: It failed.
    """
    path = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [str(python), *words], input=given, env=os.environ | path,
        check=True, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
