"""Things added to the registries of every process that a test starts, as a user adds them.

A folder holds files at their places below the packages, and `lines.json`: {package: {name:
"module:Class"}}.
Python imports `sitecustomize` when it starts, so the children that a stage starts have them too.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from store_schema.registry import Registry

AT_START = """
from pathlib import Path

from tests.added_kinds import add

add(Path(__file__).parent)
"""


def add(folder: Path) -> None:
    """Take the files of a folder for part of the packages, and its lines for part of the registries."""
    for package, lines in json.loads((folder / "lines.json").read_text()).items():
        for place in lines.values():
            inside = place.partition(":")[0].rpartition(".")[0]
            import_module(inside).__path__.append(str(folder.joinpath(*inside.split("."))))
        module = vars(import_module(package))
        (registry,) = (value for value in module.values() if isinstance(value, Registry))
        registry.table.update(lines)


def write(folder: Path, path: str, code: str, package: str, name: str, place: str) -> Path:
    """One file and one line; returns the file.

    Args:
        folder: For `PYTHONPATH`.
        path: Of the file, from the top of the repository.
        code: In it.
        package: Whose registry has the line.
        name: In the registry.
        place: "module:Class".
    """
    file = folder / path
    file.parent.mkdir(parents=True)
    file.write_text(code, encoding="utf-8")
    (folder / "lines.json").write_text(json.dumps({package: {name: place}}))
    (folder / "sitecustomize.py").write_text(AT_START)
    return file
