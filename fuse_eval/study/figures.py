"""Figures of a study from scores: pure functions, nothing is trained or read.

Shapes: R resamples, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fuse_eval.answers.figures import mean_scores, resampled_differences
from fuse_eval.interference.documents import DocumentDifferences, document_differences
from fuse_eval.intervals import DomainUnits, resampled_bpb, units_by_domain
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.harness import task_scores
from fuse_eval.study.records import Gate, TrainingRecord
from fuse_eval.study.results import SeedResult

MEAN = "mean"
"""Key of the mean over domains, each with equal weight."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Change:
    """A relative change of bits per byte; negative is better.

    Args:
        value: Mean of the seeds.
        low: Lower end of the interval.
        high: Upper end of the interval.
        seeds: Of each seed.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]


def changes(
    seeds: Sequence[SeedResult], row: str, against: str, study: StudyConfig
) -> dict[str, Change]:
    """Change of bits per byte from one row to another, by domain and in the mean of domains.

    Intervals are of a paired bootstrap: seeds are drawn with replacement, and of each drawn seed the
    documents within each domain. With one seed they are of the documents alone.
    """
    rng = np.random.default_rng(0)
    points: dict[str, list[float]] = {}
    drawn: dict[str, list[Floats]] = {}
    for seen in seeds:
        units = _units(seen, (row, against))
        point = {d: np.array([unit.bpb(row), unit.bpb(against)]) for d, unit in units.items()}
        draws = {
            d: resampled_bpb(
                np.stack([u.nats[row], u.nats[against]]), u.num_bytes, study.bootstrap_samples, rng
            )
            for d, u in units.items()
        }
        point[MEAN] = np.mean(list(point.values()), axis=0)
        draws[MEAN] = np.mean(list(draws.values()), axis=0)
        for key in point:
            points.setdefault(key, []).append(float(point[key][0] / point[key][1] - 1))
            drawn.setdefault(key, []).append(draws[key][:, 0] / draws[key][:, 1] - 1)
    return {key: _change(values, drawn[key], rng, study) for key, values in points.items()}


def over_seeds(draws_SR: Floats, rng: np.random.Generator) -> Floats:
    """[R] means over seeds that are drawn with replacement, each with a draw of its documents."""
    count, samples = draws_SR.shape
    if count == 1:
        only: Floats = draws_SR[0]
        return only
    chosen_RS = rng.integers(0, count, (samples, count))
    columns_RS = rng.integers(0, samples, (samples, count))
    means: Floats = draws_SR[chosen_RS, columns_RS].mean(axis=1)
    return means


def _ends(draws_R: Floats, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def right_answers(
    seeds: Sequence[SeedResult], row: str, against: str | None, study: StudyConfig
) -> dict[str, dict[str, Any]]:
    """Share of right answers by domain and in the mean of domains, mean of the seeds, and against
    another row as `changes` does, but in shares and not relative.

    Args:
        seeds: Those at which the rows were asked.
        row: The row.
        against: Another one; None leaves the comparison out.
        study: For the resampling.

    Returns:
        "share" {domain: value}, and "against_control" {domain: `Change`}. A prompt without a score is
        wrong, unless no row has one: then it is left out.
    """
    rng = np.random.default_rng(0)
    shares: dict[str, list[float]] = {}
    points: dict[str, list[float]] = {}
    drawn: dict[str, list[Floats]] = {}
    for seen in seeds:
        by_row = {name: told.right for name, told in seen.answers.items()}
        kept = [
            any(value is not None for value in one) for one in zip(*by_row.values(), strict=True)
        ]
        domains = [d for d, keep in zip(seen.answers[row].domains, kept, strict=True) if keep]
        scores = {
            name: np.array([v or 0.0 for v, keep in zip(by_row[name], kept, strict=True) if keep])
            for name in filter(None, (row, against))
        }
        own = mean_scores(scores[row], domains)
        for key, value in (own | {MEAN: float(np.mean(list(own.values())))}).items():
            shares.setdefault(key, []).append(value)
        if against is None:
            continue
        apart = scores[row] - scores[against]
        point, draws = resampled_differences(apart, domains, study.bootstrap_samples, rng)
        point[MEAN] = float(np.mean(list(point.values())))
        draws[MEAN] = np.mean(list(draws.values()), axis=0)
        for key in point:
            points.setdefault(key, []).append(point[key])
            drawn.setdefault(key, []).append(draws[key])
    found: dict[str, dict[str, Any]] = {
        "share": {key: float(np.mean(values)) for key, values in shares.items()}
    }
    if against is not None:
        found["against_control"] = {
            key: asdict(_change(values, drawn[key], rng, study)) for key, values in points.items()
        }
    return found


def _change(
    values: Sequence[float], draws: Sequence[Floats], rng: np.random.Generator, study: StudyConfig
) -> Change:
    """From each seed's value and its resamples."""
    ends = _ends(over_seeds(np.stack(draws), rng), study.confidence)
    return Change(float(np.mean(values)), *ends, tuple(values))


