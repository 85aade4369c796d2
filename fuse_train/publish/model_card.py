"""The model card of a trained model: what it was made from, and how to load it."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from fuse_train.config import TrainSection


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Content of a model card.

    Args:
        run_name: Name of the run.
        label: "fused" or "control".
        target: Model as the run file names it.
        sources: Model by source name; empty for the control.
        plan_fingerprint: Fingerprint of the plan.
        store_fingerprints: Fingerprint of each source's store, by source name.
        section: The recipe.
        seed: Seed of the run.
        before: Bits per byte by domain of the target before training, or None.
        after: Bits per byte by domain of the saved weights, or None.
        step: Step that the weights are from.
        num_steps: Steps of the run.
    """

    run_name: str
    label: str
    target: str
    sources: dict[str, str]
    plan_fingerprint: str
    store_fingerprints: dict[str, str]
    section: TrainSection
    seed: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    step: int
    num_steps: int


def model_card(facts: CardFacts) -> str:
    """The README.md of a final folder."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": [facts.target, *facts.sources.values()],
        "tags": ["logitfuse", facts.label],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {facts.run_name}: {_title(facts)}",
        _made_from(facts),
        _results(facts),
        _how_to_load(),
        "## Recipe\n\n```yaml\n" + _recipe(facts) + "```",
    ]
    return "\n\n".join(parts) + "\n"


def _title(facts: CardFacts) -> str:
    if facts.label == "control":
        return "the control, trained on ground truth alone"
    return "a fusion of " + ", ".join(facts.sources)


def _made_from(facts: CardFacts) -> str:
    lines = [f"`{facts.target}` was trained with logitfuse on ground truth"]
    if facts.sources:
        lines[0] += " and on the stored next-token distributions of:\n"
        lines += [
            f"- {name}: `{model}` (store `{facts.store_fingerprints[name]}`)"
            for name, model in facts.sources.items()
        ]
    else:
        lines[0] += " alone: same start, tokens, order and optimizer as the fused model."
    lines.append(
        f"\nData: plan `{facts.plan_fingerprint}`. Weights of step {facts.step} of "
        f"{facts.num_steps}."
    )
    return "\n".join(lines)


def _results(facts: CardFacts) -> str:
    if facts.after is None:
        return (
            "## Results\n\nNot evaluated yet: `logitfuse eval run` gives bits per byte by domain."
        )
    rows = ["| domain | before | this model |", "|---|---|---|"]
    for domain, value in facts.after.items():
        before = "" if facts.before is None else f"{facts.before[domain]:.4f}"
        rows.append(f"| {_cell(domain)} | {before} | {value:.4f} |")
    return (
        "## Results\n\nBits per byte on the validation split (chosen on it where the best weights "
        "are kept; `logitfuse eval run` has the held-out figures):\n\n" + "\n".join(rows)
    )


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _how_to_load() -> str:
    return (
        "## Load\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n```\n\n'
        'vLLM: `LLM(model="path/of/this/folder")`.'
    )


def _recipe(facts: CardFacts) -> str:
    recipe = {"seed": facts.seed, "train": facts.section.content()}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
