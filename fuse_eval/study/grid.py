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
from fuse_train.config import TrainSection
from store_schema.config import RunConfig, parse_run
from store_schema.errors import ConfigError
from store_schema.fingerprint import fingerprint
from store_schema.yaml_file import read_yaml, set_value

RUN_FILE = "run.yaml"


@dataclass(frozen=True)
class Data:
    """Corpus, plan and stores of a setting, which its rows share.

    Args:
        folder: Of the run that has them.
        text_file: Where the record of the scored text is kept.
        content: Of that run file, with every source.
        commands: Make its inputs.
    """

    folder: Path
    text_file: Path
    content: Mapping[str, Any]
    commands: tuple[tuple[str, ...], ...]

    @cached_property
    def run(self) -> RunConfig:
        """The run of all sources.

        Raises:
            ConfigError: A value is refused.
        """
        return parse_run(dict(self.content), where=f"data in {self.folder}")

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
    setting, name = study.setting(name), study.data_name(name)
    own = setting.data_by_seed
    label = f"data-{seed}" if own else "data"
    folder = study.folder / name / label
    words = {"folder": str(folder), "seed": str(seed)}
    content = read_yaml(Path(str(setting.run)), "run file")
    for key, value in setting.set.items():
        set_value(content, key, filled(value, words), where=f"settings.{name}.set")
    content |= {
        "name": folder_name(f"{study.name}-{name}"),
        "run_dir": str(folder),
        "data_dir": None,
    }
    if own:
        content["seed"] = seed
    commands = tuple(tuple(filled(command, words)) for command in setting.prepare)
    return Data(folder, study.results / name / f"{label}.json", content, commands)


@dataclass(frozen=True, slots=True)
class Place:
    """One seed of a setting.

    Args:
        setting: Name of the setting.
        seed: Of the trainings.
        data: Of the setting.
        data_name: Of the setting that has the data: like settings share its folders.
        pool_name: Of the first setting with the same data and sources: they have the same pools.
    """

    setting: str
    seed: int
    data: Data
    data_name: str
    pool_name: str

    def within(self, folder: Path) -> Path:
        """Its trainings in a folder."""
        return folder / self.data_name / f"seed-{self.seed}"

    def pool(self, folder: Path) -> Path:
        """Its pools in a folder."""
        return folder / self.pool_name / f"pools-{self.seed}"


