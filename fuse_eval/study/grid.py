"""What a study trains: every row, seed and recipe, and where each goes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fuse_eval.study.config import Row, Setting, StudyConfig, filled, written
from store_schema.config import RunConfig, parse_run
from store_schema.errors import ConfigError
from store_schema.fingerprint import fingerprint
from store_schema.yaml_file import read_yaml, set_value

RUN_FILE = "run.yaml"


@dataclass(frozen=True)
class Data:
    """Corpus, plan and stores of a setting, which its rows share.

    Args:
        setting: Name of the setting.
        seed: Of models and text; None where they are the run file's.
        folder: Of the run that has them.
        content: Of that run file, with every source.
        commands: Make its inputs.
    """

    setting: str
    seed: int | None
    folder: Path
    content: Mapping[str, Any]
    commands: tuple[tuple[str, ...], ...]

    @cached_property
    def run(self) -> RunConfig:
        """The run of all sources.

        Raises:
            ConfigError: A value is refused.
        """
        return parse_run(dict(self.content), where=f"setting {self.setting!r}")

    def write(self) -> Path:
        """Write its run file."""
        path = self.folder / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written(self.content), encoding="utf-8")
        return path


def data_of(study: StudyConfig, name: str, seed: int) -> Data:
    """Data of a setting at one seed; the same for all seeds where nothing names the seed.

    Raises:
        ConfigError: The setting's run file is missing or not YAML.
    """
    setting = study.settings[name]
    own = setting.data_by_seed
    folder = study.folder / name / (f"data-{seed}" if own else "data")
    words = {"folder": str(folder), "seed": str(seed)}
    content = read_yaml(Path(setting.run), "run file")
    for key, value in setting.set.items():
        set_value(content, key, filled(value, words), where=f"settings.{name}.set")
    content |= {"name": f"{study.name}-{name}", "run_dir": str(folder), "data_dir": None}
    if own:
        content["seed"] = seed
    commands = tuple(tuple(filled(command, words)) for command in setting.prepare)
    return Data(name, seed if own else None, folder, content, commands)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training of a row.

    Args:
        row: Name of the row.
        tuning: What is set over the row.
        content: Of its run file.
        run: The same, checked.
    """

    row: str
    tuning: Mapping[str, Any]
    content: Mapping[str, Any]
    run: RunConfig

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return Path(self.run.folder)

    @property
    def title(self) -> str:
        """The tuning in words, such as `lr 0.001, epochs 3`."""
        return ", ".join(f"{key.removeprefix('train.')} {v}" for key, v in self.tuning.items())

    def write(self) -> Path:
        """Write the run file that trains it."""
        path = self.folder / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written(self.content), encoding="utf-8")
        return path


def recipe_of(
    study: StudyConfig, data: Data, seed: int, name: str, tuning: Mapping[str, Any]
) -> Recipe:
    """The training of a row by one of the setting's recipes.

    Its folder is named after all that shapes the weights beside models and text, so that a changed row
    is another training.

    Raises:
        ConfigError: A source that the run file lacks, or a value that is refused.
    """
    row, setting = study.rows[name], study.settings[data.setting]
    where = f"row {name!r}"
    content = copy.deepcopy(dict(data.content))
    content["sources"] = _chosen(content["sources"], row.sources or setting.sources, where)
    for key, value in {**row.set, **tuning}.items():
        set_value(content, key, value, where=where)
    set_value(content, "train.control", False, where=where)
    content["seed"] = seed
    shaping = parse_run(content, where=where)
    digest = fingerprint(
        {
            "seed": seed,
            "sources": sorted(shaping.sources),
            "sections": {key: shaping.sections[key].content() for key in ("align", "train")},
        }
    )
    words = " ".join([name, *(f"{k.removeprefix('train.')}={v}" for k, v in tuning.items())])
    folder = re.sub(r"[^\w.=-]+", "-", f"{words} {digest[:8]}")
    content["run_dir"] = str(study.folder / data.setting / f"seed-{seed}" / folder)
    content["data_dir"] = str(data.folder)
    alignment, of_data = (run.sections["align"].content() for run in (shaping, data.run))
    if alignment != of_data:
        content["aligned_dir"] = f"{data.folder}/aligned-{fingerprint(alignment)[:8]}"
    return Recipe(name, tuning, content, parse_run(content, where=where))


def _chosen(sources: Mapping[str, Any], names: Sequence[str] | None, where: str) -> dict[str, Any]:
    for name in names or ():
        if name not in sources:
            raise ConfigError(
                "no such source", where=where, expected=f"one of {', '.join(sources)}", got=name
            )
    return {name: ref for name, ref in sources.items() if names is None or name in names}


@dataclass(frozen=True, slots=True)
class Cell:
    """One row at one seed of a setting.

    Args:
        study: The study.
        data: Of the setting.
        seed: Of the trainings.
        name: Of the row.
    """

    study: StudyConfig
    data: Data
    seed: int
    name: str

    @property
    def row(self) -> Row:
        """The row itself."""
        return self.study.rows[self.name]

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Those that it is tuned over; none where it is not tuned itself."""
        if self.row.model is not None or self.row.tuned_as is not None:
            return ()
        return tuple(map(self.recipe, self.study.settings[self.data.setting].tune))

    def recipe(self, tuning: Mapping[str, Any]) -> Recipe:
        """Its training by one recipe."""
        return recipe_of(self.study, self.data, self.seed, self.name, tuning)

    @property
    def model_folder(self) -> Path:
        """Where the scores of a model go that is not trained."""
        name = re.sub(r"[^\w.=-]+", "-", f"{self.name} as it is")
        return self.study.folder / self.data.setting / f"seed-{self.seed}" / name


def cells_of(study: StudyConfig, setting: str, seed: int) -> list[Cell]:
    """All rows of a setting at one seed, those tuned as others after these."""
    data = data_of(study, setting, seed)
    cells = [Cell(study, data, seed, name) for name in study.rows_of(setting)]
    return sorted(cells, key=lambda cell: cell.row.tuned_as is not None)


def settings_of(study: StudyConfig, names: Sequence[str]) -> dict[str, Setting]:
    """Settings by name, all where none is named.

    Raises:
        ConfigError: One is not there.
    """
    for name in names:
        if name not in study.settings:
            raise ConfigError(
                "no such setting", expected=f"one of {', '.join(study.settings)}", got=name
            )
    return {name: s for name, s in study.settings.items() if not names or name in names}


def check_rows(study: StudyConfig, setting: str, seed: int) -> None:
    """Read every row's run file before anything is made.

    Raises:
        ConfigError: A source that the run file lacks, or a value that is refused.
    """
    for cell in cells_of(study, setting, seed):
        for tuning in study.settings[setting].tune:
            if cell.row.model is None:
                cell.recipe(tuning)
