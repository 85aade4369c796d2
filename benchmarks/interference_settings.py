"""What `make bench-interference` trains: settings, methods, recipes, and how their data are made."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent

UNGATED = "train.fusion_gate.kind=none"
"""Trains with the fusion loss everywhere, as the papers do. Ours is the run file as it stands."""

CONTROL, OURS, TODAY = "control", "ours", "ungated"
_PUBLISHED = ("train.clm_weight=0.9", "train.loss.clm_weight_schedule=null", UNGATED)
METHODS: dict[str, tuple[str, ...]] = {
    CONTROL: (
        *("train.selector=uniform", "train.clm_weight=1"),
        *("train.loss.clm_weight_schedule=null", UNGATED),
    ),
    OURS: (),
    TODAY: (UNGATED,),
    "min_ce": ("train.selector=min_ce", *_PUBLISHED),
    "avg_ce": ("train.selector=avg_ce", *_PUBLISHED),
    "fusion_x": (
        *("train.selector=asn", "train.asn.preset=fusion-x", "train.feedback_weight=0.5"),
        *_PUBLISHED,
    ),
}
"""What each sets over the run file. The last three are FuseLLM's two and Fusion-X as published."""
RIVALS = ("min_ce", "avg_ce", "fusion_x")
_WITHOUT_TODAY = tuple(method for method in METHODS if method != TODAY)

GRIDS: dict[str, tuple[tuple[float, float], ...]] = {
    "demo": ((1e-3, 5), (2.5e-3, 5), (2.5e-3, 3)),
    "real": ((1e-4, 2), (1e-4, 4), (2e-4, 4)),
}
"""Peak learning rate and passes: ours and the control have their best of these three on valid text."""
OTHERS_GRIDS: dict[str, tuple[tuple[float, float], ...]] = {
    "demo": ((2.5e-3, 5),),
    "real": GRIDS["real"],
}
"""Those of the other methods. On the demo it was the best of the three in each of sixteen sweeps (three
papers and no gate, two seeds, three settings; kept until commit c532a54, of models made anew since)."""
GRID_OF_LARGE = ((1e-4, 2), (2e-4, 2))
REAL_RATES = (1e-4, 2e-4)
"""At which the gain on published models is looked at by itself."""

REAL, LARGE = "real", "real-large"
REAL_TOKENS = {REAL: 45_000, LARGE: 150_000}
SPOILED_DOMAIN, SPOILED_SOURCE = "spoiled-domain", "spoiled-source"
DEMO_SEEDS = (0, 1, 2)

QUICK = ("train.max_steps=3", "train.eval_every=2")


class Recipe(NamedTuple):
    """One training: a method at a peak learning rate and a number of passes."""

    method: str
    lr: float
    epochs: float

    def __str__(self) -> str:
        return f"{self.method} lr={self.lr:g} epochs={self.epochs:g}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """What it sets over the run file."""
        return (*METHODS[self.method], f"train.lr={self.lr:g}", f"train.epochs={self.epochs:g}")


@dataclass(frozen=True, slots=True)
class Data:
    """Corpus, plan and stores that settings share.

    Args:
        folder: Of the run that has them.
        work: Where run files and trainings go.
        seed: Of the run.
        run: Content of the run file, with every source that any setting uses.
        commands: Make the inputs; each does nothing when its output is there.
    """

    folder: Path
    work: Path
    seed: int
    run: Mapping[str, Any]
    commands: tuple[tuple[str, ...], ...] = ()

    @property
    def run_file(self) -> Path:
        """Of all sources."""
        return self.work / "run.yaml"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is fused into what.

    Args:
        name: Of the setting.
        data: One for each seed.
        sources: Those of the data that are used.
        grid: Peak learning rates and passes.
        others_grid: Those of methods that are neither ours nor the control.
        methods: What is trained.
        spoiled: Domain in which every source is worse than the control; None where there is none.
    """

    name: str
    data: tuple[Data, ...]
    sources: tuple[str, ...]
    grid: tuple[tuple[float, float], ...]
    others_grid: tuple[tuple[float, float], ...]
    methods: tuple[str, ...] = tuple(METHODS)
    spoiled: str | None = None

    def recipes(self) -> Iterator[Recipe]:
        """All trainings of one seed."""
        for method in self.methods:
            for lr, epochs in self.grid if method in (CONTROL, OURS) else self.others_grid:
                yield Recipe(method, lr, epochs)

    def run_file(self, data: Data) -> Path:
        """Of the setting's sources, on shared data."""
        return data.work / f"{self.name}.yaml"

    def run(self, data: Data) -> dict[str, Any]:
        """Content of that file."""
        return {
            **data.run,
            "run_dir": str(data.work / self.name),
            "data_dir": str(data.folder),
            "sources": {name: data.run["sources"][name] for name in self.sources},
        }


