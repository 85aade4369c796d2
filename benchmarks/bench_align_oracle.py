"""`make bench-align-oracle`: how far an alignment is from what the source itself says.

At a sample of positions the source is asked for its exact distribution over the target's next token
(align_oracle.py). Every method's row is held against it: KL and total variation in the mean, by kind
of text and of position, with the worst positions shown as text. Small pairs by default, the published
models of `make real` by name.

    python -m benchmarks.bench_align_oracle
    python -m benchmarks.bench_align_oracle --pairs qwen-smollm2,gemma-smollm2,smollm2-qwen
    python -m benchmarks.bench_align_oracle --quick

The last line is one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from align.papers.entry_maps import EntryMap, Vocabularies
from align.papers.mapped import MappedAligner
from benchmarks.align_oracle import (
    ModelRows,
    SourcePieces,
    TargetText,
    Truth,
    divergence,
    truth_at,
)
from benchmarks.align_pairs import MAX_ENTRIES, Pair, as_segments
from benchmarks.oracle_branches import branched, chance_past_ends
from benchmarks.oracle_pairs import (
    COUNTED_BYTES,
    DOMAINS,
    PUBLISHED,
    RULES,
    OraclePair,
    mixed_texts,
    model_rows,
    published_pair,
    segments_of,
    small_pair,
)
from extract.branch_config import BranchOptions
from launch.progress import Progress
from store_schema.layout import Arrays, Origin

ROOT = Path(__file__).resolve().parent.parent

Row = dict[int, float]
"""Target token to probability; what is left of 1 is of no token."""

OURS, BRANCHED = "bytes", "bytes, branches"
BASELINES = ("mined", "stats", "gold", "h_kl", "p_kl", "byte_prefix")
WORST_SHOWN, SHOWN_BEFORE = 10, 48
FIRST_POSITION = 3
"""Before it neither side has read anything."""
KINDS = {Origin.BOUNDARY: "a source token begins", Origin.INSIDE: "inside a source token"}


class Distance(NamedTuple):
    """A row's from the truth."""

    kl: float
    variation: float


@dataclass
class Seen:
    """One position.

    Args:
        domain: Kind of text.
        kind: Of position.
        truth: There.
        distances: By method.
        shown: The text before, the label, the truth and our row, for people.
    """

    domain: str
    kind: str
    truth: Truth
    distances: dict[str, Distance]
    shown: str


@dataclass
class Domain:
    """Held-out segments of one kind of text, read and scored."""

    name: str
    texts: list[bytes]
    source: Arrays
    own: Sequence[Any]
    read: Sequence[Any]
    aligned: dict[str, Arrays] = field(default_factory=dict)

    @classmethod
    def of(cls, pair: OraclePair, name: str, number: int) -> Domain:
        """Scored by the pair's source."""
        segments = as_segments(segments_of(name, number))
        own, read = pair.source.encode(segments), pair.target.encode(segments)
        texts = [segment.text.encode() for segment in segments]
        return cls(name, texts, model_rows(pair.model, own), own, read)


def row_of(arrays: Arrays, row: int) -> Row:
    """Entries of an aligned row."""
    here = slice(int(arrays["entry_offsets"][row]), int(arrays["entry_offsets"][row + 1]))
    masses = np.exp(arrays["entry_logprobs"][here].astype(np.float64))
    return dict(zip(arrays["entry_ids"][here].tolist(), masses.tolist(), strict=True))


def distance(truth: Truth, row: Row, num_ids: int) -> Distance:
    """Of a row."""
    ids, masses = np.array(list(row), np.int64), np.array(list(row.values()), np.float64)
    return Distance(*divergence(truth, ids, masses, num_ids))


def mapped_aligners(pair: OraclePair) -> dict[str, MappedAligner]:
    """The methods of 2025 and 2026, as `align run` makes them."""
    both = Vocabularies(pair.source, pair.target)
    tables = {"gold": both.shared, "h_kl": both.hybrid, "p_kl": both.projection}
    tables["byte_prefix"] = both.prefixes
    return {
        name: MappedAligner(
            EntryMap.of(table, pair.source.vocab_size), both, MAX_ENTRIES, name == "byte_prefix"
        )
        for name, table in tables.items()
    }


