"""The model card of a merged model: its inputs and its recipe."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import yaml

from fuse_train.merge.inputs import Inputs
from fuse_train.merge.recipe import MergeSettings

_PACKAGES = ("logitfuse", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of the packages that the result depends on, by name."""
    return {name: version(name) for name in _PACKAGES}


def merge_card(title: str, recipe: MergeSettings, inputs: Inputs, packages: dict[str, str]) -> str:
    """README.md of the folder.

    Args:
        title: Name of the folder.
        recipe: Method and options.
        inputs: The models.
        packages: Versions by name.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": list(dict.fromkeys(model.name for model in inputs.all)),
        "base_model_relation": "merge",
        "tags": ["logitfuse", "merge"],
    }
    kind = recipe.kind
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}: merged by {kind.name}",
        f"{kind.summary} ({kind.paper}). Config and tokenizer are those of `{inputs.kept.name}`.",
        "## Models\n\n" + _models(recipe, inputs),
        "## Recipe\n\n```yaml\n" + _yaml(recipe_record(recipe, inputs)) + "```",
        _how_to_load(),
        "Made with " + ", ".join(f"{name} {number}" for name, number in packages.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def recipe_record(recipe: MergeSettings, inputs: Inputs) -> dict[str, Any]:
    """The recipe with models and defaults filled in, in the form of a run file's merge section."""
    record: dict[str, Any] = {}
    if inputs.base is not None:
        record["base"] = inputs.base.name
    record["models"] = [model.name for model in inputs.models]
    record |= recipe.content()
    if recipe.kind.weighted:
        record["weights"] = list(recipe.weights_of(len(inputs.models)))
    return record


def _models(recipe: MergeSettings, inputs: Inputs) -> str:
    rows = ["| model | weight | fingerprint |", "|---|---|---|"]
    weights = recipe.weights_of(len(inputs.models))
    if inputs.base is not None:
        rows.append(f"| {_cell(inputs.base.name)} | base | `{inputs.base.fingerprint}` |")
    for model, weight in zip(inputs.models, weights, strict=True):
        shown = f"{weight:g}" if recipe.kind.weighted else "the method's"
        rows.append(f"| {_cell(model.name)} | {shown} | `{model.fingerprint}` |")
    for name, fields in inputs.differences.items():
        rows.append(f"\nConfig of `{name}` differs in {', '.join(fields)}.")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return "`" + " ".join(text.replace("|", "\\|").split()) + "`"


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _how_to_load() -> str:
    return (
        "## Load\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n```'
    )
