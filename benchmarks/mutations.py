"""Mutants of a module, made by cosmic-ray in an environment of its own.

mutmut, the other tool that is kept up, leaves out decorated functions: here those are what Numba
compiles, so nearly all that counts. cosmic-ray parses whole modules. Only its operators are used: its
sessions take every mutant, and know no limit but one by the clock, which kills living mutants on a busy
machine.

A *site* is what one kind of operator may change at one place: a comparison, a number, a loop. Kept are
those that exchange like for like (`+` and `-`, `<` and `<=`) or for the opposite; `+` for `<<` dies of
any test. Left out is what changes no value: annotations, decorators (they compile, cache or freeze) and
what is imported for types alone.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.environments import environment

PACKAGE, VERSION, MODULE = "cosmic-ray", "8.7.0", "cosmic_ray"

OPERATORS = re.compile(
    r"core/(?:"
    r"ReplaceBinaryOperator_(?:Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul"
    r"|RShift_LShift|LShift_RShift|BitOr_BitAnd|BitAnd_BitOr|BitXor_BitAnd)"
    r"|ReplaceComparisonOperator_(?:Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt"
    r"|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt)"
    r"|ReplaceUnaryOperator_Delete_(?:USub|Not|Invert)"
    r"|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd"
    r"|ReplaceBreakWithContinue|ReplaceContinueWithBreak|ExceptionReplacer|NumberReplacer"
    r"|ZeroIterationForLoop)"
)

_LIST = """
import json, re, sys
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.plugins import get_operator, operator_names
asked = json.load(sys.stdin)
names = [name for name in operator_names() if re.fullmatch(asked["operators"], name)]
found = {}
for module, code in asked["modules"].items():
    nodes = list(ast_nodes(get_ast(code)))
    found[module] = [
        [name, number, start, stop]
        for name in names
        for number, (start, stop) in enumerate(
            place for node in nodes for place in get_operator(name)().mutation_positions(node))
    ]
print(json.dumps(found))
"""
_MAKE = """
import json, sys
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
asked = json.load(sys.stdin)
print(json.dumps([
    mutate_code(asked["modules"][module], get_operator(name)(), number)
    for module, name, number in asked["mutants"]
]))
"""
_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module with one change.

    Args:
        module: Its path in the repository.
        operator: What was changed, by cosmic-ray's name without "core/".
        line: Line of the change, from 1.
        code: The whole module as changed.
    """

    module: str
    operator: str
    line: int
    code: str


@dataclass(frozen=True, slots=True)
class _Change:
    """What cosmic-ray calls a mutation, `number` being that among those of its operator."""

    operator: str
    number: int
    start: tuple[int, int]
    stop: tuple[int, int]

    @property
    def site(self) -> tuple[str, tuple[int, int]]:
        return self.operator.split("_")[0], self.start


def sample(codes: Mapping[str, str], count: int, seed: int) -> list[Mutant]:
    """So many mutants of each module, of as many sites, drawn with a seed; all of its sites where there
    are no more.

    Args:
        codes: Text of each module, by path.
        count: Of each.
        seed: Another one draws others. A module's mutants do not depend on the other modules.

    Raises:
        UnavailableError: cosmic-ray cannot be had here; says why.
        CalledProcessError: It failed.
    """
    found = _ask(_LIST, {"operators": OPERATORS.pattern, "modules": dict(codes)})
    chosen = [
        (module, change)
        for module, code in codes.items()
        for change in _drawn(code, found[module], count, random.Random(f"{seed} {module}"))
    ]
    made = _ask(
        _MAKE,
        {
            "modules": dict(codes),
            "mutants": [(module, f"core/{c.operator}", c.number) for module, c in chosen],
        },
    )
    return [
        Mutant(module, change.operator, change.start[0], code)
        for (module, change), code in zip(chosen, made, strict=True)
    ]


def _drawn(code: str, rows: Sequence[Any], count: int, drawn: random.Random) -> list[_Change]:
    """Changes of so many sites of a module, in the order of their lines."""
    sites: defaultdict[Any, list[_Change]] = defaultdict(list)
    without = list(_without_values(code))
    for name, number, start, stop in rows:
        change = _Change(name.removeprefix("core/"), number, tuple(start), tuple(stop))
        if not any(a <= change.start and change.stop <= b for a, b in without):
            sites[change.site].append(change)
    taken = drawn.sample(sorted(sites), min(count, len(sites)))
    return sorted((drawn.choice(sites[site]) for site in taken), key=lambda c: (c.start, c.number))


def _without_values(code: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last place of each annotation, decorator and question whether types are checked, and
    of what stands before the first argument that needs its name: a `*` that multiplies nothing."""
    for node in ast.walk(ast.parse(code)):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwonlyargs:
            given, first = node.args, node.args.kwonlyargs[0]
            before: list[ast.arg | ast.expr] = [*given.posonlyargs, *given.args, *given.defaults]
            ends = [(each.end_lineno or 0, each.end_col_offset or 0) for each in before]
            yield max([(node.lineno, node.col_offset), *ends]), (first.lineno, first.col_offset)
        if isinstance(node, ast.arg | ast.AnnAssign):
            found = [node.annotation]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found = [node.returns, *node.decorator_list]
        elif isinstance(node, ast.ClassDef):
            found = [*node.decorator_list]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found = [node.test]
        for each in found:
            if each is not None:
                last = (each.end_lineno or each.lineno, each.end_col_offset or 0)
                yield (each.lineno, each.col_offset), last


def _ask(script: str, question: Mapping[str, Any]) -> Any:
    python = environment(PACKAGE, VERSION, MODULE)
    done = subprocess.run(
        [str(python), "-c", script], input=json.dumps(question), text=True, check=True,
        stdout=subprocess.PIPE, timeout=_SECONDS, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    return json.loads(done.stdout)
