"""What `logitfuse init` is asked for, from options or from questions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from store_schema.config import ModelRef, parse_run
from store_schema.errors import ConfigError
from store_schema.paths import written_path
from store_schema.presets import Preset

FILE_NAME = "run.yaml"
_ENDINGS = (".yaml", ".yml")
_TAKEN = ("target", "target_before", "clm_control", "fused")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for.

    Args:
        file: The run file to write.
        name: Name of the run.
        run_dir: Folder or URL of its outputs.
        sources: Models whose distributions are fused, by name.
        target: Model that is trained.
        data: Files, globs and folders of text.
        preset: Preset of the stores.
    """

    file: Path
    name: str
    run_dir: str
    sources: dict[str, ModelRef]
    target: ModelRef
    data: tuple[str, ...]
    preset: Preset = "fine"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the run file goes.

    Args:
        file: The run file.
        name: Name of the run.
        run_dir: Folder or URL of its outputs.
    """

    file: Path
    name: str
    run_dir: str

    @classmethod
    def of(cls, text: str, run_dir: str | None) -> Place:
        """The place for a folder, which then also is the run's, or for a file.

        Raises:
            ConfigError: There is a run file already, or no name can be made from the path.
        """
        path = Path(os.path.expanduser(text))
        is_file = path.suffix.lower() in _ENDINGS
        if path.is_file() and not is_file:
            raise ConfigError(
                "not a folder and not a YAML file",
                where="init",
                expected="a folder, or a file that ends in .yaml",
                got=text,
            )
        file = path if is_file else path / FILE_NAME
        if file.exists():
            raise ConfigError(
                "there is a run file already, which stays as it is",
                where=file,
                hint="give another folder or file name, or remove it",
            )
        base = path.stem if is_file else path.absolute().name
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", base).lstrip(".-") or "run"
        own = f"runs/{name}" if is_file else str(path)
        return cls(file, name, run_dir or own)


def model_ref(text: str) -> ModelRef:
    """A model from the command line or an answer: a folder, a GGUF file or a hub name."""
    return ModelRef(model=written_path(os.path.expanduser(text.strip())))


def named_models(texts: Iterable[str], target: ModelRef) -> dict[str, ModelRef]:
    """Sources from "NAME=MODEL" or "MODEL" each; a name is then made from the model's.

    Args:
        texts: The sources; the model `target` is the target before training.
        target: The target.

    Raises:
        ConfigError: Two have one name, or one has no model.
    """
    models: dict[str, ModelRef] = {}
    for text in texts:
        name, equals, model = text.partition("=")
        if not equals:
            name, model = _name_for(text, models), text
        if not model.strip() or not name.strip():
            raise ConfigError("source refused", where="--source", expected="NAME=MODEL", got=text)
        if name in models:
            raise ConfigError("two sources of one name", where="--source", got=name)
        models[name.strip()] = target if model.strip() == "target" else model_ref(model)
    return models


def _name_for(model: str, taken: Iterable[str]) -> str:
    """A source's name for a model: the last part of its path, in letters, digits, '-' and '_'."""
    last = re.sub(r"\.gguf$", "", model.rstrip("/").rsplit("/", 1)[-1])
    base = re.sub(r"[^a-z0-9_-]+", "-", last.lower()).strip("-") or "source"
    names = [base, *(f"{base}-{number}" for number in range(2, 100))]
    return next(name for name in names if name not in {*taken, *_TAKEN})


def complete(
    place: Place,
    sources: Sequence[str],
    target: str | None,
    data: Sequence[str],
    *,
    asks: bool,
    preset: Preset = "fine",
) -> Wanted:
    """All that is needed, with questions for what was not given.

    Args:
        place: Where the run file goes.
        sources: Of the command line.
        target: Of the command line.
        data: Of the command line.
        asks: Whether to ask; else what is missing is an error.
        preset: Preset of the stores.

    Raises:
        ConfigError: Something is missing and not answered, or a name is refused.
    """
    if target is None:
        target = _answer("target: the model to train (folder or hub name)", "--target", asks)
    trained = model_ref(target)
    if not sources:
        sources = _answers("source", "a model to fuse, [NAME=]MODEL", "--source", asks)
    named = named_models(sources, trained)
    if not data:
        data = _answers("data", "a file, folder or glob of text or chats", "--data", asks)
    wanted = Wanted(place.file, place.name, place.run_dir, named, trained, tuple(data), preset)
    refs = {n: ref.model_dump(mode="json") for n, ref in named.items()}
    parse_run(
        {"name": wanted.name, "sources": refs, "target": trained.model_dump(mode="json")},
        where="command line",
    )
    return wanted


def _answer(question: str, option: str, asks: bool) -> str:
    """One answer, which must not be empty."""
    return _asked(partial(click.prompt, question, err=True), option, asks).strip()


def _answers(what: str, meaning: str, option: str, asks: bool) -> list[str]:
    """One answer or more; an empty one ends the list."""
    first = _answer(f"{what} 1: {meaning}", option, asks)
    answers = [first]
    while True:
        question = f"{what} {len(answers) + 1} (empty: no more)"
        ask = partial(click.prompt, question, default="", show_default=False, err=True)
        more = _asked(ask, option, asks).strip()
        if not more:
            return answers
        answers.append(more)


def _asked(ask: Callable[[], str], option: str, asks: bool) -> str:
    if asks:
        try:
            return ask()
        except click.Abort as error:
            click.echo(err=True)  # the question's line has no end
            raise _missing(option) from error
    raise _missing(option)


def _missing(option: str) -> ConfigError:
    meant = {"--target": "the model to train", "--source": "a model to fuse", "--data": "text"}
    return ConfigError(
        f"no {option.lstrip('-')} given",
        where="init",
        expected=f"{option}, {meant[option]}",
        hint="on a terminal without --yes it is asked for",
    )
