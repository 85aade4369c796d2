"""Costs of a study's settings: stores once, each training once, whatever settings share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from extract.config import ExtractSection, GenerateSection
from extract.estimate.costs import (
    ALIGNED_TOKENS_PER_S,
    Assumed,
    likely_bytes,
    source_cost,
    tokens_per_s,
    training_bytes,
    training_hours,
)
from extract.estimate.models import parameters_here
from fuse_eval.config import EvaluateSection
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.costs.text import TARGET, TextSize, text_size
from fuse_eval.study.grid import Cell, Data, Place, Recipe, cells_of
from fuse_eval.study.records import cell_recipes
from fuse_train.config import TrainSection
from store_schema.config import RunConfig
from store_schema.presets import StoreSection

TEXT = "text"
"""Beside the names of models among what is not known."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of work of a setting, over all its seeds.

    Args:
        name: The work.
        times: How often it is done.
        tokens: Tokens that are read or written, all times together; None where the text is not known.
        bytes: On disk at a time; None likewise.
        gpu_hours: All times together; None where the text or the model's size is not known.
    """

    name: str
    times: int
    tokens: float | None
    bytes: float | None
    gpu_hours: float | None


@dataclass(frozen=True, slots=True)
class SettingCost:
    """Costs of a setting: what other settings before it do not have already.

    Args:
        name: The setting.
        parts: Of the work.
        unknown: Models of its own data sets whose size is not known, and "text".
        cpu_hours: Of aligning, on two cores; None where the text is not known.
        basis: Where the size of the text of its own data sets is from.
    """

    name: str
    parts: tuple[Part, ...]
    unknown: tuple[str, ...]
    cpu_hours: float | None
    basis: tuple[str, ...]

    @property
    def bytes(self) -> float | None:
        """On disk."""
        return total(part.bytes for part in self.parts)

    @property
    def gpu_hours(self) -> float | None:
        """Of all parts."""
        return total(part.gpu_hours for part in self.parts)


def total(values: Iterable[float | None]) -> float | None:
    """The sum; None where a value is not known."""
    known = list(values)
    return None if None in known else float(sum(value for value in known if value is not None))


@dataclass(frozen=True, slots=True)
class _DataSet:
    """A data set and what is known of it."""

    data: Data
    text: TextSize | None
    active: Mapping[str, float | None]

    @classmethod
    def of(cls, study: StudyConfig, place: Place) -> _DataSet:
        run, expected = place.data.run, study.setting(place.setting).expected
        active: dict[str, float | None] = {}
        for name, ref in {**run.sources, TARGET: run.target}.items():
            found = parameters_here(ref)
            active[name] = expected.parameters.get(name) if found is None else found[1]
        return cls(place.data, text_size(run, study.split, expected), active)

    def tokens(self, model: str, split: str, *, read: bool = True) -> float | None:
        """Tokens of a split, with contexts or without."""
        if self.text is None:
            return None
        of = self.text.read if read else self.text.positions
        return of[model] * self.text.shares.get(split, 0.0)

    def hours(self, model: str, tokens: float | None, tflops: float) -> float | None:
        """GPU-hours in which a model reads tokens."""
        active = self.active.get(model)
        speed = tokens_per_s(None if active is None else round(active), tflops)
        return None if speed is None or tokens is None else tokens / speed / 3600


def study_costs(
    study: StudyConfig, places: Sequence[Place], assumed: Assumed
) -> tuple[SettingCost, ...]:
    """The costs of each setting, in order.

    Args:
        study: The study.
        places: The seeds of its settings, from `checked_places`.
        assumed: What costs go by.

    Raises:
        LogitfuseError: Inputs, a plan or a record that are there cannot be read.
    """
    sets: dict[str, _DataSet] = {}
    counted: set[str] = set()
    costs = []
    for name in dict.fromkeys(place.setting for place in places):
        own = [place for place in places if place.setting == name]
        fresh: dict[str, _DataSet] = {}
        for place in own:
            key = str(place.data.folder)
            if key not in sets:
                sets[key] = fresh[key] = _DataSet.of(study, place)
        costs.append(_setting(study, name, own, sets, list(fresh.values()), counted, assumed))
    return tuple(costs)


def _setting(
    study: StudyConfig,
    name: str,
    places: Sequence[Place],
    sets: Mapping[str, _DataSet],
    fresh: Sequence[_DataSet],
    counted: set[str],
    assumed: Assumed,
) -> SettingCost:
    work: list[tuple[_DataSet, Recipe]] = []
    as_is: list[tuple[_DataSet, str]] = []
    for place in places:
        data = sets[str(place.data.folder)]
        for recipe in _trainings(study, place):
            if str(recipe.folder) not in counted:
                counted.add(str(recipe.folder))
                work.append((data, recipe))
        for cell in cells_of(study, place):
            if cell.row.model is not None and str(cell.model_results) not in counted:
                counted.add(str(cell.model_results))
                as_is.append((data, _model_name(cell)))
    aligned = _aligned_tokens(fresh, work)
    parts = [*_stores(fresh, assumed), _align(aligned)] if fresh or aligned else []
    asked = [(data, TARGET) for data, _ in work] + as_is
    parts += [_train(study, work, assumed), _score(study, asked, assumed)]
    if study.setting(name).answers:
        parts.append(_answers(asked, assumed))
    unknown = [model for data in fresh for model, size in data.active.items() if size is None]
    unknown += [TEXT for data in fresh if data.text is None]
    tokens = total(tokens for tokens, _ in aligned.values())
    return SettingCost(
        name,
        tuple(parts),
        tuple(dict.fromkeys(unknown)),
        None if tokens is None else tokens / ALIGNED_TOKENS_PER_S / 3600,
        tuple(dict.fromkeys(data.text.basis for data in fresh if data.text is not None)),
    )


def _trainings(study: StudyConfig, place: Place) -> Iterator[Recipe]:
    """All trainings of a seed; of a row that is tuned as another the best recipe, or, until that is
    known, the one that reads most."""
    cells = cells_of(study, place)
    by_name = {cell.name: cell for cell in cells}
    for cell in cells:
        if cell.row.model is not None:
            continue
        recipes = cell_recipes(cell, by_name.get(cell.row.tuned_as or ""))
        if recipes is None:
            every = map(cell.recipe, study.setting(place.setting).tune)
            recipes = (max(every, key=lambda recipe: _passes(_section(recipe))),)
        yield from recipes


def _section(recipe: Recipe) -> TrainSection:
    return recipe.run.section("train", TrainSection)


def _passes(section: TrainSection) -> float:
    """Over the training split; of a stage over all of it, though a corpus may be left out."""
    passes = sum(s.epochs for s in section.stages) if section.stages else section.epochs
    return passes * section.text_share


def _model_name(cell: Cell) -> str:
    model = str(cell.row.model)
    return model if model in cell.place.data.run.sources else TARGET


def _stores(fresh: Sequence[_DataSet], assumed: Assumed) -> Iterator[Part]:
    """Corpus and plan, and each source's extraction."""
    sizes = [None if data.text is None else 2 * data.text.num_bytes for data in fresh]
    if fresh:
        yield Part("corpus and plan", len(fresh), None, total(sizes), 0.0)
    for source in dict.fromkeys(name for data in fresh for name in data.data.run.sources):
        found = []
        for data in fresh:
            run, text, active = data.data.run, data.text, data.active.get(source)
            if source in run.sources and text is not None:
                found.append(
                    source_cost(
                        source,
                        (text.positions[source], text.read[source]),
                        None if active is None else round(active),
                        entries=run.section("extract", ExtractSection).max_entries,
                        preset=run.section("store", StoreSection).preset,
                        tflops=assumed.tflops,
                    )
                )
        times = sum(source in data.data.run.sources for data in fresh)
        known = len(found) == times
        yield Part(
            f"extract {source}",
            times,
            sum(one.tokens_read for one in found) if known else None,
            sum(one.bytes for one in found) if known else None,
            total(one.gpu_hours for one in found) if known else None,
        )


