"""`make bench-select`: does the selector learn, and what is that worth against what need not learn?

Small sources of six kinds of text are made on the spot, each with a tokenizer of its own, and aligned
to one more (select_inputs.py). Selectors are trained on one part of text that no source has seen and
measured on another, as bits per byte of their pools, mean of the domains; intervals are paired, by
document. Pools are scored span by span (fuse_train/selectors/pools.py). All is done for three seeds;
what is finished is not done again.

    python -m benchmarks.bench_select                    # everything
    python -m benchmarks.bench_select --seed 1           # one seed alone

The last line is one JSON object: `asn_minus_best` ({seed: [mean, low, high]} in bpb, against the best
of what needs no hindsight, chosen on the very text), `switching_gain_over_hedge` (share of bits saved
on text that switches, mean of seeds, against the hedge tuned for such text), `random_source_cost` and
`random_source_weight`, `leave_one_out_recovery`, `asn_step_share`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.select_inputs import RANDOM, Inputs
from fuse_train.selectors.by_name import learner
from fuse_train.selectors.kinds.asn import AsnSection

ROOT = Path(__file__).resolve().parent.parent

SECTION = AsnSection()
GOALS = {
    "switching_gain_over_hedge": 0.03,
    "random_source_cost": 0.005,
    "random_source_weight": 0.02,
    "leave_one_out_recovery": 0.8,
    "asn_step_share": 0.02,
}
SHAPES = (
    *("data/batch", "data/order", "data/samples", "data/stream", "loop/schedule", "losses/losses"),
    *(
        "selector_fit/selector_training",
        "selectors/asn",
        "selectors/features",
    ),
    *("selectors/kinds/asn", "selectors/kinds/bayes", "selectors/kinds/hedge"),
    *("selectors/gates", "selectors/hedge", "selectors/past", "selectors/pools"),
    "selectors/selectors",
)
"""Modules of fuse_train whose own code shapes the figures."""


def figures_fingerprint(held_out: bool) -> str:
    """Of all that shapes the figures of a seed, given its inputs."""
    digest = hashlib.sha256(SECTION.model_dump_json().encode() + bytes([held_out]))
    paths = [ROOT / "fuse_train" / f"{name}.py" for name in SHAPES]
    paths += [ROOT / "fuse_eval" / "intervals.py"]
    for path in (*paths, *sorted((ROOT / "benchmarks").glob("select_[dm]*.py"))):
        digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]


def figures_of(inputs: Inputs, held_out: bool) -> dict[str, Any]:
    """Figures of one seed, measured or read."""
    from benchmarks.select_data import SeedData
    from benchmarks.select_measure import measure

    inputs.make()
    path = inputs.folder / f"figures-{figures_fingerprint(held_out)}.json"
    if not path.is_file():
        print(f"\nseed {inputs.seed}", flush=True)
        record = measure(
            SeedData(inputs.run_file),
            SECTION,
            say=lambda t: print(t, flush=True),
            held_out=held_out,
        )
        path.write_text(json.dumps(record, indent=1) + "\n")
    return json.loads(path.read_text())


def cost_of(inputs: Inputs) -> dict[str, Any]:
    """What the ASN costs in a step; timed afresh each time."""
    from benchmarks.select_cost import asn_cost
    from benchmarks.select_data import SeedData
    from fuse_train.selector_fit.selector_training import new_selector

    data = SeedData(inputs.run_file)
    names = tuple(name for name in data.names if name != RANDOM)
    return asn_cost(data, new_selector(SECTION, learner("asn"), 0), names)


def summary(figures: Sequence[dict[str, Any]], cost: dict[str, Any]) -> dict[str, Any]:
    """For programs: means over seeds."""

    def mean(*keys: str) -> float | None:
        values: list[Any] = list(figures)
        for key in keys:
            values = [value[key] for value in values if key in value]
        return statistics.mean(values) if values else None

    switching = mean("switching", "any_rate", "value")
    return {
        "asn_minus_best": {str(one["seed"]): one["asn_minus_best"] for one in figures},
        "switching_gain_over_hedge": None if switching is None else -switching,
        "random_source_cost": mean("random", "cost"),
        "random_source_weight": mean("random", "weight"),
        "leave_one_out_recovery": mean("left_out", "recovery"),
        "asn_step_share": cost["step_share"],
    }


def show(figures: Sequence[dict[str, Any]], cost: dict[str, Any], found: dict[str, Any]) -> None:
    """For people: each seed, then the goals."""
    for one in figures:
        pools = one["bpb"]
        domains = list(pools["asn"])
        print(f"\nseed {one['seed']}: bits per byte of held-out text")
        print(" " * 24 + "".join(f"{d[:11]:>12}" for d in [*domains, "mean"]))
        for name, values in pools.items():
            mark = f"{name} *" if name in one["hindsight"] else name
            cells = [*values.values(), statistics.mean(values.values())]
            print(f"{mark:24}" + "".join(f"{cell:>12.4f}" for cell in cells))
        difference, low, high = one["asn_minus_best"]
        print(f"asn against {one['best']}: {difference:+.4f} bpb [{low:+.4f}, {high:+.4f}]")
        for change in one["switching"].values():
            print(
                f"on text that switches, against hedge (rate {change['rate']}, share "
                f"{change['share']}): {change['value']:+.2%} [{change['low']:+.2%}, "
                f"{change['high']:+.2%}]"
            )
        random = one["random"]
        print(
            f"random source: cost {random['cost']:+.2%}, weight {random['weight']:.4f}; met at test "
            f"alone: {random['cost_met_at_test']:+.2%}, {random['weight_met_at_test']:.4f}"
        )
        spread = one["spread"]
        print(
            f"gates: entropy {spread['entropy_nats']:.2f} nats, {spread['sources_kept']:.2f} sources "
            "kept, standard deviation over rows "
            + ", ".join(f"{n} {v:.2f}" for n, v in spread["standard_deviation"].items())
        )
        if "left_out" in one:
            print(f"left out and added at test: {one['left_out']['recovery']:.0%} of the gain")
    print("* hindsight: weights saw the labels they weigh")
    print(
        f"\nthe ASN: {cost['parameters']:,} parameters, {cost['flops'] / 1e9:.2f} GFLOP a step of "
        f"{cost['rows']:,} rows, {cost['asn_seconds'] * 1e3:.1f} ms of {cost['step_seconds']:.2f} s; "
        f"features: {cost['features_rows_per_second']:,.0f} rows/s, beside the loop"
    )
    print("\ngoals")
    clear = all(high < 0 for _, _, high in found["asn_minus_best"].values())
    print(f"  asn below the best, clear of zero, on every seed: {'met' if clear else 'MISSED'}")
    for name, goal in GOALS.items():
        value = found[name]
        more = name in ("switching_gain_over_hedge", "leave_one_out_recovery")
        met = value is not None and (value >= goal if more else value <= goal)
        shown = "not measured" if value is None else f"{value:.4f}"
        print(
            f"  {name} {shown}, goal at {'least' if more else 'most'} {goal}: "
            f"{'met' if met else 'MISSED'}"
        )


@click.command()
@click.option("--seed", "seeds", type=int, multiple=True, help="May be repeated; default: 0, 1, 2.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/bench/select"), show_default=True
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=ROOT.parent / "shared" / "data",
    help="Folder with gsm8k/ and tinyshakespeare/.",
)
@click.option("--leave-one-out/--no-leave-one-out", default=True, show_default=True)
def main(seeds: tuple[int, ...], out: Path, data: Path, leave_one_out: bool) -> None:
    """Make what is missing, measure, print tables, and one JSON object as the last line."""
    torch.set_num_threads(1)
    made = [Inputs(seed, out.resolve(), data.resolve()) for seed in seeds or (0, 1, 2)]
    figures = [figures_of(inputs, leave_one_out) for inputs in made]
    cost = cost_of(made[0])
    found = summary(figures, cost)
    show(figures, cost, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
