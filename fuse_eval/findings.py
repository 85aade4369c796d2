"""Results as sentences: printed by the commands and shown by the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.pages.charts import percent, share_of, significant

FUSED, CONTROL, BEFORE = "fused", "clm_control", "target_before"

MODEL_TITLES = {BEFORE: "target before", CONTROL: "CLM control", FUSED: "fused"}


VERDICTS = {
    "worse": "beyond the noise",
    "within noise": "within the noise",
    "undecided": "too short to tell",
}
"""Words for the verdicts on a document that scores worse."""


def title_of(model: str) -> str:
    """A model's name in text."""
    return MODEL_TITLES.get(model, model)


def comparison(evaluation: Mapping[str, Any], model: str, against: str) -> dict[str, Any] | None:
    """The comparison of two models, if it was made."""
    for item in evaluation.get("comparisons", []):
        if item["model"] == model and item["against"] == against:
            return dict(item)
    return None


def _interval(change: Mapping[str, float], confidence: float) -> str:
    return (
        f"{share_of(confidence, 0)} interval {percent(change['low'])} to {percent(change['high'])}"
    )


def headline(evaluation: Mapping[str, Any] | None) -> str:
    """The result in one sentence.

    Args:
        evaluation: Content of evaluation.json, None when nothing was evaluated.
    """
    if not evaluation:
        return "Not evaluated yet: run `logitfuse eval run`."
    against = comparison(evaluation, FUSED, CONTROL)
    other = "the CLM control"
    if against is None:
        against = comparison(evaluation, FUSED, BEFORE)
        other = "the target before training (no CLM control was trained)"
    if against is None:
        return "Only the models before training were evaluated."
    mean, bpb = against["mean"], evaluation["mean_bpb"]
    figures = f"{significant(bpb[FUSED], 4)} against {significant(bpb[against['against']], 4)}"
    count = len(against["domains"])
    span = f"over {count} domains" if count > 1 else "in the one domain"
    noise = _interval(mean, evaluation["confidence"])
    if mean["low"] <= 0 <= mean["high"]:
        return (
            f"No difference beyond the noise: fused is {percent(mean['value'])} from {other} "
            f"in mean bits per byte {span} ({figures}; {noise})."
        )
    size = _size(mean["value"])
    way = "below" if mean["value"] < 0 else "above"
    return f"Fused ends {size} {way} {other} in mean bits per byte {span} ({figures}; {noise})."


def interference_line(evaluation: Mapping[str, Any]) -> str | None:
    """Which domains got worse by fusing, if a control was trained."""
    against = comparison(evaluation, FUSED, CONTROL)
    if against is None:
        return None
    domains = against["domains"]
    worst = max(domains, key=lambda domain: domains[domain]["value"])
    shown = f"worst domain {worst} {percent(domains[worst]['value'])}"
    if not against["worse"]:
        return f"Interference: no domain is worse than the control beyond the noise ({shown})."
    names = ", ".join(against["worse"])
    return (
        f"Interference: {len(against['worse'])} of {len(domains)} domains worse than the control "
        f"beyond the noise ({names}; {shown})."
    )


def document_line(evaluation: Mapping[str, Any]) -> str | None:
    """How many documents got worse by fusing, and by how much, if a control was trained."""
    interference = evaluation.get("interference")
    if not interference:
        return None
    counts, excess = interference["documents"], interference["excess"]
    named = "none" if not counts["worse"] else f"{counts['worse']:,}"
    verb = "are" if counts["worse"] > 1 else "is"
    sums = _excess(excess, "worse")
    line = (
        f"Documents: {named} of {counts['total']:,} {verb} worse than the control beyond the noise"
    )
    line += f" (in sum {sums})" if counts["worse"] else ""
    if counts["undecided"]:
        line += f", {counts['undecided']:,} are too short to tell"
    return (
        f"{line}; {counts['worse_by_point']:,} score worse at all, noise included "
        f"({_excess(excess, 'worse_by_point')})."
    )


def _excess(excess: Mapping[str, float], which: str) -> str:
    nats, bpb = excess[f"{which}_nats"], excess[f"{which}_bpb"]
    return f"{significant(nats)} nats, {significant(bpb)} bits per byte of the split"