def demo_data(out: Path, seed: int) -> Data:
    """The demo's data with one source more, which has learned wrong facts."""
    folder = out / f"demo-{seed}"
    inputs = folder / "inputs"
    run = _example("demo", {"runs/demo/": f"{folder}/"})
    wrong = {**run["sources"]["facts"], "model": str(inputs / "models/wrong_facts")}
    run |= {"name": f"demo-{seed}", "seed": seed, "run_dir": str(folder)}
    run["sources"]["wrong_facts"] = wrong
    return Data(
        folder,
        folder,
        seed,
        run,
        (
            _script("make_demo.py", "--out", inputs, "--seed", seed),
            _script("make_wrong_facts.py", "--inputs", inputs, "--seed", seed),
        ),
    )


def real_data(out: Path, tokens: int | None) -> Data:
    """The data of `make real`, or of the same packages' larger text."""
    inputs = "runs/real/inputs"
    if tokens is None:
        run = _example("real", {}) | {"run_dir": "runs/real"}
        commands = (_script("make_real.py", "--out", inputs),)
        return Data(Path("runs/real"), out / "real", 0, run, commands)
    folder = out / f"real-{tokens}"
    run = _example("real", {f"{inputs}/text/": f"{inputs}/text-{tokens}/"})
    run |= {"name": folder.name, "run_dir": str(folder)}
    commands = (_script("make_real.py", "--out", inputs, "--train-tokens", tokens),)
    return Data(folder, folder, 0, run, commands)


def all_settings(out: Path, seeds: Sequence[int] = DEMO_SEEDS) -> dict[str, Setting]:
    """Every setting by name.

    Args:
        out: Where data, run files and trainings go.
        seeds: Of the settings on the demo.
    """
    demo = tuple(demo_data(out, seed) for seed in seeds)
    real = ("gemma", "qwen")
    on_real, on_demo = ((GRIDS[name], OTHERS_GRIDS[name]) for name in ("real", "demo"))
    found = (
        Setting(REAL, (real_data(out, None),), real, *on_real, methods=_WITHOUT_TODAY),
        Setting("demo", demo, ("code", "prose", "facts"), *on_demo),
        # Of prose the source `code` knows more than the target at first, and less than the control.
        Setting(
            SPOILED_DOMAIN,
            demo,
            ("code", "facts"),
            *on_demo,
            methods=_WITHOUT_TODAY,
            spoiled="prose",
        ),
        Setting(
            SPOILED_SOURCE,
            demo,
            ("code", "prose", "wrong_facts"),
            *on_demo,
            methods=_WITHOUT_TODAY,
            spoiled="facts",
        ),
        Setting(
            LARGE,
            (real_data(out, REAL_TOKENS[LARGE]),),
            real,
            GRID_OF_LARGE,
            GRID_OF_LARGE,
            methods=(CONTROL, OURS),
        ),
    )
    return {setting.name: setting for setting in found}


def _example(name: str, replaced: Mapping[str, str]) -> dict[str, Any]:
    text = (ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8")
    for old, new in replaced.items():
        text = text.replace(old, new)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def _script(name: str, *words: object) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "examples" / name), *map(str, words))
