"""The table of docs/dependencies.md: `python -m tests.dependency_table` writes its licences again.

What a package is for and what would replace it is written by hand; the licence is read from the
metadata of the installed package, and stays as it is where the package is not installed.
`python -m tests.dependency_table always,train` prints what constraints.txt pins of their direct ones.
"""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs/dependencies.md"
ROW = re.compile(r"^\| `([\w.-]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
LONGEST = 40
SPDX = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD",
    "BSD License": "BSD",
    "MIT License": "MIT",
}
"""Names that packages write, and those of the SPDX list. "BSD" may have two or three clauses."""


@dataclass(frozen=True)
class Row:
    """A line of the table: the extra of a package ("always" for none), and what is said of it."""

    where: str
    licence: str
    purpose: str
    replacement: str


def declared() -> dict[str, str]:
    """Direct dependencies of pyproject.toml, and the first extra of each; "always" for none."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    for where, requirements in {
        "always": project["dependencies"],
        **project["optional-dependencies"],
    }.items():
        for requirement in requirements:
            found.setdefault(re.split(r"[^\w.-]", requirement)[0], where)
    return found


def rows() -> dict[str, Row]:
    """The table, by package."""
    found = ROW.findall(PAGE.read_text(encoding="utf-8"))
    table = {name: Row(*(cell.strip() for cell in cells)) for name, *cells in found}
    assert len(table) == len(found), "a package has two rows"
    return table


def licence(package: str) -> str | None:
    """Licence of an installed package as its metadata has it; None if it is not installed or silent."""
    try:
        found = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return None
    classified = [
        name
        for text in found.get_all("Classifier") or []
        if text.startswith("License :: OSI Approved :: ")
        for name in [text.rsplit(" :: ", 1)[1]]
    ]
    if found["License-Expression"]:
        return str(found["License-Expression"])
    for text in (found["License"], *classified):  # some have the licence's whole text as its name
        if text and len(text) <= LONGEST:
            return SPDX.get(text, text)
    return None


def written() -> tuple[str, str]:
    """The page as it is, and with the licences of what is installed."""

    def again(found: re.Match[str]) -> str:
        name, where, there, purpose, replacement = found.groups()
        return f"| `{name}` | {where} | {licence(name) or there} | {purpose} | {replacement} |"

    before = PAGE.read_text(encoding="utf-8")
    return before, ROW.sub(again, before)


def pins(extras: set[str], file: str = "constraints.txt") -> dict[str, str]:
    """Version of each direct dependency of some extras, by its normal name, as a file pins it."""
    direct = {normal(name) for name, where in declared().items() if where in extras}
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    pinned = {normal(name): version for line in lines for name, version in [line.split("==")]}
    return {name: version for name, version in pinned.items() if name in direct}


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.lower())


if __name__ == "__main__" and len(sys.argv) > 1:
    print(
        "\n".join(
            f"{name}=={version}" for name, version in pins(set(sys.argv[1].split(","))).items()
        )
    )
elif __name__ == "__main__":
    PAGE.write_text(written()[1], encoding="utf-8")
