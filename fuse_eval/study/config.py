"""The study file: which trainings are compared, on what, and against what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from fuse_eval.harness.config import HarnessSection
from fuse_eval.study.jobs import SubmitSection
from store_schema.config import StrictModel
from store_schema.errors import ConfigError
from store_schema.paths import PathText
from store_schema.validation import validation_line
from store_schema.yaml_file import read_yaml

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_. -]*$"
SEED = "{seed}"


class ExpectedSection(StrictModel):
    """What is expected of models and text that are not on this machine yet."""

    parameters: dict[str, Annotated[float, Field(ge=1, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    """Parameters that a token uses, by source, and of `target`."""
    tokens: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """Tokens of the text of all splits."""
    prompts: int | None = Field(default=None, ge=1)
    """Prompts that are answered (`answers: true`)."""


class Row(StrictModel):
    """One way of training, or one model that is there already."""

    says: str = ""
    """What it is, for the table; the name by default."""
    group: str = ""
    """Rows of one group stand together under its name."""
    baseline: bool = False
    """Whether it is one of the methods that the study's own is held against."""
    model: str | None = Field(default=None, min_length=1)
    """Scored as it is, not trained: `target` (before training), the name of a source, or a folder."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values over the run file's, by dotted keys such as `train.selector`."""
    sources: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The sources it is trained with, by name. Without this and the next two, those of the setting."""
    add_sources: tuple[str, ...] = ()
    """Sources of the run file that it has beside those of the setting."""
    without_sources: tuple[str, ...] = ()
    """Sources of the setting that it lacks."""
    tuned_as: str | None = None
    """Another row whose best recipe it takes, instead of the best of all its own."""

    @field_validator("set")
    @classmethod
    def _of_training(cls, values: dict[str, Any]) -> dict[str, Any]:
        for key in values:
            if key.partition(".")[0] not in ("preset", "align", "train"):
                raise ValueError(
                    f"{key}: rows differ in preset, align and train; what makes the stores is set "
                    "for a whole setting"
                )
        return values

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        changed = self.add_sources or self.without_sources
        if self.model is not None and (self.set or self.sources or changed or self.tuned_as):
            raise ValueError("`model` is not trained: it goes without set, sources and tuned_as")
        if self.sources and changed:
            raise ValueError("`sources` names all: it goes without add_sources and without_sources")
        return self


class Setting(StrictModel):
    """Sources, target and text. Stores are made once and serve all rows."""

    run: PathText | None = None
    """The run file that all rows start from."""
    like: str | None = None
    """Another setting whose run, data, seeds, recipes and rows it has, but for the sources, recipes and
    rows given here. Rows that are the same in both are trained once."""
    prepare: tuple[tuple[str, ...], ...] = ()
    """Commands that make the run's inputs, as words; `python` is the running one. `{folder}` is the
    folder of the setting's data, `{seed}` the seed."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values over the run file's, for all rows; `{folder}` and `{seed}` as above."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of the trainings. With `{seed}` above each has models, text and stores of its own, else
    all share those of the run file."""
    sources: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Sources of rows that name none; None takes all of the run file."""
    tune: tuple[dict[str, Any], ...] = Field(default=({},), min_length=1)
    """Recipes such as {train.lr: 0.001, train.epochs: 3}: each row has the best of them, by the mean
    of domains on the validation split."""
    answers: bool = False
    """Whether every model also answers the prompts of `split`, judged as the run's `evaluate.answers`
    says."""
    harness: HarnessSection | None = None
    """Tasks of lm-evaluation-harness that every model also does: {tasks: [gsm8k], limit: 200}."""
    expected: ExpectedSection = ExpectedSection()
    """Sizes that `study plan` goes by where models or text are not there yet."""
    rows: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Rows that are trained here; None takes all."""
    tuned_as: dict[str, str] = Field(default_factory=dict)
    """Rows that here take the best recipe of another one, as with `tuned_as` of a row."""

    @field_validator("harness")
    @classmethod
    def _some_tasks(cls, harness: HarnessSection | None) -> HarnessSection | None:
        if harness is not None and not harness.tasks:
            raise ValueError("name the tasks: {tasks: [gsm8k]}")
        return harness

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise ValueError("seeds are different numbers from 0")
        return seeds

    @model_validator(mode="after")
    def _one_run(self) -> Self:
        if (self.run is None) == (self.like is None):
            raise ValueError("either `run` or `like` is given")
        given = self.model_fields_set & {"prepare", "set", "seeds"}
        if self.like is not None and given:
            raise ValueError(f"{sorted(given)[0]} is that of setting {self.like!r}")
        return self

    @property
    def data_by_seed(self) -> bool:
        """Whether each seed has models, text and stores of its own."""
        return SEED in repr((self.prepare, self.set))


class StudyConfig(StrictModel):
    """The whole file."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    """Name of the study and of its folder."""
    study_dir: PathText | None = None
    """Folder of everything that the study makes; None means runs/<name>."""
    results_dir: PathText | None = None
    """Folder of scores, records and tables, some 100 kB a training; None means study_dir. All that
    `study show` reads is there."""
    split: str = Field(default="test", min_length=1)
    """Split that all rows are compared on."""
    settings: dict[str, Setting] = Field(min_length=1)
    """What is fused into what, by name."""
    rows: dict[str, Row] = Field(min_length=1)
    """What is compared, by name, in the order of the table."""
    control: str
    """The row that the others are compared with: plain training on the same tokens."""
    ours: str | None = None
    """The row whose advantage over the baselines is told."""
    interference_against: str | None = None
    """A row whose interference the others' is divided by."""
    train_with: tuple[str, ...] = Field(default=("python", "-m", "logitfuse"), min_length=1)
    """How `logitfuse` is started for a training, such as [accelerate, launch, -m, logitfuse]."""
    submit: SubmitSection = SubmitSection()
    """What `logitfuse study submit` asks of Slurm."""
    bootstrap_samples: int = Field(default=2000, ge=200, le=100_000)
    """Resamples behind each interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Two-sided level of the intervals."""

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.study_dir or f"runs/{self.name}")

    @property
    def results(self) -> Path:
        """Where what is kept goes."""
        return self.folder if self.results_dir is None else Path(self.results_dir)

    def data_name(self, setting: str) -> str:
        """The setting whose data a setting has: itself, or the one that it is like."""
        return self.settings[setting].like or setting

    def setting(self, name: str) -> Setting:
        """A setting with all that it has of another one."""
        own = self.settings[name]
        if own.like is None:
            return own
        given = {field: getattr(own, field) for field in own.model_fields_set - {"like"}}
        return self.settings[own.like].model_copy(update=given)

    def rows_of(self, setting: str) -> dict[str, Row]:
        """Rows of one setting, in order."""
        own = self.setting(setting)
        return {
            name: row.model_copy(update={"tuned_as": own.tuned_as.get(name, row.tuned_as)})
            for name, row in self.rows.items()
            if own.rows is None or name in own.rows
        }

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        for name in (*self.rows, *self.settings):
            if not re.match(NAME, name):
                raise ValueError(f"{name!r}: a name has letters, digits, spaces, '-', '_' and '.'")
        for key, name in _rows_named(self):
            if name not in self.rows:
                raise ValueError(f"{key}: no row {name!r}, there are {', '.join(self.rows)}")
        for name in filter(None, (self.control, self.ours)):
            if self.rows[name].model is not None:
                raise ValueError(f"row {name!r} is compared with as a training, so it needs one")
        if self.ours == self.control:
            raise ValueError(f"ours is the control itself, row {self.control!r}")
        for name, own in self.settings.items():
            if own.like is not None and getattr(self.settings.get(own.like), "run", None) is None:
                raise ValueError(f"setting {name!r} is like {own.like!r}, which has no run file")
            rows = self.rows_of(name)
            if self.control not in rows:
                raise ValueError(f"setting {name!r} lacks the control, row {self.control!r}")
            tuned = {key for recipe in self.setting(name).tune for key in recipe}
            for row, content in rows.items():
                both = sorted(tuned & content.set.keys())
                if both:
                    raise ValueError(f"row {row!r} sets {both[0]}, which setting {name!r} tunes")
                of = content.tuned_as
                if of is not None and (of not in rows or not _is_tuned(rows[of])):
                    raise ValueError(
                        f"row {row!r} is tuned as {of!r}, which is no row of setting {name!r} that is "
                        "tuned itself"
                    )
        return self


def _is_tuned(row: Row) -> bool:
    return row.model is None and row.tuned_as is None


def _rows_named(study: StudyConfig) -> Iterator[tuple[str, str]]:
    yield "control", study.control
    for key in ("ours", "interference_against"):
        name = getattr(study, key)
        if name is not None:
            yield key, name
    for setting, content in study.settings.items():
        yield from ((f"settings.{setting}.rows", name) for name in content.rows or ())
        yield from ((f"settings.{setting}.tuned_as", name) for name in content.tuned_as)


def load_study(path: str | Path) -> StudyConfig:
    """Read and check a study file.

    Raises:
        ConfigError: It is missing, is not YAML, or any key or value is wrong.
    """
    raw = read_yaml(Path(path), "study file")
    try:
        return StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            f"study file refused in {path}: {validation_line(error, StudyConfig)}"
        ) from error


def filled(value: Any, words: Mapping[str, str]) -> Any:
    """A value with `{folder}` and `{seed}` replaced in all its texts."""
    if isinstance(value, str):
        for name, text in words.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, Mapping):
        return {key: filled(item, words) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [filled(item, words) for item in value]
    return value


def written(content: Mapping[str, Any]) -> str:
    """YAML in the order of the keys."""
    text: str = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    return text
