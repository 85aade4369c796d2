"""What `make bench-presets` trains: parts of ProFuser, one against many, merges, controls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent

BASE = "base"
"""The target as it was, a source of FuseLLM's and FuseChat's."""
CONTROL, CONTROL_ALL = "control", "control_all_text"
PROGRESSIVE, REVERSED, BOTH = "progressive", "reversed", "both_at_once"
INFERENCE, TRAINING = "inference_only", "training_only"
RIGHT_ALL, RIGHT_INFERENCE = "control_all_right", "inference_right"
RIGHT_PROGRESSIVE, RIGHT_BOTH = "progressive_right", "both_right"
OURS, OURS_BOTH = "ours", "ours_both"
MANY, PAIRS_LINEAR = "many_to_one", "pairwise_linear"
PAIRS_SCE, PAIRS_SCE_CODE = "pairwise_sce", "pairwise_sce_code"

_ONE = {"best": 1.0, "given": 0.0}
_TWO = {"best": 0.1, "given": 1.0}
_PLAIN = {"selector": "uniform", "clm_weight": 1.0}
_MIN_CE = {"selector": "min_ce"}
_OURS = {
    "selector": "asn",
    "tail": "bucket",
    "fusion_gate": {"kind": "posterior"},
    "loss": {"divergence": "cross_entropy"},
}
"""The product's own defaults over the preset."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One training.

    Args:
        says: What it is, for the table.
        stages: Weights of the corpora and share of the steps, a pair for each stage.
        train: What else it sets in `train`.
        base: Whether the target as it was is a source.
        right: Whether only best answers that are right are taken (`min_score: 1`).
    """

    says: str
    stages: tuple[tuple[Mapping[str, float], float], ...]
    train: Mapping[str, Any]
    base: bool = False
    right: bool = False

    @property
    def data(self) -> str:
        """Name of the run whose stores it is trained on."""
        return "teach-base" if self.base else "teach-right" if self.right else "teach"

    def train_section(self, steps: int, lr: float) -> dict[str, Any]:
        """The section `train` over the run file's."""
        stages = [
            {"weights": dict(weights), "steps": max(1, round(steps * share))}
            for weights, share in self.stages
        ]
        return {"stages": stages, "lr": lr, "control": False, **self.train}


def _pairs(method: str, **options: Any) -> dict[str, Any]:
    own = {method: options} if options else {}
    return _MIN_CE | {"pairwise": {"pivot": BASE, "merge": {"method": method, **own}}}


_GIVEN = (({"given": 1.0, "best": 0.0}, 1.0),)
_BOTH_STAGES = ((_ONE, 0.4), (_TWO, 0.6))
VARIANTS: dict[str, Variant] = {
    CONTROL: Variant("plain training on the given answers", _GIVEN, _PLAIN),
    CONTROL_ALL: Variant("plain training on all that ProFuser reads", _BOTH_STAGES, _PLAIN),
    INFERENCE: Variant("inference mode alone: the sources' best answers", ((_ONE, 1.0),), {}),
    TRAINING: Variant("training mode alone: MinCE on the given answers", _GIVEN, {}),
    PROGRESSIVE: Variant("ProFuser: best answers, then given ones", _BOTH_STAGES, {}),
    REVERSED: Variant("in the other order", ((_TWO, 0.6), (_ONE, 0.4)), {}),
    BOTH: Variant("both at once", (({"best": 1.0, "given": 1.0}, 1.0),), {}),
    RIGHT_ALL: Variant(
        "plain training on all that the next one reads", _BOTH_STAGES, _PLAIN, right=True
    ),
    RIGHT_PROGRESSIVE: Variant("ProFuser with right answers alone", _BOTH_STAGES, {}, right=True),
    RIGHT_INFERENCE: Variant("inference mode, right answers alone", ((_ONE, 1.0),), {}, right=True),
    RIGHT_BOTH: Variant(
        "both at once, right answers alone", (({"best": 1.0, "given": 1.0}, 1.0),), {}, right=True
    ),
    OURS: Variant("ours, selection network and gate: given answers", _GIVEN, _OURS),
    OURS_BOTH: Variant(
        "the same, given and best answers at once", (({"best": 1.0, "given": 1.0}, 1.0),), _OURS
    ),
    MANY: Variant("FuseLLM: MinCE among all sources and the target", _GIVEN, _MIN_CE, base=True),
    PAIRS_SCE: Variant("FuseChat: pairs, merged by SCE", _GIVEN, _pairs("sce"), base=True),
    PAIRS_SCE_CODE: Variant(
        "the same pairs, merged by SCE as its public code has it",
        _GIVEN,
        _pairs("sce", select_for="weights"),
        base=True,
    ),
    PAIRS_LINEAR: Variant(
        "the same pairs, merged to their mean", _GIVEN, _pairs("linear"), base=True
    ),
}
"""Every training takes the same number of steps of the same size; each pair takes as many."""