def ratio_lines(other_run: Mapping[str, Any], confidence: float) -> list[str]:
    """How two runs' interference compares.

    Args:
        other_run: From `compare_interference`.
        confidence: Level of its intervals.
    """
    here, there = other_run["documents"], other_run["against_documents"]
    return [
        f"Against {other_run['run']}, summed excess of all documents that score worse: "
        + _ratio(other_run["worse_by_point"], confidence),
        f"Of those worse beyond the noise ({here['worse']:,} documents, there {there['worse']:,}): "
        + _ratio(other_run["worse"], confidence),
    ]


def _ratio(ratio: Mapping[str, float | None], confidence: float) -> str:
    nats, other = (significant(ratio[key] or 0.0) for key in ("nats", "against_nats"))
    if ratio["value"] is None:
        return f"{nats} nats, there none."
    low, high = ratio["low"], ratio["high"]
    ends = f"{significant(low or 0.0)} to " + ("no bound" if high is None else significant(high))
    return (
        f"{nats} nats, there {other}: ratio {significant(ratio['value'])} "
        f"({share_of(confidence, 0)} interval {ends})."
    )


def specialist_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """Each source in its best domain, compared with the target before training."""
    lines = []
    for item in evaluation.get("specialists", []):
        size = _size(item["change"])
        way = "below" if item["change"] < 0 else "above"
        line = (
            f"Specialist {item['source']} ends {size} {way} the target's start in {item['domain']}"
        )
        lines.append(line + ("." if item["change"] < 0 else ": it has nothing to teach."))
    return lines


def mean_of(by_domain: Mapping[str, float]) -> float:
    """Mean over domains, each with equal weight."""
    return sum(by_domain.values()) / len(by_domain)


def pool_lines(pool: Mapping[str, Any]) -> list[str]:
    """Whether fusing can help, and which source to drop, before anything is trained.

    Args:
        pool: Content of pool.json.
    """
    # Selectors with hindsight read the labels: their scores cannot be reached by training.
    seen = pool.get("hindsight", ())
    honest = {s: mean_of(v) for s, v in pool["pool_bpb"].items() if s not in seen and v}
    alone = {source: mean_of(v) for source, v in pool["alone_bpb"].items() if v}
    if not honest or not alone:
        return ["No row of this split has a known probability under every source."]
    best = min(honest, key=honest.__getitem__)
    target = mean_of(pool["target_bpb"])
    change = honest[best] / target - 1
    shown = f"{significant(honest[best], 4)} bits per byte in the mean"
    lines = [
        f"Fusing can pay: the {best} pool scores {shown}, {_size(change)} below the target now "
        f"({significant(target, 4)})."
        if change < 0
        else f"Fusing will hardly pay: the best pool ({best}) scores {shown}, not below the target "
        f"now ({significant(target, 4)})."
    ]
    source = min(alone, key=alone.__getitem__)
    lines.append(
        f"Best single source in the mean: {source} ({significant(alone[source], 4)}); the {best} "
        f"pool is {percent(honest[best] / alone[source] - 1)} against it."
    )
    lines += _mixture_lines(pool.get("mixture", {})) + _forecast_lines(pool.get("forecast", {}))
    return lines + _drop_lines(pool["without"])


def _size(change: float) -> str:
    return share_of(abs(change))


def _mixture_lines(mixture: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The pool's weight in its best mixture with the target, by domain."""
    if not mixture:
        return []
    shown = ", ".join(f"{d} {m['pool_weight']:.2f}" for d, m in mixture.items())
    return [
        f"Weight of the pool in its best mixture with the target now: {shown}. The nearer to 0, the "
        "sooner the domain stops gaining from its sources."
    ]


def _forecast_lines(forecast: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What fusing may gain over plain training on the same text."""
    if not forecast:
        return []
    shown = ", ".join(
        f"{d} {percent(-f['gain'])} (at most {percent(-f['most'])})"
        for d, f in sorted(forecast.items(), key=lambda item: -item[1]["gain"])
    )
    return [f"Forecast of fused against plain training, roughly: {shown}."]


def _drop_lines(without: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for selector, by_source in without.items():
        gains = {s: v["change"] for s, v in by_source.items() if v["change"] < 0}
        if gains:
            source = min(gains, key=gains.__getitem__)
            lines.append(
                f"Consider dropping {source}: without it the {selector} pool changes by "
                f"{percent(gains[source], 2)}."
            )
        elif by_source:
            lines.append(f"Each source helps the {selector} pool: none should be dropped.")
    return lines