def look(pair: OraclePair, domain: Domain, number: int, seed: int) -> Iterator[Seen]:
    """Some positions of each segment.

    Args:
        pair: Source and target.
        domain: Text, with aligned rows.
        number: Positions of a segment.
        seed: Of their choice.
    """
    chance = np.random.default_rng(seed)
    pieces = SourcePieces(pair.source.vocabulary, pair.source.eos_id)
    offsets = domain.aligned[OURS]["token_offsets"]
    for d, (text, own, read) in enumerate(zip(domain.texts, domain.own, domain.read, strict=True)):
        rows = ModelRows(pair.model, own.context_ids, own.token_ids.tolist())
        there = np.arange(FIRST_POSITION, len(read.token_ids))
        for j in sorted(chance.permutation(there)[:number].tolist()):
            truth = truth_at(rows, pieces, TargetText(pair.target, text, read, j), text, own)
            row = int(offsets[d]) + j
            if truth is None or not truth.mass:
                continue
            made = {name: row_of(arrays, row) for name, arrays in domain.aligned.items()}
            found = {n: distance(truth, r, pair.target.vocab_size) for n, r in made.items()}
            kind = KINDS.get(Origin(int(domain.aligned[OURS]["origin"][row])), "nothing known")
            shown = _shown(pair, text, read, j, truth, made[OURS])
            yield Seen(domain.name, kind, truth, found, shown)


def _shown(pair: OraclePair, text: bytes, read: Any, j: int, truth: Truth, ours: Row) -> str:
    tokens, begin = pair.target.vocabulary.tokens, int(read.byte_ends[j - 1])

    def best(row: Mapping[int, float]) -> str:
        first = sorted(row.items(), key=lambda item: -item[1])[:5]
        return ", ".join(f"{_text(tokens[token])} {mass:.3f}" for token, mass in first)

    before = _text(text[max(0, begin - SHOWN_BEFORE) : begin])
    label = _text(tokens[int(read.token_ids[j])])
    return f"...{before} | {label}\n    source: {best(truth.mass)}\n    row:    {best(ours)}"


def _text(written: bytes) -> str:
    return repr(written.decode(errors="replace"))[1:-1] or "(end)"


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def table(seen: Sequence[Seen], key: Callable[[Seen], str]) -> dict[str, dict[str, Distance]]:
    """Method to group to mean distances."""
    groups: defaultdict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        groups[key(one)].append(one)
    return {
        method: {
            name: Distance(
                mean([one.distances[method].kl for one in group]),
                mean([one.distances[method].variation for one in group]),
            )
            for name, group in groups.items()
        }
        for method in seen[0].distances
    }


def show(title: str, seen: Sequence[Seen], key: Callable[[Seen], str]) -> None:
    """A table for people."""
    found = table(seen, key)
    groups = list(next(iter(found.values())))
    print(f"\n{title}: KL in nats (total variation)")
    print(f"{'':<24}" + "".join(f"{name:>24}" for name in groups) + f"{'mean':>18}")
    for method, by_group in found.items():
        cells = "".join(f"{d.kl:>16.4f} ({d.variation:.3f})" for d in by_group.values())
        kl, variation = (mean([d[i] for d in by_group.values()]) for i in (0, 1))
        print(f"{method:<24}{cells}{kl:>10.4f} ({variation:.3f})")


