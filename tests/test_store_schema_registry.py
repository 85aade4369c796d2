"""Registries: names, options, what is in a fingerprint, and that nothing else knows what they list."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError, create_model

from align.config import AlignSection
from align.methods import METHODS
from extract.config import ExtractSection
from extract.engine_kinds import ENGINES
from extract.judge_kinds import JUDGES
from fuse_train.config import TrainSection
from fuse_train.divergences import DIVERGENCES
from fuse_train.merge import MERGES
from fuse_train.selectors import SELECTORS
from store_schema.config import StrictModel
from store_schema.fingerprint import fingerprint
from store_schema.registry import Kind, Registry
from tests.wrong_values import refuses

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = (
    "store_schema",
    "launch",
    "extract",
    "align",
    "fuse_train",
    "fuse_eval",
    "store_tools",
    "first_run",
)
REGISTRIES: dict[str, Registry[Any]] = {
    "align/methods": METHODS,
    "extract/engine_kinds": ENGINES,
    "extract/judge_kinds": JUDGES,
    "fuse_train/selectors": SELECTORS,
    "fuse_train/divergences": DIVERGENCES,
    "fuse_train/merge": MERGES,
}
"""By the folder that owns all that is listed."""


class Plain(Kind):
    """A thing

    without options.
    """


class Wide(StrictModel):
    width: int = 3


class WithWidth(Kind):
    """A thing
    with a width.
    """

    section = Wide


class WithShare(Kind):
    """A number."""

    section = Annotated[float, Field(gt=0)]
    section_at = "share"
    always_in_fingerprint = True

    def default_options(self) -> float:
        return 0.5


class Other:
    def __init__(self, name: str) -> None: ...


@pytest.fixture
def things() -> Registry[Kind]:
    table = {"plain": "Plain", "wide": "WithWidth", "number": "WithShare"}
    return Registry("thing", Kind, {name: f"{__name__}:{cls}" for name, cls in table.items()})


def test_kinds_come_by_name(things: Registry[Kind]) -> None:
    assert things.names() == ("plain", "wide", "number")
    assert [kind.name for kind in things] == ["plain", "wide", "number"]
    assert isinstance(things["wide"], WithWidth)
    assert (things["wide"].field, things["number"].field) == ("wide", "share")
    with pytest.raises(KeyError):
        things["none"]
    things.table["other"] = f"{__name__}:Other"
    with pytest.raises(TypeError, match="thing other is no Kind"):
        things["other"]


def test_a_name_that_is_not_listed_is_refused_with_all_that_are(things: Registry[Kind]) -> None:
    model = create_model("M", thing=(Annotated[str, things.choice], "plain"))
    assert model.model_validate({"thing": "wide"}).model_dump() == {"thing": "wide"}
    with pytest.raises(ValidationError, match="should be 'plain', 'wide' or 'number'"):
        model.model_validate({"thing": "best"})
    model = create_model("M", thing=(Annotated[str, things.choice_or("auto")], "plain"))
    assert model.model_validate({"thing": "auto"}).model_dump() == {"thing": "auto"}
    with pytest.raises(ValidationError, match="should be 'auto', 'plain', 'wide' or 'number'"):
        model.model_validate({"thing": "best"})


def test_each_kind_has_a_field_for_its_options(things: Registry[Kind]) -> None:
    model = things.with_options(StrictModel)
    assert model().model_dump() == {"wide": {"width": 3}, "share": 0.5}
    assert things.fields() == ("wide", "share")
    for wrong in ({"share": 0}, {"wide": {"height": 1}}, {"plain": {}}):
        refuses(model, wrong)


def test_options_of_what_is_not_chosen_are_left_out_of_fingerprints(things: Registry[Kind]) -> None:
    assert things.left_out("plain") == {"wide"}
    assert things.left_out("wide") == set()


def test_a_table_for_people(things: Registry[Kind]) -> None:
    assert things.markdown() == (
        "| thing | |\n|---|---|\n| `plain` | A thing |\n"
        "| `wide` | A thing with a width |\n| `number` | A number |\n"
    )


@pytest.mark.parametrize("folder", REGISTRIES)
def test_what_is_listed_loads_without_torch(folder: str) -> None:
    modules = sorted({place.partition(":")[0] for place in REGISTRIES[folder].table.values()})
    code = f"import sys\nimport {', '.join(modules)}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"torch", "vllm", "transformers", "numba"} & set(done.stdout.split())


@pytest.mark.parametrize("folder", REGISTRIES)
def test_nobody_else_imports_what_is_listed(folder: str) -> None:
    """So to add a thing, or to take one away, is its file and its line."""
    modules = {place.partition(":")[0] for place in REGISTRIES[folder].table.values()}
    found = []
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            here = str(path.relative_to(REPOSITORY))
            if here.startswith(f"{folder}/"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module in modules:
                    found.append(f"{here}:{node.lineno} imports {node.module}")
    assert not found


GOLDEN = [
    (ExtractSection, {}, "f313b242f5a0dcce"),
    (ExtractSection, {"engine": "vllm", "top_k": 9}, "4595c31791929b2d"),
    (ExtractSection, {"engine": "transformers", "estimator": "sampled"}, "ee328bc85ac790a3"),
    (AlignSection, {}, "a219e1d16cd25fbb"),
    (AlignSection, {"method": "exact"}, "2ce42657d543b3bc"),
    (AlignSection, {"method": "stats", "statistics_tokens": 7}, "6b049791c912ae6c"),
    (AlignSection, {"continuation": "tail"}, "ca3d2db74c6e9997"),
    (TrainSection, {}, "a987fe78a1f8e55e"),
    (TrainSection, {"selector": "hedge", "hedge": {"rate": 0.7}}, "be8a3741e3949288"),
    (
        TrainSection,
        {"selector": "static", "static_weights": {"a": 1.0, "b": 2.0}},
        "9bd26a4b69f2b2c4",
    ),
    (TrainSection, {"asn": {"preset": "fusion-x"}, "feedback_weight": 0.5}, "eb6a4347eb4eca6a"),
    (TrainSection, {"selector": "constant", "asn": {"lr": 0.1}}, "06625355127f6d74"),
    (TrainSection, {"selector": "bayes", "bayes": {"trials": 5}}, "c04861587018c46d"),
    (TrainSection, {"loss": {"divergence": "jsd", "jsd_beta": 0.3}}, "4caa03ae707875aa"),
    (TrainSection, {"loss": {"divergence": "uld"}}, "c6822e474269182d"),
]


@pytest.mark.parametrize(("section", "given", "mark"), GOLDEN)
def test_a_run_file_keeps_its_fingerprint(section: Any, given: dict[str, Any], mark: str) -> None:
    """Trainings, stores and estimates that people have go on: their fields mean what they meant."""
    if section is TrainSection:  # these are from before the gate became another one
        given = {"fusion_gate": {"kind": "held_out"}} | given
    assert fingerprint(section.model_validate(given).content()).startswith(mark)


def test_the_default_gate_is_part_of_a_trainings_fingerprint() -> None:
    content = TrainSection().content()
    assert content["fusion_gate"] == {"kind": "posterior"}
    assert fingerprint(content).startswith("8708f1787e617a07")
