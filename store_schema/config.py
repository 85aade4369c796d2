"""The run file: one YAML, read by every stage, strict everywhere.

The head (name, seed, sources, target) is defined here. Each stage defines its own section as a pydantic
model and registers it under the entry point group `logitfuse.sections`, so that every stage checks the
whole file, while no stage imports another.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from store_schema.dtypes import DTYPES, full_name
from store_schema.errors import ConfigError
from store_schema.papers import preset_text
from store_schema.paths import PathText
from store_schema.validation import validation_line
from store_schema.yaml_file import apply_override, read_yaml

BosRule = Literal["auto", "always", "never"]

SECTION_GROUP = "logitfuse.sections"


class StrictModel(BaseModel):
    """Base of all parsed records: unknown keys and numbers that are not finite are errors, instances
    are frozen, and defaults are checked too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class SectionModel(StrictModel):
    """Base of the run file's sections, one for each stage."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that change speed or location but not the output: they are no part of fingerprints."""

    def content(self) -> dict[str, Any]:
        """The fields that determine the output, for fingerprints."""
        return self.model_dump(mode="json", exclude=set(self.runtime_fields))

    def splits_needed(self) -> dict[str, str]:
        """Splits that the stage cannot do without, by the option that names them."""
        return {}

    def split_of_all_domains(self) -> str | None:
        """The split that should have text of every domain for this stage; None for none."""
        return None

    def finished_shards(self, run: RunConfig, source: str) -> set[int] | None:
        """Indices of the shards of a source that this stage has finished and would keep. Writes
        nothing.

        Args:
            run: The run file of the section.
            source: Name of the source.

        Returns:
            The indices; None for a stage that has no store of a source.

        Raises:
            LogitfuseError: The stage itself would refuse to continue, with the same error.
        """
        return None


Section = TypeVar("Section", bound=SectionModel)


class TemplateSettings(StrictModel):
    """How a model's chat template is rendered."""

    file: PathText | None = Field(default=None, min_length=1)
    """File with another template (Jinja). None: the model's own."""
    date: datetime.date = datetime.date(2025, 1, 1)
    """Today's date for templates that ask for it: fixed, so that work begun on one day can be continued
    on the next."""
    variables: dict[str, Any] = Field(default_factory=dict)
    """Other variables of the template, such as {enable_thinking: false}."""
    fold_system: bool = False
    """Put the system message at the beginning of the first user message, for templates that have no
    system role."""

    @field_validator("variables")
    @classmethod
    def _own_names(cls, variables: dict[str, Any]) -> dict[str, Any]:
        taken = {
            *("messages", "tools", "add_generation_prompt", "tokenize", "chat_template"),
            *("conversation", "continue_final_message", "return_dict", "return_tensors"),
            *("return_assistant_tokens_mask", "padding", "truncation", "max_length"),
            *("tokenizer_kwargs", "processor_kwargs"),
        }
        if taken & variables.keys():
            raise ValueError(
                f"{', '.join(sorted(taken & variables.keys()))}: set by logitfuse, not in the run file"
            )
        return variables


def _full_dtype_name(value: str) -> str:
    name = full_name(value)
    if name != "auto" and name not in DTYPES:
        raise ValueError("must be one of " + ", ".join(["auto", *DTYPES]))
    return name


DtypeName = Annotated[str, AfterValidator(_full_dtype_name)]
"""A dtype's full name, or auto; short names are accepted."""


