"""Run `logitfuse` with things added to its registries, as a user adds them: a file and a line each.

    python registry_driver.py FOLDER logitfuse-arguments...

FOLDER holds files at their places below the rooms, and `lines.json`: {package: {name: "module:Class"}}.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path


def add(folder: Path) -> None:
    """Take the files of a folder for part of the packages, and the lines for part of the registries."""
    for package, lines in json.loads((folder / "lines.json").read_text()).items():
        for place in lines.values():
            inside = place.partition(":")[0].rpartition(".")[0]
            path = str(folder.joinpath(*inside.split(".")))
            loaded = import_module(inside).__path__
            if path not in loaded:
                loaded.append(path)
        (registry,) = {
            id(value): value
            for value in vars(import_module(package)).values()
            if type(value).__name__ == "Registry"
        }.values()
        registry.table.update(lines)


if __name__ == "__main__":
    add(Path(sys.argv[1]))
    from logitfuse import main

    sys.argv = ["logitfuse", *sys.argv[2:]]
    main()
