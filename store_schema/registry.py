"""Registries: tables of selectors, engines, methods and so on, which a run file chooses by name.

A registry maps names to "module:Class". The class (a `Kind`) has the name's meaning, its options in the
run file, and what the rest of the program must know of it. Its module imports no heavy packages at the
top, only inside methods, so that a run file is read quickly.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, create_model

from store_schema.config import StrictModel


class Kind:
    """An item of a registry. The first paragraph of its docstring is its description for users."""

    section: ClassVar[Any] = None
    """Type of its options in the run file, such as a pydantic model; None without options."""
    section_at: ClassVar[str | None] = None
    """Field of the options, if it is not named like the kind."""
    always_in_fingerprint: ClassVar[bool] = False
    """Whether its options are part of the fingerprint of runs that choose another kind too."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def field(self) -> str:
        """Field of its options in the run file."""
        return self.section_at or self.name

    @property
    def summary(self) -> str:
        """Its description in one line."""
        return " ".join((type(self).__doc__ or "").partition("\n\n")[0].split()).rstrip(".")

    def default_options(self) -> Any:
        """Its options if the run file has none."""
        return None if self.section is None else self.section()


K = TypeVar("K", bound=Kind)
M = TypeVar("M", bound=StrictModel)


class Registry(Generic[K]):
    """Kinds by name.

    Args:
        what: What one of them is called in messages ("selector").
        base: Base class of all.
        table: "module:Class" by name.
    """

    def __init__(self, what: str, base: type[K], table: dict[str, str]) -> None:
        self.what, self._base, self.table = what, base, table

    def __iter__(self) -> Iterator[K]:
        return (self[name] for name in self.table)

    def __getitem__(self, name: str) -> K:
        """The kind of that name.

        Raises:
            KeyError: No such name.
        """
        place = self.table[name]
        module, _, attribute = place.partition(":")
        try:
            found = getattr(import_module(module), attribute)
        except Exception as error:
            error.add_note(f"{self.what} {name} is listed as {place}")
            raise
        if not (isinstance(found, type) and issubclass(found, self._base)):
            raise TypeError(f"{self.what} {name} is no {self._base.__name__}: {place}")
        return found(name)

    def names(self) -> tuple[str, ...]:
        """All names, in the table's order."""
        return tuple(self.table)

    @property
    def choice(self) -> AfterValidator:
        """Validator for a field of the run file whose value is one of the names."""
        return self.choice_or()

    def choice_or(self, *more: str) -> AfterValidator:
        """The same for a field that may have one of `more` too."""

        def known(name: str) -> str:
            if name not in (*more, *self.table):
                *most, last = map(repr, (*more, *self.table))
                raise ValueError(f"Input should be {', '.join(most)} or {last}")
            return name

        return AfterValidator(known)

    def fields(self) -> tuple[str, ...]:
        """All fields with options of kinds, each once."""
        return tuple(dict.fromkeys(kind.field for kind in self if kind.section is not None))

    def with_options(self, base: type[M]) -> type[M]:
        """A subclass of `base` with a field for the options of each kind that has options."""
        added: dict[str, Any] = {}
        for kind in self:
            if kind.section is not None:
                if kind.field in base.model_fields:
                    raise TypeError(
                        f"{self.what} {kind.name}: its options would be {kind.field}, which is an "
                        "option of the section already; give it another name or field"
                    )
                added.setdefault(kind.field, (kind.section, kind.default_options()))
        made = create_model(f"{base.__name__}WithOptions", __base__=base, **added)
        return made

    def left_out(self, chosen: str) -> set[str]:
        """Fields that are no part of a fingerprint: options of kinds other than `chosen`.

        So adding a kind changes no fingerprint of runs that do not choose it.
        """
        kept = {k.field for k in self if k.always_in_fingerprint or k.name == chosen}
        return set(self.fields()) - kept

    def markdown(self) -> str:
        """A Markdown table of names and descriptions."""
        rows = "\n".join(f"| `{kind.name}` | {kind.summary} |" for kind in self)
        return f"| {self.what} | |\n|---|---|\n{rows}\n"