def _aligned_tokens(
    fresh: Sequence[_DataSet], work: Sequence[tuple[_DataSet, Recipe]]
) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """Tokens and bytes of each aligned store, by folder and source."""
    found = {
        (data.data.run.folder, source): _aligned(data, data.data.run)
        for data in fresh
        for source in data.data.run.sources
    }
    for data, recipe in work:
        if recipe.run.aligned_dir is not None:
            for source in recipe.run.sources:
                found[recipe.run.aligned_dir, source] = _aligned(data, recipe.run)
    return found


def _aligned(data: _DataSet, run: RunConfig) -> tuple[float | None, float | None]:
    if data.text is None:
        return None, None
    kept = int(run.sections["align"].content()["max_entries"])
    entries = min(kept, run.section("extract", ExtractSection).max_entries)
    tokens = data.text.positions[TARGET]
    return tokens, likely_bytes(tokens, entries, run.section("store", StoreSection).preset)


def _align(found: Mapping[tuple[str, str], tuple[float | None, float | None]]) -> Part:
    return Part(
        "align",
        len(found),
        total(tokens for tokens, _ in found.values()),
        total(size for _, size in found.values()),
        0.0,
    )


def _train(study: StudyConfig, work: Sequence[tuple[_DataSet, Recipe]], assumed: Assumed) -> Part:
    tokens: list[float | None] = []
    hours: list[float | None] = []
    sizes: list[float | None] = []
    for data, recipe in work:
        section, active = _section(recipe), data.active[TARGET]
        models = 1 if section.pairwise is None else len(recipe.run.sources) - 1
        read = _training_tokens(data, section)
        read = None if read is None else read * models
        tokens.append(read)
        sizes.append(
            None
            if active is None
            else models * training_bytes(round(active), section.save_total_limit)
        )
        hours.append(
            None
            if read is None or active is None
            else training_hours(
                round(active), read, assumed.tflops, recompute=section.gradient_checkpointing
            )
        )
    at_a_time = min(study.submit.workers, len(work))
    largest = None if None in sizes else max((size or 0.0 for size in sizes), default=0.0)
    return Part(
        "train",
        len(work),
        total(tokens),
        None if largest is None else at_a_time * largest,
        total(hours),
    )


