"""Figures of `make bench-interference` from what its study has seen: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from fuse_eval.study.config import StudyConfig
from fuse_eval.study.figures import MEAN, Change, changes
from fuse_eval.study.results import SeedResult

CONTROL, OURS, TODAY = "control", "ours", "ungated"
RIVALS = ("min_ce", "avg_ce", "fusion_x")
DEMO, REAL, LARGE = "demo", "real", "real-large"
REAL_TOKENS = {REAL: 45_000, LARGE: 150_000}
"""Training tokens of the target on published models."""
SPOILED = {"spoiled-domain": "prose", "spoiled-source": "facts"}
"""The domain in which no source should be better than the trained control."""

Settings = Mapping[str, Mapping[str, Any]]
"""Figures of each setting, as in study.json."""


def worst_domain(setting: Mapping[str, Any]) -> dict[str, Any]:
    """The domain that ours changes most for the worse."""
    found = {d: c for d, c in setting["rows"][OURS]["against_control"].items() if d != MEAN}
    domain = max(found, key=lambda name: found[name]["value"])
    return {"domain": domain, **found[domain]}


def gain_kept(setting: Mapping[str, Any] | None) -> float | None:
    """Mean gain over the control, ours over that without the gate; None without gain or trainings."""
    rows = {} if setting is None else setting["rows"]
    if not {OURS, TODAY} <= rows.keys():
        return None
    ours, today = (rows[row]["against_control"][MEAN]["value"] for row in (OURS, TODAY))
    return ours / today if today < 0 else None


def interference_ratios(settings: Iterable[Mapping[str, Any]], key: str) -> dict[str, float | None]:
    """Summed excess of ours over each rival's, over all settings; None where a rival has none.

    Args:
        settings: Those that have all rivals.
        key: `excess_nats` (documents worse beyond the noise) or `every_nats`.
    """
    found: dict[str, float | None] = {}
    for rival in RIVALS:
        pairs = [
            [setting["rows"][row]["interference"][key] for row in (OURS, rival)]
            for setting in settings
            if rival in setting["rows"] and OURS in setting["rows"]
        ]
        ours, theirs = map(sum, zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
        if pairs:
            found[rival] = ours / theirs if theirs else None
    return found


class Forecast(NamedTuple):
    """Shares of the control's bits per byte saved by ours in one domain.

    Args:
        forecast: By `eval pool`, before training.
        came: On the test split.
    """

    forecast: float
    came: float


def checked_forecasts(seen: SeedResult, study: StudyConfig) -> dict[str, Forecast]:
    """Forecast and what came by domain; {} where nothing was forecast."""
    if not seen.pool.get("forecast") or OURS not in seen.blocks.nats:
        return {}
    came = changes([seen], OURS, study.control, study)
    gains = {domain: found["gain"] for domain, found in seen.pool["forecast"].items()}
    return {d: Forecast(gain, -came[d].value) for d, gain in gains.items()}


def forecast_error(checked: Sequence[Mapping[str, Forecast]]) -> float | None:
    """Summed absolute error of all domains over the summed absolute gain that came."""
    pairs = [pair for by_domain in checked for pair in by_domain.values()]
    came = sum(abs(pair.came) for pair in pairs)
    return sum(abs(pair.forecast - pair.came) for pair in pairs) / came if came else None


def ranks_domains_right(checked: Mapping[str, Forecast]) -> bool:
    """Whether the domains come in the forecast's order."""
    forecast = sorted(checked, key=lambda domain: checked[domain].forecast)
    return forecast == sorted(checked, key=lambda domain: checked[domain].came)


def best_source_over_control(seen: SeedResult, domain: str) -> float:
    """How far the best source is above the control in a domain: above 0 where none can teach."""
    blocks, rows = seen.blocks, np.asarray(seen.blocks.domains) == domain
    nats, num_bytes = blocks.nats[CONTROL][rows].sum(), blocks.num_bytes[rows].sum()
    best = min(by_domain[domain] for by_domain in seen.pool["alone_bpb"].values())
    return float(best / (nats / np.log(2) / num_bytes) - 1)


def all_figures(
    study: StudyConfig,
    settings: Settings,
    seeds: Mapping[str, Sequence[SeedResult]],
    at_rates: Mapping[str, Mapping[str, Change]],
    ratios: tuple[float | None, float | None],
) -> dict[str, Any]:
    """What the last line says.

    Args:
        study: The study.
        settings: Of each setting the figures.
        seeds: Of each setting what was seen.
        at_rates: Of settings on published models the change of the mean at each rate.
        ratios: Time over that without the gate: of a step, and of a training with evaluations.
    """
    whole = {name: s for name, s in settings.items() if name != LARGE and OURS in s["rows"]}
    forecasts = {
        name: [found for seen in seeds[name] if (found := checked_forecasts(seen, study))]
        for name in whole
    }
    checked = [by_domain for found in forecasts.values() for by_domain in found]
    return {
        "worst_domain": {name: worst_domain(setting) for name, setting in whole.items()},
        "mean_gain_kept": gain_kept(settings.get(DEMO)),
        "mean_gain_real": {
            str(REAL_TOKENS[name]): {rate: asdict(change) for rate, change in rates.items()}
            for name, rates in at_rates.items()
        },
        "interference_ratio": interference_ratios(whole.values(), "excess_nats"),
        "interference_ratio_every": interference_ratios(whole.values(), "every_nats"),
        "forecast_error": forecast_error(checked),
        "forecast_ranks_right": [sum(map(ranks_domains_right, checked)), len(checked)],
        "step_ratio": ratios[0],
        "seconds_ratio": ratios[1],
        "best_source_over_control": {
            name: [best_source_over_control(seen, domain) for seen in seeds[name] if seen.pool]
            for name, domain in SPOILED.items()
            if name in settings
        },
        "forecasts": {
            name: [{d: pair._asdict() for d, pair in by.items()} for by in found]
            for name, found in forecasts.items()
        },
        "settings": {
            name: {
                row: {key: found[key] for key in ("tuning", "against_control", "interference")}
                for row, found in setting["rows"].items()
                if "interference" in found
            }
            for name, setting in settings.items()
        },
    }


def at_rate(seen: SeedResult, ours: Sequence[float], control: Sequence[float]) -> SeedResult:
    """A seed with the scores of ours and of the control at one rate in place of the best."""
    nats = {OURS: np.asarray(ours), CONTROL: np.asarray(control)}
    return replace(seen, blocks=replace(seen.blocks, nats=nats))
