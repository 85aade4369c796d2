"""The measurement of `make bench-select` on made-up stores: right sums, right signs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import bench_select, select_measure
from benchmarks.select_data import SeedData, mean_bpb
from fuse_train.selector_fit.selector_training import pool_nll
from fuse_train.selectors.by_name import by_rule
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.selectors import StaticSelector
from tests.aligned_factory import make_run

NAMES = ("code", "prose", "facts")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SeedData:
    folder = tmp_path_factory.mktemp("select")
    sources = {name: name for name in NAMES} | {"random": "nothing"}
    make_run(folder, sources=sources, segments_per_shard=24)
    return SeedData(folder / "run.yaml")


def test_nats_of_segments_add_up_to_the_pools(data) -> None:
    """With all sources the spans are those of `pool_nll`."""
    for selector in (by_rule("uniform"), by_rule("hedge", rate=0.5, share=0.01)):
        nats = {"pool": data.nats(selector, "test", data.names)}
        units = data.units(nats, "test")
        sums = pool_nll(selector, data.part("test", data.names).batches)
        for domain, unit in units.items():
            assert unit.nats["pool"].sum() == pytest.approx(sums[domain].nats, rel=1e-5)
            assert unit.num_bytes.sum() == sums[domain].num_bytes


def test_some_sources_are_scored_on_the_rows_that_all_know(data) -> None:
    whole = data.nats(StaticSelector([0, 1, 0, 0]), "test", data.names)
    some = data.nats(StaticSelector([1, 0]), "test", ("prose", "facts"))
    np.testing.assert_allclose(some, whole, rtol=1e-6)
    assert data.part("test", ("prose", "facts")).samples.sources == ("prose", "facts")


def test_hedge_is_tuned_on_valid_text(data) -> None:
    rate, share = select_measure.tuned_hedge(data, NAMES, data.domains)
    found = {
        (r, s): data.nats(by_rule("hedge", rate=r, share=s), "valid", NAMES)
        for r in select_measure.RATES
        for s in select_measure.SHARES
    }
    units = data.units({str(pair): nats for pair, nats in found.items()}, "valid")
    best = min(found, key=lambda pair: mean_bpb(units, str(pair)))
    assert (rate, share) == best


def test_every_figure_of_a_seed(data, monkeypatch) -> None:
    monkeypatch.setattr(select_measure, "SWITCHING", ("code", "prose"))
    monkeypatch.setattr(select_measure, "BAYES_TRIALS", 8)
    said: list[str] = []
    section = AsnSection(pretrain_steps=60)
    record = select_measure.measure(data, section, say=said.append, held_out=True)
    assert json.loads(json.dumps(record)) == record
    pools = {name: np.mean(list(values.values())) for name, values in record["bpb"].items()}
    assert pools["asn"] < pools["uniform"]
    assert record["best"] not in record["hindsight"]
    difference, low, high = record["asn_minus_best"]
    assert low <= difference <= high
    assert difference == pytest.approx(pools["asn"] - pools[record["best"]], rel=1e-6)
    assert record["random"]["weight"] < 1 / 4
    assert set(record["left_out"]) == {*NAMES, "recovery"}
    cost = {"step_share": 0.01}
    found = bench_select.summary([record, record | {"seed": 1}], cost)
    assert found["asn_minus_best"] == {"0": [difference, low, high], "1": [difference, low, high]}
    assert found["switching_gain_over_hedge"] == -record["switching"]["any_rate"]["value"]
    assert found["leave_one_out_recovery"] == record["left_out"]["recovery"]