def _units(seen: SeedResult, rows: Sequence[str]) -> dict[str, DomainUnits]:
    blocks = seen.blocks
    nats = {row: blocks.nats[row] for row in rows}
    return units_by_domain(
        nats, blocks.num_bytes.astype(np.float64), blocks.domains, blocks.document_ids
    )


def bpb_of(seeds: Sequence[SeedResult], row: str) -> dict[str, float]:
    """Bits per byte by domain and in the mean of domains, mean of the seeds."""
    found: dict[str, list[float]] = {}
    for seen in seeds:
        by_domain = {d: unit.bpb(row) for d, unit in _units(seen, [row]).items()}
        by_domain[MEAN] = float(np.mean(list(by_domain.values())))
        for key, value in by_domain.items():
            found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


@dataclass(frozen=True, slots=True)
class Interference:
    """What a row makes worse than the control, summed over seeds.

    Args:
        domains: Domains whose whole interval is above zero.
        documents: Documents that are worse beyond the noise.
        better: Documents that score better, whatever the noise.
        of: Documents in all.
        excess_nats: NLL above the control's in the documents that are worse beyond the noise.
        every_nats: The same in all documents that score worse.
    """

    domains: tuple[str, ...]
    documents: int
    better: int
    of: int
    excess_nats: float
    every_nats: float


def interference(
    seeds: Sequence[SeedResult], row: str, study: StudyConfig, found: Mapping[str, Change]
) -> Interference:
    """Documents and domains on which a row is worse than the control."""
    worse = better = of = 0
    excess = every = 0.0
    for seen in seeds:
        documents = document_differences(seen.blocks, row, study.control)
        beyond = documents.worse(study.confidence)
        worse += int(beyond.sum())
        better += int((documents.model_nats < documents.against_nats).sum())
        of += len(beyond)
        excess += float(documents.excess_nats[beyond].sum())
        every += float(documents.excess_nats.sum())
    domains = tuple(d for d, change in found.items() if d != MEAN and change.low > 0)
    return Interference(domains, worse, better, of, excess, every)


def worst_documents(
    seeds: Sequence[SeedResult], row: str, control: str, count: int = 10
) -> list[dict[str, Any]]:
    """Documents that a row makes worse by most nats, over all seeds."""
    found = []
    for seen in seeds:
        documents: DocumentDifferences = document_differences(seen.blocks, row, control)
        for i in np.argsort(-documents.excess_nats)[:count]:
            if documents.excess_nats[i] > 0:
                found.append(
                    {
                        "seed": seen.seed,
                        "domain": documents.domains[i],
                        "document_id": documents.document_ids[i],
                        "excess_nats": float(documents.excess_nats[i]),
                        "change": float(documents.model_nats[i] / documents.against_nats[i] - 1),
                    }
                )
    return sorted(found, key=lambda item: -item["excess_nats"])[:count]


def tokens_to_reach(record: TrainingRecord, goal: float) -> float | None:
    """Share of a training's tokens after which its validation score first is at a goal.

    The score (mean bits per byte) moves in a straight line from one evaluation to the next. 0 where it
    is there from the start; None where it never is, and where the scores are of several trainings
    whose models are merged: the merged one has no course.
    """
    if any(late.step < early.step for early, late in pairwise(record.valid)):
        return None
    before = None
    for score in record.valid:
        if score.mean <= goal:
            if before is None:
                return 0.0
            step = before.step + (score.step - before.step) * (
                (before.mean - goal) / (before.mean - score.mean)
            )
            return step / max(record.num_steps, 1)
        before = score
    return None


def tokens_to_control(seeds: Sequence[SeedResult], row: str, control: str) -> float | None:
    """Tokens that a row needs for the control's best validation score, over those the control needed.

    Mean of the seeds; None where it does not get there at one of them.
    """
    shares = []
    for seen in seeds:
        ours, theirs = seen.trainings[row], seen.trainings[control]
        reached = tokens_to_reach(ours, theirs.best)
        needed = tokens_to_reach(theirs, theirs.best)
        if reached is None or not needed:
            return None
        shares.append(reached * ours.num_tokens / (needed * theirs.num_tokens))
    return float(np.mean(shares))


def gap_closed(
    bpb: Mapping[str, float], before: Mapping[str, float], best: Mapping[str, float]
) -> float:
    """Share of the way from the target before training to the best source of each domain, mean of
    domains; above 1 where a row is better than it."""
    shares = [
        (before[d] - bpb[d]) / (before[d] - best[d])
        for d in bpb
        if d != MEAN and before[d] > best[d]
    ]
    return float(np.mean(shares)) if shares else 0.0