class ModelRef(StrictModel):
    """A model to load: a local folder, a GGUF file, or a hub name with a pinned revision."""

    model: PathText = Field(min_length=1)
    """Folder, hub name, or a GGUF file (unpacked once into a cached folder: docs/real.md)."""
    gguf_file: str | None = Field(default=None, min_length=1)
    """Name of a GGUF file in that folder or hub repository, which is then the model."""
    revision: str | None = None
    """Commit of a hub model. None takes the folder, or the hub's default branch."""
    dtype: DtypeName = "auto"
    """bfloat16, float16, float32 or float64, also by their usual short names (bf16, half, fp32,
    torch.bfloat16); 'auto' takes the checkpoint's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    bos: BosRule = "auto"
    """Whether BOS is put before a text. 'auto': as the model's own files say (`add_bos_token` in
    tokenizer_config.json, else tokenizer.json); 'always' and 'never' for models whose files are wrong.
    A BOS that a chat template writes is neither doubled nor removed."""

    template: TemplateSettings = TemplateSettings()
    """How its chat template is rendered; fixed once a plan is made."""

    @model_validator(mode="before")
    @classmethod
    def _without_by_offsets(cls, value: Any) -> Any:
        """Accept `by_offsets: false`, which resolved run files of earlier versions have; the option
        itself was removed, so any other value is refused."""
        if not isinstance(value, dict) or "by_offsets" not in value:
            return value
        if value["by_offsets"] is not False:
            raise ValueError(
                "by_offsets was removed: a tokenizer must not change text; leave out documents that it "
                "changes with `corpus.on_bad: drop`, or take another model"
            )
        return {key: item for key, item in value.items() if key != "by_offsets"}


class RunConfig(StrictModel):
    """The head of the run file and its checked sections."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    preset: str | None = None
    """A paper's recipe: its values are the defaults of this file (`logitfuse preset list`)."""
    run_dir: PathText | None = None
    """Folder or URL of all outputs of the run; None means runs/<name>."""
    data_dir: PathText | None = None
    """Folder or URL whose corpus, plan and stores are used; None means the run's own. One
    extraction serves any number of targets, alignments and trainings."""
    aligned_dir: PathText | None = None
    """Folder or URL of the aligned stores, one folder for each source. None means `aligned/` of the
    run, or of `data_dir` if that run aligns in the same way."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of shuffles and initialisations."""
    sources: dict[str, ModelRef] = Field(min_length=1)
    """The models whose distributions are fused, by the names used everywhere else. `target` in place of
    a model is the target before training; null removes a source of the preset."""
    target: ModelRef
    """The model that is trained."""
    sections: dict[str, SectionModel] = {}
    """Parsed sections by name (not a key of the file)."""

    @field_validator("sources")
    @classmethod
    def _plain_names(cls, sources: dict[str, ModelRef]) -> dict[str, ModelRef]:
        for name in sources:
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                raise ValueError(f"source name {name!r} may only hold letters, digits, '-' and '_'")
            if name in ("target", "target_before", "clm_control", "fused"):
                raise ValueError(f"source name {name!r} is taken by the report")
        return sources

    @property
    def folder(self) -> str:
        """The run's folder or URL."""
        return (self.run_dir or f"runs/{self.name}").rstrip("/")

    @property
    def data_folder(self) -> str:
        """Folder or URL of corpus, plan and source stores."""
        return (self.data_dir or self.folder).rstrip("/")

    def section(self, name: str, cls: type[Section]) -> Section:
        """The section `name`, with all defaults if the file does not have it."""
        section = self.sections.get(name)
        if section is None:
            wrong: list[str] = []
            section = _parse(cls, {}, wrong, within=f"{name}.")
            if section is None:
                raise ConfigError(f"run file refused: {'; '.join(wrong)}")
        if not isinstance(section, cls):
            raise TypeError(f"section {name} is {type(section).__name__}, not {cls.__name__}")
        return section

    def store_url(self, source: str) -> str:
        """URL of the source store of `source`."""
        return f"{self.data_folder}/stores/{source}"

    def generated_url(self, source: str) -> str:
        """URL of the store of the answers that `source` generated."""
        return f"{self.data_folder}/generated/{source}"

    def aligned_url(self, source: str) -> str:
        """URL of the aligned store of `source`, see `aligned_place`. Reads the disk if `data_dir` is
        another run's and `aligned_dir` is not given."""
        if self.aligned_dir is not None:
            return f"{self.aligned_dir.rstrip('/')}/{source}"
        if self.folder == self.data_folder:
            return f"{self.folder}/aligned/{source}"
        from store_schema.store.aligned_place import (
            aligned_store_url,  # storage libraries take time
        )

        return aligned_store_url(self, source)

    def resolved(self) -> str:
        """The whole file as YAML with every default filled in."""
        head = self.model_dump(mode="json", exclude={"sections"})
        sections = {name: model.model_dump(mode="json") for name, model in self.sections.items()}
        return yaml.safe_dump(head | sections, sort_keys=False, allow_unicode=True)


@cache
def section_models() -> dict[str, type[SectionModel]]:
    """Every registered section's model, by name."""
    points = sorted(entry_points(group=SECTION_GROUP), key=lambda point: point.name)
    return {point.name: point.load() for point in points}


def load_run(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read and check the whole run file.

    Args:
        path: YAML file.
        overrides: "key.path=value" pairs that replace values of the file; the value is YAML.

    Raises:
        ConfigError: The file is missing, is not YAML, or any key or value is wrong.
    """
    raw = read_yaml(Path(path), "run file")
    for override in overrides:
        apply_override(raw, override)
    return parse_run(raw, where=path)


def parse_run(raw: dict[str, Any], *, where: object) -> RunConfig:
    """Check the content of a run file.

    Args:
        raw: Keys and values.
        where: The file, for messages.

    Raises:
        ConfigError: Any key or value is wrong.
    """
    raw = _with_preset(raw)
    if isinstance(raw.get("sources"), dict):
        raw["sources"] = {n: _source(ref, raw.get("target")) for n, ref in raw["sources"].items()}
    models = section_models()
    head = {key: value for key, value in raw.items() if key not in models}
    if "sections" in head:
        raise ConfigError("unknown key", where=where, got="sections")
    wrong: list[str] = []
    parsed = _parse(RunConfig, head, wrong, more=models)
    sections = {
        name: _parse(model, {} if raw.get(name) is None else raw[name], wrong, within=f"{name}.")
        for name, model in models.items()
    }
    if parsed is None or wrong:
        raise ConfigError(f"run file refused in {where}: {'; '.join(wrong)}")
    return parsed.model_copy(update={"sections": sections})


def _with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The file's values, with those of its preset as defaults."""
    if raw.get("preset") is None:
        return raw
    preset: dict[str, Any] = yaml.safe_load(preset_text(raw["preset"]))
    both = _over(preset, raw)
    if isinstance(both.get("sources"), dict):
        removed = {n for n in preset.get("sources", {}) if both["sources"][n] is None}
        both["sources"] = {n: ref for n, ref in both["sources"].items() if n not in removed}
    return both


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; values and order of `above` come first."""
    both = dict(above)
    for key, value in below.items():
        if key not in above:
            both[key] = value
        elif isinstance(value, dict) and isinstance(above[key], dict):
            both[key] = _over(value, above[key])
    return both


def _source(ref: Any, target: Any) -> Any:
    """A source of the file, with the target's model in place of the word `target`; without a target
    that is missing, and nothing else."""
    if ref == "target":
        return {"model": "target"} if target is None else target
    return ref


Parsed = TypeVar("Parsed", bound=StrictModel)


def _parse(
    cls: type[Parsed], raw: Any, wrong: list[str], *, within: str = "", more: Iterable[str] = ()
) -> Parsed | None:
    """Check a part of the file; None, and a line in `wrong`, where it is refused."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        wrong.append(validation_line(error, cls, within=within, more=more))
        return None
