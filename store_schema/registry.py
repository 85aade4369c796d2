"""Registries: tables of things that a run file chooses by name, each in one file of its own.

A registry lists `name: "module:Class"`. The class is a light record (`Kind`): what the name means, its
options in the run file, what the rest of the program must know. It loads without heavy packages, and
imports what it needs where it does its work, so that a run file is read in a moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, create_model

from store_schema.config import StrictModel


class Kind:
    """One thing that a registry has. The first paragraph of its docstring is what people read of it."""

    section: ClassVar[Any] = None
    """Type of its options in the run file, such as a pydantic model; None where it has none."""
    section_at: ClassVar[str | None] = None
    """Field of the options; None is its own name."""
    always_in_fingerprint: ClassVar[bool] = False
    """Whether its options are part of the fingerprint of runs that choose another kind."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def field(self) -> str:
        """Field of its options in the run file."""
        return self.section_at or self.name

    @property
    def says(self) -> str:
        """What it is, in one line."""
        return " ".join((type(self).__doc__ or "").partition("\n\n")[0].split()).rstrip(".")

    def default_options(self) -> Any:
        """Its options where the run file gives none."""
        return None if self.section is None else self.section()


K = TypeVar("K", bound=Kind)
M = TypeVar("M", bound=StrictModel)


class Registry(Generic[K]):
    """Kinds by name.

    Args:
        what: One of them, for messages ("selector").
        base: What all of them are.
        table: Where each is, "module:Class".
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
        module, _, attribute = self.table[name].partition(":")
        kind = getattr(import_module(module), attribute)(name)
        if not isinstance(kind, self._base):
            raise TypeError(f"{self.what} {name} is no {self._base.__name__}")
        return kind

    def names(self) -> tuple[str, ...]:
        """All names, in the table's order."""
        return tuple(self.table)

    @property
    def choice(self) -> AfterValidator:
        """For a field of the run file that holds one of the names."""
        return self.choice_or()

    def choice_or(self, *more: str) -> AfterValidator:
        """The same for a field that may hold other words too."""

        def known(name: str) -> str:
            if name not in (*more, *self.table):
                *most, last = map(repr, (*more, *self.table))
                raise ValueError(f"Input should be {', '.join(most)} or {last}")
            return name

        return AfterValidator(known)

    def fields(self) -> tuple[str, ...]:
        """Fields that hold options of some kind, each once."""
        return tuple(dict.fromkeys(kind.field for kind in self if kind.section is not None))

    def with_options(self, base: type[M]) -> type[M]:
        """`base` with a field for the options of each kind that has some."""
        added: dict[str, Any] = {}
        for kind in self:
            if kind.section is not None:
                added.setdefault(kind.field, (kind.section, kind.default_options()))
        made = create_model(f"{base.__name__}WithOptions", __base__=base, **added)
        return made

    def left_out(self, chosen: str) -> set[str]:
        """Fields that are not part of a fingerprint: options of kinds that nobody chose.

        So a kind that is added changes no fingerprint of runs that do not choose it.
        """
        kept = {k.field for k in self if k.always_in_fingerprint or k.name == chosen}
        return set(self.fields()) - kept

    def markdown(self) -> str:
        """Names and what they are, as a table."""
        rows = "\n".join(f"| `{kind.name}` | {kind.says} |" for kind in self)
        return f"| {self.what} | |\n|---|---|\n{rows}\n"
