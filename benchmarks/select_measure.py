"""What `make bench-select` compares on one seed: selectors on held-out text, paired by document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.select_data import SeedData, mean_bpb
from benchmarks.select_inputs import RANDOM, SWITCHING
from fuse_eval.intervals import DomainUnits, compare
from fuse_train.data.batch import sources_of
from fuse_train.selector_fit.selector_training import known_logprobs, train_selector
from fuse_train.selectors.asn import AdaptiveSelector
from fuse_train.selectors.by_name import by_rule, learner
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.kinds.bayes import search_weights
from fuse_train.selectors.selectors import Selector, StaticSelector

RATES = (0.5, 0.7, 1.0)
SHARES = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Of the hedge; the best pair on valid text is taken."""

BAYES_TRIALS = 100
RESAMPLES = 2000

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the ASN is trained.

    Args:
        section: As in a run file.
        seed: Of its weights.
    """

    section: AsnSection
    seed: int

    def train(self, data: SeedData, names: tuple[str, ...], kind: Any = "asn") -> AdaptiveSelector:
        """On the training split of some sources."""
        stream = data.stream(names, self.section.pretrain_batch_segments)
        return train_selector(stream, self.section, learner(kind), seed=self.seed)


def tuned_hedge(
    data: SeedData,
    names: tuple[str, ...],
    domains: Iterable[str],
    rates: Iterable[float] = RATES,
) -> tuple[float, float]:
    """Rate and share with the least mean bits per byte of valid text of some domains."""
    chosen = list(domains)
    pairs = [(rate, share) for rate in rates for share in SHARES]
    nats = {
        str(pair): data.nats(by_rule("hedge", rate=pair[0], share=pair[1]), "valid", names)
        for pair in pairs
    }
    units = data.units(nats, "valid", chosen)
    return min(pairs, key=lambda pair: mean_bpb(units, str(pair)))


def measure(data: SeedData, section: AsnSection, *, say: Say, held_out: bool) -> dict[str, Any]:
    """All comparisons of one seed, JSON-like.

    Args:
        data: Of the seed.
        section: How the ASN is trained.
        say: For people, a line at a time.
        held_out: Whether each source is left out in turn, the longest part.
    """
    names = tuple(name for name in data.names if name != RANDOM)
    recipe = Recipe(section, data.seed)
    started = time.monotonic()
    asn = recipe.train(data, names)
    seconds = time.monotonic() - started
    record: dict[str, Any] = {"seed": data.seed, "asn_seconds": seconds}
    pools = _pools(data, names, recipe, record) | {"asn": asn}
    nats = {name: data.nats(selector, "test", names) for name, selector in pools.items()}
    units = data.units(nats, "test")
    _show(units, pools, say)
    record["bpb"] = {n: {d: u.bpb(n) for d, u in units.items()} for n in pools}
    record["hindsight"] = [n for n, selector in pools.items() if selector.hindsight]
    record |= _against_best(units, pools, data.seed)
    record["switching"] = _switching(data, names, asn, nats, say)
    record["spread"] = _spread(data, asn, names)
    record["random"] = _with_random(data, names, recipe, asn)
    if held_out:
        record["left_out"] = _left_out(data, names, recipe, asn, say)
    return record


def _pools(
    data: SeedData, names: tuple[str, ...], recipe: Recipe, record: dict[str, Any]
) -> dict[str, Selector]:
    """Everything the ASN is compared with; what has settings is set on train or valid text."""
    count = len(names)
    alone = {f"{n} alone": StaticSelector(np.eye(count)[m].tolist()) for m, n in enumerate(names)}
    nats = {name: data.nats(one, "train", names) for name, one in alone.items()}
    units = data.units(nats, "train")
    static = {name: 2.0 ** -mean_bpb(units, name) for name in alone}
    rate, share = tuned_hedge(data, names, data.domains)
    weights = search_weights(
        known_logprobs(data.part("valid", names).batches, where="valid text"),
        trials=BAYES_TRIALS,
        seed=data.seed,
    )
    record["hedge"] = {"rate": rate, "share": share}
    record["bayes"] = dict(zip(names, weights, strict=True))
    paper = recipe.section.model_copy(
        update={"preset": "fusion-x", "cut": "threshold", "threshold": 0.15}
    )
    return alone | {
        "uniform": by_rule("uniform"),
        "static": StaticSelector(list(static.values())),
        "constant gate": recipe.train(data, names, "constant"),
        "Bayesian optimisation": StaticSelector(weights),
        "Bayes mixture": by_rule("hedge", rate=1.0, share=0.0),
        "hedge": by_rule("hedge", rate=rate, share=share),
        "min_ce": by_rule("min_ce"),
        "avg_ce": by_rule("avg_ce"),
        "fusion-x network": Recipe(paper, recipe.seed).train(data, names),
    }


def _against_best(
    units: Mapping[str, DomainUnits], pools: Mapping[str, Selector], seed: int
) -> dict[str, Any]:
    """The ASN against the one that is best on this very text, with a paired interval.

    The interval is that of the relative change, given in bits per byte of the other's mean.
    """
    rivals = [n for n, selector in pools.items() if n != "asn" and not selector.hindsight]
    best = min(rivals, key=lambda name: mean_bpb(units, name))
    return {"best": best, "asn_minus_best": paired_bpb(units, "asn", best, seed)}


def paired_bpb(
    units: Mapping[str, DomainUnits], model: str, against: str, seed: int
) -> list[float]:
    """Mean, low and high of the difference in bits per byte, 95 %."""
    found = compare(units, model, against, samples=RESAMPLES, confidence=0.95, seed=seed)["mean"]
    base = mean_bpb(units, against)
    return [found[key] * base for key in ("value", "low", "high")]


def _switching(
    data: SeedData,
    names: tuple[str, ...],
    asn: Selector,
    nats: Mapping[str, Any],
    say: Say,
) -> dict[str, Any]:
    """On text that switches, against hedges that are best on valid text that switches.

    Of all rates and shares, and of all shares with rate 1, the Bayes mixture with fixed share.
    """
    found: dict[str, Any] = {}
    for title, rates in (("any_rate", RATES), ("rate_1", (1.0,))):
        rate, share = tuned_hedge(data, names, SWITCHING, rates)
        hedge = data.nats(by_rule("hedge", rate=rate, share=share), "test", names)
        units = data.units({"asn": nats["asn"], "hedge": hedge}, "test", SWITCHING)
        one = compare(units, "asn", "hedge", samples=RESAMPLES, confidence=0.95, seed=data.seed)
        change = one["mean"]
        say(
            f"text that switches: asn {change['value']:+.2%} [{change['low']:+.2%}, "
            f"{change['high']:+.2%}] against hedge (rate {rate}, share {share})"
        )
        found[title] = {"rate": rate, "share": share, **change, "domains": one["domains"]}
    return found


@torch.no_grad()
def _spread(data: SeedData, asn: AdaptiveSelector, names: tuple[str, ...]) -> dict[str, Any]:
    """Whether gates vary with the input, and how many sources are kept."""
    gates, kept = [], []
    for batch in data.part("test", names).batches:
        sources = sources_of(batch)
        rows_BT = sources.covered_BTM.any(-1)
        gates_BTM = asn.gates(sources.view)
        gates.append(gates_BTM[rows_BT])
        kept.append((asn.keep(gates_BTM) > 0)[rows_BT].sum(-1))
    gates_RM = torch.cat(gates)
    entropy = -(gates_RM * gates_RM.clamp(min=1e-30).log()).sum(-1).mean()
    return {
        "standard_deviation": dict(zip(names, gates_RM.std(0).tolist(), strict=True)),
        "mean": dict(zip(names, gates_RM.mean(0).tolist(), strict=True)),
        "entropy_nats": float(entropy),
        "sources_kept": float(torch.cat(kept).double().mean()),
    }


def _with_random(
    data: SeedData, names: tuple[str, ...], recipe: Recipe, asn: AdaptiveSelector
) -> dict[str, float]:
    """Cost and weight of a source of random weights: trained with it, and met at test alone."""
    every = (*names, RANDOM)
    trained = recipe.train(data, every)
    nats = {
        "without": data.nats(asn, "test", names),
        "with": data.nats(trained, "test", every),
        "met": data.nats(asn, "test", every),
    }
    units = data.units(nats, "test")
    base = mean_bpb(units, "without")
    return {
        "cost": mean_bpb(units, "with") / base - 1,
        "weight": data.mean_weight(trained, "test", every, RANDOM),
        "cost_met_at_test": mean_bpb(units, "met") / base - 1,
        "weight_met_at_test": data.mean_weight(asn, "test", every, RANDOM),
    }


def _left_out(
    data: SeedData, names: tuple[str, ...], recipe: Recipe, asn: AdaptiveSelector, say: Say
) -> dict[str, Any]:
    """Each source left out of training in turn and added back at test."""
    full = data.nats(asn, "test", names)
    found: dict[str, Any] = {}
    for name in names:
        rest = tuple(n for n in names if n != name)
        other = recipe.train(data, rest)
        nats = {
            "full": full,
            "rest": data.nats(other, "test", rest),
            "added": data.nats(other, "test", names),
        }
        units = data.units(nats, "test")
        rest_bpb = mean_bpb(units, "rest")
        gain, kept = rest_bpb - mean_bpb(units, "full"), rest_bpb - mean_bpb(units, "added")
        found[name] = {"gain_bpb": gain, "gain_added_bpb": kept}
        say(f"without {name}: its gain {gain:.4f} bpb, added at test {kept:.4f}")
    gains = sum(one["gain_bpb"] for one in found.values())
    found["recovery"] = sum(v["gain_added_bpb"] for v in found.values()) / gains
    return found


def _show(units: Mapping[str, DomainUnits], pools: Mapping[str, Selector], say: Say) -> None:
    domains = list(units)
    say(f"{'bits per byte, test':26}" + "".join(f"{d[:11]:>12}" for d in [*domains, "mean"]))
    for name, selector in pools.items():
        cells = [*(units[d].bpb(name) for d in domains), mean_bpb(units, name)]
        mark = f"{name} *" if selector.hindsight else name
        say(f"{mark:26}" + "".join(f"{cell:>12.4f}" for cell in cells))
    say("* hindsight: weights saw the labels they weigh")