def whole(seeds: Sequence[SeedResult], row: str) -> list[SeedResult]:
    """The seeds at which a row is there."""
    return [seen for seen in seeds if row in seen.blocks.nats]


def best_baseline(study: StudyConfig, record: Mapping[str, Any]) -> str | None:
    """The baseline that the study's own row is least better than; None without any."""
    against = {
        row: found["ours_against"][MEAN]["value"]
        for row, found in record["rows"].items()
        if study.rows[row].baseline and "ours_against" in found
    }
    return max(against, key=lambda row: against[row], default=None)


def setting_record(study: StudyConfig, name: str, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """All figures of one setting, JSON-like."""
    rows: dict[str, Any] = {}
    for row in study.rows_of(name):
        there = whole(seeds, row)
        if there:
            rows[row] = _row_record(study, row, there)
    _add_gaps(study, rows)
    reference = rows.get(study.interference_against or "", {}).get("interference")
    for record in rows.values():
        found = record.get("interference")
        if found and reference:
            record["interference_ratio"] = {
                key: found[key] / reference[key] if reference[key] else None
                for key in ("excess_nats", "every_nats")
            }
    record = {"seeds": [seen.seed for seen in seeds], "rows": rows, "pools": _pools(seeds)}
    ours = study.ours
    if ours in rows:
        assert ours is not None
        for row, own in rows.items():
            both = [seen for seen in whole(seeds, ours) if row in seen.blocks.nats]
            if row != ours and both:
                found = changes(both, ours, row, study)
                own["ours_against"] = {key: asdict(c) for key, c in found.items()}
        record["worst_documents"] = worst_documents(whole(seeds, ours), ours, study.control)
    return record


def _row_record(study: StudyConfig, row: str, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    found: dict[str, Any] = {"seeds": [seen.seed for seen in seeds], "bpb": bpb_of(seeds, row)}
    trained = row in seeds[0].trainings
    if trained:
        records = [seen.trainings[row] for seen in seeds]
        found["tuning"] = [record.tuning for record in records]
        found["valid"] = [
            [[score.step / max(record.num_steps, 1), score.mean] for score in record.valid]
            for record in records
        ]
        found["num_tokens"] = float(np.mean([record.num_tokens for record in records]))
        found["seconds"] = float(np.mean([record.seconds for record in records]))
        gates = [record.gate for record in records if record.gate is not None]
        if gates:
            found["gate"] = mean_gate(gates)
    control = None if row == study.control else study.control
    asked = [seen for seen in seeds if {row, control} - {None} <= seen.answers.keys()]
    if asked:
        found["right"] = right_answers(asked, row, control, study)
    tasks = task_scores([seen.tasks for seen in seeds], row, control)
    if tasks:
        found["tasks"] = tasks
    if control is None:
        return found
    against = changes(seeds, row, study.control, study)
    found["against_control"] = {key: asdict(change) for key, change in against.items()}
    if trained:
        found["interference"] = asdict(interference(seeds, row, study, against))
        found["tokens_to_control"] = tokens_to_control(seeds, row, study.control)
    return found


def mean_gate(gates: Sequence[Gate]) -> dict[str, dict[str, float]]:
    """Mean of seeds; of sources that all of them have."""
    found = {}
    for part in ("weight", "spread", "spread_within"):
        values = [getattr(gate, part) for gate in gates]
        found[part] = {
            name: float(np.mean([one[name] for one in values]))
            for name in values[0]
            if all(name in one for one in values)
        }
    return found


def _add_gaps(study: StudyConfig, rows: Mapping[str, dict[str, Any]]) -> None:
    """Of each trained row the share of the gap to the best source that it closes."""
    as_is = {row: study.rows[row].model for row in rows}
    before = next((rows[row]["bpb"] for row, model in as_is.items() if model == "target"), None)
    sources = [rows[row]["bpb"] for row, model in as_is.items() if model not in (None, "target")]
    if before is None or not sources:
        return
    best = {domain: min(source[domain] for source in sources) for domain in before}
    for row, record in rows.items():
        if as_is[row] is None:
            record["gap_closed"] = gap_closed(record["bpb"], before, best)


def _pools(seeds: Sequence[SeedResult]) -> dict[str, dict[str, float]]:
    """Pools of the aligned sources by selector, and the target before training, mean of the seeds.

    They are of the rows that every source has a distribution for.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for seen in seeds:
        if seen.pool:
            pools = {**seen.pool["pool_bpb"], "target": seen.pool["target_bpb"]}
            for name, by_domain in pools.items():
                for domain, value in by_domain.items():
                    found.setdefault(name, {}).setdefault(domain, []).append(value)
    return {
        name: {domain: float(np.mean(values)) for domain, values in by_domain.items()}
        for name, by_domain in found.items()
    }
