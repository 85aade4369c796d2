"""The configuration reference, made from the models that read a run file."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from align.methods import METHODS
from extract.judge_kinds import JUDGES
from extract.judge_kinds.kind import JudgeOptions
from fuse_train.divergences import DIVERGENCES
from fuse_train.merge import MERGES
from fuse_train.selectors import SELECTORS
from store_schema.config import RunConfig, section_models
from store_schema.paths import PathText

SECTIONS = (
    *("store", "corpus", "plan", "extract", "generate", "judge"),
    *("align", "train", "evaluate", "launch"),
)
"""In the order of a run."""

PLAIN = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "any value"}

UNITS = {
    "tokens_per_s": "tokens/s",
    "mib": "MiB",
    "gib": "GiB",
    "seconds": "s",
    "tokens": "tokens",
    "segments": "segments",
    "shards": "shards",
    "steps": "steps",
    "rows": "rows",
    "batches": "batches",
    "entries": "entries",
    "epochs": "passes",
}
"""By the end of a field's name."""

LONGEST_DEFAULT = 60
"""Characters; a longer default is a mapping or a list that has its own fields here."""


@dataclass(frozen=True)
class Part:
    """A model and its place in the run file, such as `train.loss` or `corpus.inputs[]`."""

    place: str
    model: type[BaseModel]
    heading: str


def reference() -> str:
    """Markdown: a chapter for the head of the run file and one for each section."""
    sections = section_models()
    assert set(SECTIONS) == set(sections), "a section is missing in SECTIONS"
    parts = [*_parts("", RunConfig, "Head")]
    for name in SECTIONS:
        parts += _parts(name, sections[name], f"`{name}`")
    return "\n".join(map(_chapter, parts))


def documented_fields() -> dict[str, str]:
    """Every field of the reference, by its place in the run file, with its docstring."""
    sections = section_models()
    parts = (p for name in SECTIONS for p in _parts(name, sections[name], ""))
    return {
        _join(part.place, name): text for part in parts for name, text in _texts(part.model).items()
    }


def _parts(place: str, model: type[BaseModel], heading: str, depth: int = 2) -> Iterator[Part]:
    """A model, then the models of its fields."""
    yield Part(place, model, f"{'#' * depth} {heading}")
    for name, info in model.model_fields.items():
        inner = _inner_model(info.annotation)
        if inner is None or name == "sections":
            continue
        below = _join(place, name) + _brackets(info.annotation)
        if issubclass(inner, JudgeOptions):
            if place == "judge":
                for kind in JUDGES:
                    title = f"`{below}` of kind `{kind.name}`"
                    yield Part(f"{below}.{kind.name}", kind.section, f"### {title}")
            continue
        if (place, name) != ("", "target"):  # like a source
            yield from _parts(below, inner, f"`{below}`", 3)


def _chapter(part: Part) -> str:
    texts, lines = _texts(part.model), [part.heading, "", _prose(_summary(part.model)), ""]
    for name, info in part.model.model_fields.items():
        if not part.place and name == "sections":
            continue
        lines += [
            f"`{name}` {{ #{_join(part.place, name)} }}",
            f":   {_facts(name, info)}  ",
            textwrap.indent(_prose(texts[name]), "    "),
            "",
        ]
    return "\n".join(lines)


def _facts(name: str, info: FieldInfo) -> str:
    """Type, limits, unit and default."""
    words = [type_text(info.annotation, tuple(info.metadata))]
    unit = next((u for end, u in UNITS.items() if re.search(rf"(^|_){end}$", name)), None)
    if unit is not None and _is_number(info.annotation):
        words.append(unit)
    default = "required" if info.is_required() else f"default {_default(info)}"
    return f"*{', '.join(words)}* · {default}"


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see its fields"
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    text = text.removesuffix("\n...\n").strip()
    return f"`{text}`" if len(text) <= LONGEST_DEFAULT else f"`{text[: LONGEST_DEFAULT - 3]}...`"


def type_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in words of YAML, with its limits."""
    if annotation == PathText:
        return "path or URL"
    names = _registry_names(metadata)
    if names:
        return " or ".join(f"`{name}`" for name in names)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = tuple(
            m for a in arguments[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])
        )
        return type_text(arguments[0], (*inner, *metadata))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        texts = [type_text(a, metadata) for a in arguments if a is not NoneType]
        return " or ".join([*texts, *["null"] * (NoneType in arguments)])
    if origin is tuple:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    return ", ".join(
        [PLAIN.get(annotation, getattr(annotation, "__name__", "")), *_limits(metadata)]
    )


def _limits(metadata: tuple[Any, ...]) -> Iterator[str]:
    limits: dict[Any, tuple[str, str]] = {
        Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt"),
    }  # fmt: skip
    for item in metadata:
        if type(item) in limits:
            sign, attribute = limits[type(item)]
            yield f"{sign} {getattr(item, attribute):,}"
        elif isinstance(item, MinLen):
            yield "not empty"


def _registry_names(metadata: tuple[Any, ...]) -> tuple[str, ...]:
    """Names that a registry's validator accepts."""
    for item in metadata:
        if isinstance(item, AfterValidator):
            seen = inspect.getclosurevars(item.func).nonlocals
            if "self" in seen and "more" in seen:
                return (*seen["more"], *seen["self"].table)
    return ()


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_is_number, get_args(annotation)))


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's values are, or their items."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    found = (_inner_model(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _brackets(annotation: Any) -> str:
    """How an item of a list or mapping is written."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return next((_brackets(a) for a in arguments if a is not NoneType), "")
    return {tuple: "[]", dict: ".NAME"}.get(origin, "")


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _summary(model: type[BaseModel] | None) -> str:
    """A model's own docstring."""
    return inspect.cleandoc((model.__doc__ or "") if model else "")


def _texts(model: type[BaseModel]) -> dict[str, str]:
    """What there is to say of each field; options of a registry's kind have what the kind does."""
    texts = _docstrings(model)
    for registry in (METHODS, SELECTORS, DIVERGENCES, MERGES):
        for kind in registry:
            if kind.section is not None and kind.field in model.model_fields:
                text = f"Options of {registry.what} `{kind.name}`. {kind.summary}."
                texts.setdefault(kind.field, text)
    return {name: texts.get(name, "") for name in model.model_fields}


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string behind each field of a class and of those it is made from."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError):  # made by create_model: the fields' types have the docstrings
            continue
        body = tree.body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _prose(text: str) -> str:
    """A docstring as Markdown: no tags, pages of the docs as links, None as YAML has it."""
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [
        re.sub(
            r"\bNone\b", "null", p.replace("<", "&lt;").replace("*", r"\*").replace("__", r"\_\_")
        )
        for p in pieces[::2]
    ]
    return re.sub(r"\bdocs/(\w+)\.md\b", r"[\1](../\1.md)", "".join(pieces))
