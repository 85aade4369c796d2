"""Charts of the trainer's step logs: loss terms, validation, weights of the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fuse_eval.findings import mean_of, title_of
from fuse_eval.palette import colours_of
from launch.pages.charts import Line, Stack, line_chart, stack_chart, thinned

Steps = Mapping[str, Sequence[Mapping[str, Any]]]
Panels = list[tuple[str, Markup]]

LOSS_TERMS = {
    "clm": ("Ground truth loss (CLM)", "nats per token"),
    "fusion": ("Fusion loss", "nats per token"),
    "pool": ("Selector's pool loss", "nats per token"),
    "feedback": ("Selector's load balance (CV²)", "CV²"),
}


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]


def loss_panels(steps: Steps) -> Panels:
    """Validation bits per byte first, then each loss term that was logged.

    Args:
        steps: The trainer's lines by model.
    """
    colours = colours_of(())
    panels: Panels = []
    valid = [
        Line(
            title_of(model),
            colours[model],
            tuple((float(x["step"]), mean_of(x["valid_bpb"])) for x in lines if x.get("valid_bpb")),
        )
        for model, lines in steps.items()
    ]
    if any(line.points for line in valid):
        chart = line_chart(
            "Validation bits per byte over steps",
            valid,
            x_unit="optimizer step",
            y_unit="bits per byte, mean of domains",
        )
        panels.append(("Validation bits per byte", chart))
    for key, (title, unit) in LOSS_TERMS.items():
        lines = [
            Line(title_of(model), colours[model], thinned(_points(logged, key)))
            for model, logged in steps.items()
        ]
        # A term that a run does not use is logged as 0 throughout: no curve.
        lines = [line for line in lines if any(y for _, y in line.points)]
        if lines:
            chart = line_chart(f"{title} over steps", lines, x_unit="optimizer step", y_unit=unit)
            panels.append((title, chart))
    return panels


def weight_panels(steps: Steps, sources: Sequence[str]) -> Panels:
    """Weights of the sources over training, and by domain at its end.

    Args:
        steps: The trainer's lines by model; only the fused run has weights.
        sources: In the run file's order.
    """
    logged = [line for line in steps.get("fused", ()) if line.get("weights")]
    if not logged:
        return []
    colours = colours_of(sources)
    lines = [
        Line(
            source,
            colours[source],
            # Batches differ in domains, and weights with them: few points, means over more steps.
            thinned([(float(x["step"]), float(x["weights"].get(source, 0.0))) for x in logged], 30),
        )
        for source in sources
    ]
    panels = [
        (
            "Over training",
            line_chart(
                "Mean weight of each source over steps",
                lines,
                x_unit="optimizer step",
                y_unit="mean weight",
                span=(0.0, 1.0),
            ),
        )
    ]
    by_domain = _late_weights(logged, sources)
    if by_domain:
        rows = [Stack(domain, parts) for domain, parts in by_domain.items()]
        parts_shown = [(source, colours[source]) for source in sources]
        unit = "mean weight over the last tenth of training, %"
        name = "Mean weight of each source by domain"
        panels.append(("By domain", stack_chart(name, rows, parts_shown, unit=unit)))
    return panels


def _late_weights(
    logged: Sequence[Mapping[str, Any]], sources: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    late = [x["weights_by_domain"] for x in logged if x.get("weights_by_domain")]
    late = late[-max(1, len(late) // 10) :]
    by_domain = {}
    for domain in sorted({domain for weights in late for domain in weights}):
        seen = [weights[domain] for weights in late if domain in weights]
        sums = [sum(float(w.get(source, 0.0)) for w in seen) for source in sources]
        total = sum(sums)
        if total > 0:
            by_domain[domain] = tuple(value / total for value in sums)
    return by_domain


def fusion_panels(steps: Steps) -> Panels:
    """Weight of the fusion loss in each domain over training.

    Args:
        steps: The trainer's lines by model; only the fused run has them.
    """
    logged = [line for line in steps.get("fused", ()) if line.get("fusion_weights")]
    if not logged:
        return []
    domains = sorted({domain for line in logged for domain in line["fusion_weights"]})
    colours = colours_of(domains)
    lines = [
        Line(
            domain,
            colours[domain],
            thinned(
                [
                    (float(line["step"]), float(line["fusion_weights"][domain]))
                    for line in logged
                    if domain in line["fusion_weights"]
                ]
            ),
        )
        for domain in domains
    ]
    chart = line_chart(
        "Weight of the fusion loss in each domain over steps",
        lines,
        x_unit="optimizer step",
        y_unit="weight, the rest is ground truth",
        span=(0.0, 1.0),
    )
    return [("Weight of the fusion loss", chart)]