def look_at_pair(
    name: str, out: Path, *, positions: int, segments: int, seed: int, branches: BranchOptions
) -> list[Seen]:
    """All positions of one pair."""
    if name in PUBLISHED:
        pair = published_pair(name, ROOT / "runs/real/inputs/models")
    else:
        pair = small_pair(name, out)
    counted = as_segments(mixed_texts(COUNTED_BYTES))
    made, chance_V = Pair(pair.source, pair.target, counted), chance_past_ends(pair, counted)
    aligners = made.aligners() | mapped_aligners(pair)
    found: list[Seen] = []
    with Progress(f"ask {name}", len(DOMAINS) * segments * positions, unit="position") as progress:
        for domain_name in DOMAINS:
            domain = Domain.of(pair, domain_name, segments)
            for method, aligner in aligners.items():
                domain.aligned[method] = aligner.align(domain.source, domain.texts, domain.read)
            rows = branched(pair, domain.source, domain.own, chance_V, branches)
            domain.aligned[BRANCHED] = aligners[OURS].align(rows, domain.texts, domain.read)
            for one in look(pair, domain, positions, seed):
                found.append(one)
                progress.add(1)
    return found


def figures(seen: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
    """For programs. Means are over kinds of text, then over pairs."""
    kl = {
        pair: {
            method: {domain: d.kl for domain, d in by_domain.items()}
            for method, by_domain in table(found, lambda one: one.domain).items()
        }
        for pair, found in seen.items()
    }
    means = {
        method: mean([mean(list(by[method].values())) for by in kl.values()])
        for method in next(iter(kl.values()))
    }
    baselines = {method: means[method] for method in BASELINES}
    best = min(baselines, key=baselines.__getitem__)
    every = [one for found in seen.values() for one in found]
    domains = list(next(iter(kl.values()))[OURS])
    by_domain = {
        method: {name: mean([by[method][name] for by in kl.values()]) for name in domains}
        for method in (OURS, BRANCHED)
    }
    return {
        "oracle_kl_ratio": means[BRANCHED] / means[OURS],
        "oracle_kl_ratio_by_text": {
            n: by_domain[BRANCHED][n] / by_domain[OURS][n] for n in domains
        },
        "oracle_kl": kl,
        "oracle_kl_mean": means,
        "oracle_kl_vs_best_baseline": means[OURS] / baselines[best],
        "best_baseline": best,
        "positions": {pair: len(found) for pair, found in seen.items()},
        "remainder": mean([one.truth.remainder for one in every]),
        "elsewhere": mean([one.truth.elsewhere for one in every]),
        "rows_asked": mean([float(one.truth.nodes) for one in every]),
    }


@click.command()
@click.option("--pairs", default=",".join(RULES), show_default=True)
@click.option("--segments", default=12, show_default=True, help="Of each kind of text.")
@click.option("--positions", default=4, show_default=True, help="Of each segment.")
@click.option("--seed", default=0, show_default=True)
@click.option("--per-position", default=0.3, show_default=True, help="Branches of a position.")
@click.option("--quick", is_flag=True, help="One pair, a few positions.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/bench/oracle", show_default=True
)
def main(
    pairs: str,
    segments: int,
    positions: int,
    seed: int,
    per_position: float,
    quick: bool,
    out: Path,
) -> None:
    """Ask, compare, print tables, and one JSON object as the last line."""
    branches = BranchOptions(per_position=per_position)
    names = pairs.split(",")[:1] if quick else pairs.split(",")
    for name in names:
        if name not in RULES and name not in PUBLISHED:
            raise click.UsageError(f"no pair {name!r}: there are {', '.join((*RULES, *PUBLISHED))}")
    if quick:
        segments, positions = 2, 2
    seen: dict[str, list[Seen]] = {}
    for name in names:
        started = time.monotonic()
        seen[name] = look_at_pair(
            name, out, positions=positions, segments=segments, seed=seed, branches=branches
        )
        seconds = time.monotonic() - started
        print(f"\n{name}: {len(seen[name])} positions, {seconds:.0f} s")
        show("by kind of text", seen[name], lambda one: one.domain)
        show("by kind of position", seen[name], lambda one: one.kind)
        worst = sorted(seen[name], key=lambda one: -one.distances[OURS].kl)[:WORST_SHOWN]
        print(f"\nworst of {OURS}")
        for one in worst:
            print(f"{one.domain}, KL {one.distances[OURS].kl:.3f}, {one.kind}: {one.shown}")
    print(json.dumps(figures(seen)))


if __name__ == "__main__":
    main()
