"""mergekit's own merges, from an environment of its own, to be held beside ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.environments import environment, run_python

VERSION = "0.1.5"
_MERGE = """
import json, sys, torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
torch.set_num_threads(1)
for config, out in json.load(sys.stdin):
    torch.manual_seed(0)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), out, options)
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One merge as both do it.

    Args:
        method: By both names.
        weights: One for each model; None where the method takes none.
        options: Ours.
        theirs: mergekit's for the same.
        with_base: Whether models are merged onto a base.
        num_models: How many are merged.
    """

    method: str
    weights: tuple[float, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    with_base: bool = True
    num_models: int = 3

    def config(self, base: Path, models: Sequence[Path]) -> dict[str, Any]:
        """mergekit's file, as an object."""
        weights = self.weights or (None,) * len(models)
        entries = [
            {"model": str(model)} | ({} if w is None else {"parameters": {"weight": w}})
            for model, w in zip(models, weights, strict=True)
        ]
        found = {
            "merge_method": self.method,
            "models": entries,
            "parameters": self.theirs,
            "dtype": "float32",
        }
        if self.with_base:
            return found | {"base_model": str(base)}
        return found | ({"base_model": str(models[0])} if self.method == "slerp" else {})

    def words(self, base: Path, models: Sequence[Path]) -> list[str]:
        """Ours, behind `logitfuse merge OUT`."""
        found = ["--method", self.method]
        if self.with_base:
            found += ["--base", str(base)]
        if self.weights is not None:
            found += ["--weights", ",".join(map(str, self.weights))]
        for key, value in self.options.items():
            found += ["--option", f"{key}={json.dumps(value)}"]
        return [*found, *map(str, models)]


WEIGHTS = (0.5, 0.3, 0.4)
CASES = {
    "linear": Case("linear", WEIGHTS, with_base=False),
    "linear, sum": Case(
        "linear", WEIGHTS, {"normalize": False}, {"normalize": False}, with_base=False
    ),
    "slerp": Case("slerp", None, {"t": 0.3}, {"t": 0.3}, with_base=False, num_models=2),
    "task_arithmetic": Case("task_arithmetic", WEIGHTS, {"scale": 0.7}, {"lambda": 0.7}),
    "task_arithmetic, mean": Case(
        "task_arithmetic", WEIGHTS, {"normalize": True}, {"normalize": True}
    ),
    "ties": Case("ties", WEIGHTS, {"density": 0.2}, {"density": 0.2}),
    "ties, sum": Case(
        "ties",
        WEIGHTS,
        {"density": 0.5, "normalize": False, "scale": 1.3},
        {"density": 0.5, "normalize": False, "lambda": 1.3},
    ),
    "dare_linear": Case("dare_linear", WEIGHTS, {"density": 1.0}, {"density": 1.0}),
    "dare_ties": Case("dare_ties", WEIGHTS, {"density": 1.0}, {"density": 1.0}),
    "della": Case("della", WEIGHTS, {"density": 1.0}, {"density": 1.0}),
    "sce": Case("sce", None, {"density": 0.1}, {"select_topk": 0.1}),
    "sce, all": Case("sce", None, {"density": 1.0}, {"select_topk": 1.0}),
}
"""What both must give alike; varm is not in mergekit."""


def merge_by_mergekit(configs: Sequence[tuple[dict[str, Any], Path]]) -> None:
    """Write each merge into its folder.

    Raises:
        UnavailableError: mergekit cannot be had here.
        subprocess.CalledProcessError: mergekit refused one.
    """
    given = json.dumps([[config, str(out)] for config, out in configs])
    try:
        run_python(environment("mergekit", VERSION, "mergekit.merge"), "-c", _MERGE, given=given)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        raise


def weights_of(folder: Path) -> dict[str, Any]:
    """All tensors of a merged folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def largest_error(own: Path, theirs: Path) -> float:
    """The largest difference of two merged folders, relative to the largest weight of its tensor."""
    ours, others = weights_of(own), weights_of(theirs)
    if ours.keys() != others.keys():
        raise ValueError(f"other tensors: {sorted(ours.keys() ^ others.keys())[:3]}")
    return max(
        float((ours[name].double() - other.double()).abs().max() / other.double().abs().max())
        for name, other in others.items()
    )