def _training_tokens(data: _DataSet, section: TrainSection) -> float | None:
    """Tokens that a training reads."""
    one = data.tokens(TARGET, section.train_split)
    if one is None or data.text is None:
        return None
    if section.max_steps is not None:
        return section.max_steps * section.batch_segments * data.text.segment_tokens
    return one * _passes(section)


def _score(study: StudyConfig, asked: Sequence[tuple[_DataSet, str]], assumed: Assumed) -> Part:
    tokens = [data.tokens(model, study.split) for data, model in asked]
    hours = [
        data.hours(model, read, assumed.tflops)
        for (data, model), read in zip(asked, tokens, strict=True)
    ]
    return Part("score", len(asked), total(tokens), 0.0, total(hours))


def _answers(asked: Sequence[tuple[_DataSet, str]], assumed: Assumed) -> Part:
    """Every prompt answered at full length."""
    tokens: list[float | None] = []
    for data, _ in asked:
        run = data.data.run
        most = run.section("evaluate", EvaluateSection).answers.max_tokens
        most = most or run.section("generate", GenerateSection).max_tokens
        known = data.text is not None and data.text.prompts is not None
        tokens.append(data.text.prompts * most if known else None)  # type: ignore[union-attr,operator]
    hours = [
        data.hours(model, written, assumed.tflops)
        for (data, model), written in zip(asked, tokens, strict=True)
    ]
    return Part("answers", len(asked), total(tokens), 0.0, total(hours))