@dataclass(frozen=True, slots=True)
class World:
    """Models and questions of one seed.

    Args:
        name: Of its folder.
        folder: Of everything.
        seed: Of models, questions and trainings.
        examples: Run files that ask and that teach, by their names in examples/.
        replaced: Texts of those files and what they become.
        commands: Scripts of examples/ that make the inputs, with their words.
        steps: Of each training.
        rates: Peak learning rates; every variant has its best on valid text.
    """

    name: str
    folder: Path
    seed: int
    examples: tuple[str, str]
    replaced: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]
    steps: int
    rates: tuple[float, ...]

    @property
    def ask_file(self) -> Path:
        """Run file in which the sources answer."""
        return self.folder / "ask.yaml"

    @property
    def ask_right_file(self) -> Path:
        """The same, with an answer chosen only where it is right."""
        return self.folder / "ask-right.yaml"

    def teach_file(self, variant: Variant) -> Path:
        """Run file that trains."""
        return self.folder / f"{variant.data}.yaml"

    def write_run_files(self) -> None:
        """Write all run files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ask, teach = (self._example(name) for name in self.examples)
        ask |= {"seed": self.seed, "run_dir": str(self.folder / "ask")}
        teach |= {"seed": self.seed, "run_dir": str(self.folder / "teach")}
        with_base = teach | {"sources": {**teach["sources"], BASE: "target"}}
        with_base["run_dir"] = str(self.folder / "teach-base")
        judges = [judge | {"min_score": 1} for judge in ask["judge"]["judges"]]
        ask_right = ask | {"run_dir": f"{ask['run_dir']}-right", "judge": {"judges": judges}}
        right = json.loads(
            json.dumps(teach).replace(f"{ask['run_dir']}/", f"{ask_right['run_dir']}/")
        )
        right["run_dir"] = str(self.folder / "teach-right")
        files = {"ask": ask, "ask-right": ask_right}
        files |= {"teach": teach, "teach-base": with_base, "teach-right": right}
        for name, content in files.items():
            text = yaml.safe_dump(content, sort_keys=False)
            (self.folder / f"{name}.yaml").write_text(text, encoding="utf-8")

    def _example(self, name: str) -> dict[str, Any]:
        text = (ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8")
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        found: dict[str, Any] = yaml.safe_load(text)
        return found


def toy_world(out: Path, seed: int, *, scale: float = 1.0, steps: int = 240) -> World:
    """Small chat models that are made on the spot."""
    folder = out / f"toy-{seed}"
    inputs = folder / "inputs"
    words = ("--out", str(inputs), "--seed", str(seed))
    return World(
        f"toy-{seed}",
        folder,
        seed,
        ("toy-ask", "toy"),
        {"runs/toy/inputs": str(inputs), "runs/toy-ask/": f"{folder}/ask/"},
        (
            ("toy_chat_models.py", *words, "--scale", str(scale)),
            ("make_questions.py", *words, "--level", "easy", *_SIZES),
        ),
        steps,
        (5e-4, 1e-3),
    )


_SIZES = ("--train", "200", "--valid", "40", "--test", "150", "--mistakes", "0.1")


def real_world(out: Path) -> World:
    """The published chat models of `make real`."""
    folder = out / "real"
    inputs = folder / "inputs"
    return World(
        "real",
        folder,
        0,
        ("profuser-ask", "profuser"),
        {"runs/questions/inputs": str(inputs), "runs/profuser-ask/": f"{folder}/ask/"},
        (
            ("make_real.py", "--out", "runs/real/inputs", "--models-only"),
            ("make_questions.py", "--out", str(inputs)),
        ),
        72,  # three passes over the questions
        (1e-4,),
    )


def override_words(section: Mapping[str, Any]) -> list[str]:
    """`--set` words for a section `train`."""
    found: list[str] = []
    for key, value in section.items():
        found += ["--set", f"train.{key}={json.dumps(value)}"]
    return found