def place_of(study: StudyConfig, setting: str, seed: int) -> Place:
    """One seed of a setting."""

    def pooled(name: str) -> tuple[str, tuple[str, ...] | None]:
        return study.data_name(name), study.setting(name).sources

    first = next(name for name in study.settings if pooled(name) == pooled(setting))
    return Place(setting, seed, data_of(study, setting, seed), study.data_name(setting), first)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training of a row.

    Args:
        row: Name of the row.
        tuning: What is set over the row.
        content: Of its run file.
        run: The same, checked.
        results: Where its scores and its record are kept.
    """

    row: str
    tuning: Mapping[str, Any]
    content: Mapping[str, Any]
    run: RunConfig
    results: Path

    @property
    def folder(self) -> Path:
        """Where it is trained."""
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


def recipe_of(study: StudyConfig, place: Place, name: str, tuning: Mapping[str, Any]) -> Recipe:
    """The training of a row by one of the setting's recipes.

    Its folder is named after all that shapes the weights beside models and text, so that a changed row
    is another training. Sources and alignment do not shape plain training.

    Raises:
        ConfigError: A source that the run file lacks, or a value that is refused.
    """
    row, data, where = study.rows_of(place.setting)[name], place.data, f"row {name!r}"
    content = copy.deepcopy(dict(data.content))
    content["sources"] = _sources_of(row, study.setting(place.setting), content["sources"], where)
    for key, value in {**row.set, **tuning}.items():
        set_value(content, key, value, where=where)
    set_value(content, "train.control", False, where=where)
    content["seed"] = place.seed
    run = parse_run(content, where=where)
    train, align = run.section("train", TrainSection), run.sections["align"].content()
    shaping: dict[str, Any] = {"seed": place.seed, "train": train.content()}
    if not _is_plain(train):
        shaping |= {"sources": sorted(run.sources), "align": align}
    words = " ".join([name, *(f"{k.removeprefix('train.')}={v}" for k, v in tuning.items())])
    label = folder_name(f"{words} {fingerprint(shaping)[:8]}")
    content["run_dir"] = str(place.within(study.folder) / label)
    content["data_dir"] = str(data.folder)
    if align != data.run.sections["align"].content():
        content["aligned_dir"] = f"{data.folder}/aligned-{fingerprint(align)[:8]}"
    run = parse_run(content, where=where)
    return Recipe(name, tuning, content, run, place.within(study.results) / label)


def folder_name(text: str) -> str:
    """A name of a folder that says the same."""
    return re.sub(r"[^\w.=-]+", "-", text)


def _is_plain(train: TrainSection) -> bool:
    """Whether a training is on ground truth alone, all the time."""
    return (
        train.clm_weight == 1
        and train.loss.clm_weight_schedule is None
        and train.fusion_gate.kind == "none"
    )


def _sources_of(
    row: Row, setting: Setting, sources: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The sources that a row is trained with, of all of the run file, in its order."""
    if row.sources is not None:
        return _chosen(sources, row.sources, where)
    own = _chosen(sources, setting.sources, where)
    _chosen(own, row.without_sources, f"{where}, without_sources")
    names = (own.keys() | set(row.add_sources)) - set(row.without_sources)
    if not names:
        raise ConfigError(
            "no source is left",
            where=where,
            expected="one or more",
            got=", ".join(row.without_sources),
        )
    _chosen(sources, row.add_sources, f"{where}, add_sources")
    return {name: ref for name, ref in sources.items() if name in names}


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
        place: Setting and seed.
        name: Of the row.
    """

    study: StudyConfig
    place: Place
    name: str

    @property
    def row(self) -> Row:
        """The row itself."""
        return self.study.rows_of(self.place.setting)[self.name]

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Those that it is tuned over; none where it is not tuned itself."""
        if self.row.model is not None or self.row.tuned_as is not None:
            return ()
        return tuple(map(self.recipe, self.study.setting(self.place.setting).tune))

    def recipe(self, tuning: Mapping[str, Any]) -> Recipe:
        """Its training by one recipe."""
        return recipe_of(self.study, self.place, self.name, tuning)

    @property
    def model_results(self) -> Path:
        """Where the scores of a model go that is not trained; another model has another place."""
        run = self.place.data.run
        ref = {**run.sources, "target": run.target}.get(str(self.row.model))
        known = None if ref is None else ref.model_dump(mode="json")
        digest = fingerprint([self.row.model, known])[:8]
        name = folder_name(f"{self.name} as it is {digest}")
        return self.place.within(self.study.results) / name


def cells_of(study: StudyConfig, place: Place) -> list[Cell]:
    """All rows of a setting at one seed, those tuned as others after these."""
    cells = [Cell(study, place, name) for name in study.rows_of(place.setting)]
    return sorted(cells, key=lambda cell: cell.row.tuned_as is not None)


def pool_run(study: StudyConfig, place: Place) -> RunConfig:
    """The run whose pools are estimated: of the sources that rows have which name none."""
    content = copy.deepcopy(dict(place.data.content))
    setting = study.setting(place.setting)
    content["sources"] = _chosen(content["sources"], setting.sources, place.setting)
    content |= {
        "run_dir": str(place.pool(study.folder)),
        "data_dir": str(place.data.folder),
        "seed": place.seed,
    }
    return parse_run(content, where=f"setting {place.setting!r}")


def settings_of(study: StudyConfig, names: Sequence[str]) -> list[str]:
    """Names of settings, all where none is given.

    Raises:
        ConfigError: One is not there.
    """
    for name in names:
        if name not in study.settings:
            raise ConfigError(
                "no such setting", expected=f"one of {', '.join(study.settings)}", got=name
            )
    return [name for name in study.settings if not names or name in names]


def checked_places(
    study: StudyConfig, settings: Sequence[str], seeds: Sequence[int]
) -> list[Place]:
    """The seeds of settings that are asked for; every row's run file is read before anything is made.

    Args:
        study: The study.
        settings: Names; all where none is given.
        seeds: Seeds; all of a setting where none is given.

    Raises:
        ConfigError: A name, a source or a value that is refused.
    """
    places = [
        place_of(study, name, seed)
        for name in settings_of(study, settings)
        for seed in study.setting(name).seeds
        if not seeds or seed in seeds
    ]
    for place in places:
        for cell in cells_of(study, place):
            if cell.row.model is None:
                for tuning in study.setting(place.setting).tune:
                    cell.recipe(tuning)
    return places
