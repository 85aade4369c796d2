"""Figures of `make bench-interference` from scores: pure functions, nothing is trained or read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.interference_settings import (
    CONTROL,
    LARGE,
    OURS,
    REAL_RATES,
    REAL_TOKENS,
    RIVALS,
    TODAY,
    Recipe,
)
from fuse_eval.interference.blocks import Blocks
from fuse_eval.interference.documents import document_differences
from fuse_eval.intervals import resampled_bpb, units_by_domain

SAMPLES, CONFIDENCE = 2000, 0.95
MEAN = "mean"
"""Key of the mean over domains, each with equal weight."""

ByDomain = dict[str, float]


class Change(NamedTuple):
    """A relative change of bits per byte with its interval; negative is better."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one setting at one seed.

    Args:
        valid: Mean bits per byte on the valid split of each recipe, at its best evaluation.
        blocks: The test split, NLL by `str(recipe)`.
        alone: Source to domain to bits per byte before training, on the test split.
        forecast: Gain by domain as `eval pool` forecasts it; None where it does not.
    """

    valid: Mapping[Recipe, float]
    blocks: Blocks
    alone: Mapping[str, Mapping[str, float]]
    forecast: Mapping[str, float] | None = None

    def best(self, method: str, lr: float | None = None) -> Recipe:
        """The method's recipe that is best on valid text, of all or of those at one rate."""
        asked = [r for r in self.valid if r.method == method and lr in (None, r.lr)]
        return min(asked, key=lambda recipe: (self.valid[recipe], recipe))

    @property
    def methods(self) -> list[str]:
        """In the order of training."""
        return list(dict.fromkeys(recipe.method for recipe in self.valid))


Pair = Callable[[Seen], tuple[Recipe, Recipe]]
"""Which two recipes of a seed are compared."""


def best_pair(method: str) -> Pair:
    """The method at its best against the control at its best."""
    return lambda seen: (seen.best(method), seen.best(CONTROL))


def rate_pair(lr: float) -> Pair:
    """Ours against the control, both at one rate, each at its best number of passes."""
    return lambda seen: (seen.best(OURS, lr), seen.best(CONTROL, lr))


def changes(seeds: Sequence[Seen], pair: Pair, *, samples: int = SAMPLES) -> dict[str, Change]:
    """Relative change by domain and in the mean of domains, mean of the seeds.

    Intervals are of a paired bootstrap over documents, drawn for each seed by itself: the noise of
    the text. How far seeds lie apart is no part of it.

    Args:
        seeds: The setting at each seed.
        pair: What is compared.
        samples: Resamples.
    """
    rng = np.random.default_rng(0)
    points: dict[str, list[float]] = {}
    draws: dict[str, list[np.ndarray]] = {}
    for seen in seeds:
        names = [str(recipe) for recipe in pair(seen)]
        blocks = seen.blocks
        nats = {name: blocks.nats[name] for name in names}
        units = units_by_domain(
            nats, blocks.num_bytes.astype(np.float64), blocks.domains, blocks.document_ids
        )
        point = {d: np.array([unit.bpb(name) for name in names]) for d, unit in units.items()}
        drawn = {
            d: resampled_bpb(np.stack([u.nats[n] for n in names]), u.num_bytes, samples, rng)
            for d, u in units.items()
        }
        point[MEAN] = np.mean(list(point.values()), axis=0)
        drawn[MEAN] = np.mean(list(drawn.values()), axis=0)
        for key in point:
            points.setdefault(key, []).append(float(point[key][0] / point[key][1] - 1))
            draws.setdefault(key, []).append(drawn[key][:, 0] / drawn[key][:, 1] - 1)
    ends = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    return {
        key: Change(
            float(np.mean(points[key])),
            *map(float, np.quantile(np.mean(draws[key], axis=0), ends)),
        )
        for key in points
    }


def worst(found: Mapping[str, Change]) -> tuple[str, Change]:
    """The domain that fusing changes most for the worse."""
    domain = max((key for key in found if key != MEAN), key=lambda key: found[key].value)
    return domain, found[domain]


class Excess(NamedTuple):
    """NLL above the control's in nats, summed over documents."""

    beyond_noise: float
    """Over those that are worse beyond the noise."""
    every: float
    """Over all that score worse."""


def excess(seen: Seen, method: str) -> Excess:
    """What a method at its best makes worse."""
    model, against = (str(recipe) for recipe in best_pair(method)(seen))
    found = document_differences(seen.blocks, model, against)
    nats = found.excess_nats
    return Excess(float(nats[found.worse(CONFIDENCE)].sum()), float(nats.sum()))


def total_excess(all_seen: Iterable[Seen], method: str) -> Excess:
    """The same over settings and seeds."""
    return Excess(*map(sum, zip(*(excess(seen, method) for seen in all_seen), strict=True)))


def interference_ratios(all_seen: Sequence[Seen]) -> dict[str, dict[str, float | None]]:
    """Total excess of ours over each rival's, both ways of summing; None where a rival has none."""
    found: dict[str, dict[str, float | None]] = {key: {} for key in Excess._fields}
    for rival in RIVALS:
        if all_seen and all(rival in seen.methods for seen in all_seen):
            ours, theirs = (total_excess(all_seen, method) for method in (OURS, rival))
            for key, a, b in zip(Excess._fields, ours, theirs, strict=True):
                found[key][rival] = a / b if b else None
    return found


