"""`store stats`: every figure against a slow count of the same arrays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store_schema.disk.location import open_location
from store_schema.layout import Kind, Origin
from store_schema.plan.plan import Plan
from store_schema.presets import Preset
from store_tools import stats
from store_tools.places import find_places
from store_tools.stats import array_bytes, histogram, percentile, sample_of, store_stats
from store_tools.stats_sums import entropies
from tests.planned_store import (
    data_file,
    flip,
    make_run,
    ok,
    reader_of,
    refused,
    store_folder,
)


def slow_domains(folder: Path, kind: Kind) -> dict[str, dict[str, Any]]:
    """Entropy, bits per byte and counts by domain, one position after the other."""
    reader, plan = reader_of(folder, kind), Plan.open(open_location(folder / "run/plan"))
    found: dict[str, dict[str, Any]] = {}
    for shard in reader.commits:
        arrays = reader.read(shard)
        for place, segment in enumerate(plan.segments(plan.shards[shard])):
            sums = found.setdefault(
                segment.domain,
                {"positions": 0, "covered": 0, "entropy": 0.0, "nats": 0.0, "bytes": 0, "text": 0},
            )
            begin = 0
            sums["text"] += len(segment.text.encode())
            for i in range(*arrays["token_offsets"][place : place + 2].tolist()):
                row = arrays["entry_logprobs"][slice(*arrays["entry_offsets"][i : i + 2])]
                parts = [math.exp(x) for x in row.tolist()] + [float(arrays["tail_mass"][i])]
                sums["positions"] += 1
                if len(row):
                    sums["covered"] += 1
                    sums["entropy"] -= sum(p * math.log(p) for p in parts if p > 0)
                label, end = float(arrays["label_logprobs"][i]), int(arrays["byte_ends"][i])
                if not math.isnan(label):
                    sums["nats"] -= label
                    sums["bytes"] += end - begin
                begin = end
    return found


@pytest.mark.parametrize("preset", ["exact", "compact"])
@pytest.mark.parametrize("kind", ["source", "aligned"])
def test_figures_by_domain(tmp_path: Path, kind: Kind, preset: Preset) -> None:
    run_file = make_run(tmp_path, kinds=[kind], preset=preset)
    (found,) = json.loads(ok("stats", run_file, "--json"))["stores"]
    expected = slow_domains(tmp_path, kind)
    assert found["domains"].keys() == expected.keys() == {"code", "prose"}
    for domain, sums in expected.items():
        got = found["domains"][domain]
        assert got["positions"] == sums["positions"]
        assert got["bytes"] == sums["text"]
        assert got["label_bytes_share"] == pytest.approx(sums["bytes"] / sums["text"])
        assert got["covered"] == pytest.approx(sums["covered"] / sums["positions"])
        assert got["entropy_nats_per_position"] == pytest.approx(
            sums["entropy"] / sums["covered"], rel=1e-6
        )
        assert got["label_bpb"] == pytest.approx(
            sums["nats"] / math.log(2) / sums["bytes"], rel=1e-6
        )
        assert (got["source_bpb"] is None) == (kind == "source")


@pytest.mark.parametrize("kind", ["source", "aligned"])
def test_figures_of_all_positions(tmp_path: Path, kind: Kind) -> None:
    make_run(tmp_path, kinds=[kind])
    reader = reader_of(tmp_path, kind)
    shards = [reader.read(shard) for shard in sorted(reader.commits)]
    counts = np.concatenate([np.diff(arrays["entry_offsets"]) for arrays in shards])
    kept = 1 - np.concatenate([arrays["tail_mass"] for arrays in shards])[counts > 0]
    (place,) = find_places(str(store_folder(tmp_path, kind)))
    found = store_stats(place)
    assert (found["positions"], found["entries"]) == (len(counts), counts.sum())
    assert found["entries_per_position"]["mean"] == pytest.approx(counts.mean())
    for bucket in found["entries_per_position"]["histogram"]:
        inside = (counts >= bucket["from"]) & (counts <= bucket["to"])
        assert bucket["positions"] == inside.sum()
    assert found["kept_mass"]["mean"] == pytest.approx(kept.mean(), rel=1e-6)
    for share in (5, 50, 95):
        exact = np.percentile(kept, share, method="inverted_cdf")
        assert found["kept_mass"][f"p{share}"] == pytest.approx(exact, abs=1.01e-4)
    if kind == "aligned":
        origins = np.concatenate([arrays["origin"] for arrays in shards])
        for origin in Origin:
            share = (origins == origin).mean()
            assert found["origins"][origin.name.lower()] == pytest.approx(share)
    else:
        assert "origins" not in found


def test_bytes_are_those_on_disk(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    data = store_folder(tmp_path) / "data"
    sizes = array_bytes(reader_of(tmp_path).commits)
    files = [path for path in data.rglob("*") if path.is_file()]
    assert sum(sizes.values()) == sum(path.stat().st_size for path in files)
    for name in ("tail_mass", "entry_ids_coded"):
        own = [path for path in files if path.parts[-3] == name]
        assert sizes[name] == sum(path.stat().st_size for path in own)
    (found,) = json.loads(ok("stats", run_file, "--json"))["stores"]
    assert found["array_bytes"] == sizes
    assert found["bytes_per_position"] == sum(sizes.values()) / found["positions"]
    lines = ok("stats", run_file).splitlines()
    (total,) = [line for line in lines if line.startswith("all ")]
    assert total.split()[1] == f"{sum(sizes.values()):,}"


def test_only_some_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = make_run(tmp_path)
    whole = ok("stats", run_file)
    assert "what follows" not in whole
    some = ok("stats", run_file, "--shards", "0,2")
    assert "sizes are of all shards; what follows them was read from 2" in some
    assert "not committed" in refused("stats", run_file, "--shards", "2-4")
    assert "shards refused" in refused("stats", run_file, "--shards", "2-")
    monkeypatch.setattr(stats, "sample_of", lambda shards: sample_of(shards, 2))
    assert ok("stats", run_file) == some


def test_the_sample_is_spread_evenly() -> None:
    assert sample_of([]) == []
    assert sample_of(range(16)) == list(range(16))
    found = sample_of([3 * i for i in range(1000)])
    assert len(found) == len(set(found)) == 16
    assert (found[0], found[-1]) == (0, 2997)
    assert max(np.diff(found)) - min(np.diff(found)) <= 3


def test_a_store_without_a_plan(tmp_path: Path) -> None:
    make_run(tmp_path)
    bare = tmp_path / "bare"
    store_folder(tmp_path).rename(bare)
    (found,) = json.loads(ok("stats", bare, "--json"))["stores"]
    assert list(found["domains"]) == ["(all)"]
    (planned,) = json.loads(ok("stats", bare, "--json", "--plan", tmp_path / "run/plan"))["stores"]
    assert list(planned["domains"]) == ["code", "prose"]


def test_a_store_without_shards(tmp_path: Path) -> None:
    run_file = make_run(tmp_path, leave_out=[0, 1, 2])
    (found,) = json.loads(ok("stats", run_file, "--json"))["stores"]
    assert found["bytes_per_position"] is None
    assert found["kept_mass"] == {"mean": None, "p5": None, "p50": None, "p95": None}
    assert "0 of 3 shards" in ok("stats", run_file)


def test_an_impossible_label_is_told(tmp_path: Path) -> None:
    def impossible(arrays: dict[str, Any]) -> None:
        arrays["label_logprobs"][3] = -np.inf

    run_file = make_run(tmp_path, change={0: impossible})
    (found,) = json.loads(ok("stats", run_file, "--json"))["stores"]
    assert found["domains"]["code"]["label_bpb"] is None
    assert found["domains"]["code"]["impossible_labels"] == 1
    assert found["domains"]["prose"]["label_bpb"] is not None
    assert "inf: a label has probability 0" in ok("stats", run_file)


def test_damage_is_refused(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    flip(data_file(tmp_path, 1, "tail_mass"))
    assert "shard 1, array tail_mass, chunk 0" in refused("stats", run_file)
    (store_folder(tmp_path) / "commits/00001.json").write_text("{")
    assert "commits/00001.json" in refused("stats", run_file)


def test_entropy_of_known_distributions() -> None:
    logprobs = np.log(np.array([0.5, 0.25, 1.0, 0.5])).astype(np.float32)
    offsets = np.array([0, 2, 3, 4, 4])
    tail = np.array([0.25, 0.0, 0.5, 1.0], np.float32)
    expected = [1.5 * math.log(2), 0.0, math.log(2), 0.0]
    assert entropies(logprobs, offsets, tail) == pytest.approx(expected, abs=1e-7)
    zero = np.array([0.0, -np.inf], np.float32)
    assert entropies(zero, np.array([0, 2]), np.zeros(1, np.float32)).tolist() == [0.0]


def test_buckets_double() -> None:
    buckets = histogram(np.ones(11, np.int64))
    edges = [(bucket["from"], bucket["to"]) for bucket in buckets]
    assert edges == [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    assert [bucket["positions"] for bucket in buckets] == [1, 1, 1, 2, 4, 2]
    assert sum(bucket["positions"] for bucket in histogram(np.ones(9, np.int64))) == 9
    assert percentile(np.zeros(3, np.int64), 50) is None