class Forecast(NamedTuple):
    """Shares of the control's bits per byte saved by ours in one domain.

    Args:
        forecast: By `eval pool`, before training.
        came: On the test split.
    """

    forecast: float
    came: float


def checked_forecasts(seen: Seen) -> dict[str, Forecast] | None:
    """Forecast and what came by domain; None where nothing was forecast."""
    if seen.forecast is None:
        return None
    came = changes([seen], best_pair(OURS), samples=1)
    return {d: Forecast(gain, -came[d].value) for d, gain in seen.forecast.items()}


def forecast_error(checked: Sequence[Mapping[str, Forecast]]) -> float | None:
    """Summed absolute error of all domains over the summed absolute gain that came."""
    pairs = [pair for by_domain in checked for pair in by_domain.values()]
    came = sum(abs(pair.came) for pair in pairs)
    return sum(abs(pair.forecast - pair.came) for pair in pairs) / came if came else None


def ranks_domains_right(checked: Mapping[str, Forecast]) -> bool:
    """Whether the domains come in the forecast's order."""
    forecast = sorted(checked, key=lambda domain: checked[domain].forecast)
    return forecast == sorted(checked, key=lambda domain: checked[domain].came)


def best_source_over_control(seen: Seen, domain: str) -> float:
    """How far the best source is above the control in a domain: above 0 where none can teach."""
    control = seen.best(CONTROL)
    blocks, rows = seen.blocks, np.asarray(seen.blocks.domains) == domain
    nats, num_bytes = blocks.nats[str(control)][rows].sum(), blocks.num_bytes[rows].sum()
    best = min(by_domain[domain] for by_domain in seen.alone.values())
    return float(best / (nats / np.log(2) / num_bytes) - 1)


def all_figures(
    found: Mapping[str, Sequence[Seen]],
    spoiled: Mapping[str, str],
    ratios: tuple[float | None, float | None],
) -> dict[str, Any]:
    """What the last line says.

    Args:
        found: What was seen by setting, one for each seed.
        spoiled: Setting to the domain that is spoiled.
        ratios: Time over that without the gate: of a step, and of a training with evaluations.
    """
    asked = {name: seeds for name, seeds in found.items() if name != LARGE}
    ours = {name: changes(seeds, best_pair(OURS)) for name, seeds in asked.items()}
    everything = [seen for seeds in asked.values() for seen in seeds]
    ratios_of = interference_ratios(everything)
    forecasts = {n: list(filter(None, map(checked_forecasts, s))) for n, s in asked.items()}
    checked = [by_domain for seeds in forecasts.values() for by_domain in seeds]
    return {
        "worst_domain": {
            name: {"domain": worst(by)[0], **worst(by)[1]._asdict()} for name, by in ours.items()
        },
        "mean_gain_kept": gain_kept(found.get("demo", ())),
        "mean_gain_real": {
            str(tokens): {
                f"{lr:g}": changes(found[name], rate_pair(lr))[MEAN]._asdict() for lr in REAL_RATES
            }
            for name, tokens in REAL_TOKENS.items()
            if name in found
            and all(any(r.lr == lr for r in found[name][0].valid) for lr in REAL_RATES)
        },
        "interference_ratio": ratios_of["beyond_noise"],
        "interference_ratio_every": ratios_of["every"],
        "forecast_error": forecast_error(checked),
        "forecast_ranks_right": [sum(map(ranks_domains_right, checked)), len(checked)],
        "step_ratio": ratios[0],
        "seconds_ratio": ratios[1],
        "settings": {name: setting_record(seeds) for name, seeds in found.items()},
        "best_source_over_control": {
            name: [best_source_over_control(seen, domain) for seen in found[name]]
            for name, domain in spoiled.items()
            if name in found
        },
        "forecasts": {
            name: [{d: pair._asdict() for d, pair in by.items()} for by in seeds]
            for name, seeds in forecasts.items()
        },
    }


def gain_kept(seeds: Sequence[Seen]) -> float | None:
    """Mean gain over the control, ours over that without the gate; None without gain or trainings."""
    if not seeds or not all(TODAY in seen.methods for seen in seeds):
        return None
    ours, today = (changes(seeds, best_pair(m))[MEAN].value for m in (OURS, TODAY))
    return ours / today if today < 0 else None


def setting_record(seeds: Sequence[Seen]) -> dict[str, Any]:
    """Of each method the chosen recipes, and what it changes against the control."""
    return {
        method: {
            "recipes": [str(seen.best(method)) for seen in seeds],
            **(_against_control(seeds, method) if method != CONTROL else {}),
        }
        for method in seeds[0].methods
    }


def _against_control(seeds: Sequence[Seen], method: str) -> dict[str, Any]:
    found = changes(seeds, best_pair(method))
    return {
        "changes": {key: change._asdict() for key, change in found.items()},
        "excess_nats": total_excess(seeds, method)._asdict(),
    }
