"""Where a training's selector comes from, the weights that are searched for, and `train selector`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fuse_train.config import TrainSection
from fuse_train.data.stream import SampleStream
from fuse_train.inputs import open_inputs, stream_options
from fuse_train.selector_fit import selector_start
from fuse_train.selector_fit.selector_start import FrozenSelector, SelectorStart
from fuse_train.selector_fit.selector_training import (
    known_logprobs,
    new_selector,
    pool_nll,
    split_batches,
)
from fuse_train.selectors.asn import AdaptiveSelector, SharedScorer
from fuse_train.selectors.by_name import by_rule, learner
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.kinds.bayes import mixture_nats, search_weights
from fuse_train.selectors.selectors import StaticSelector
from store_schema.errors import InputError, MismatchError, MissingError
from tests.aligned_factory import make_run
from tests.command import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("start")
    make_run(path, segments_per_shard=24)
    return path


@pytest.fixture(scope="module")
def run(folder):
    return make_run(folder / "own", segments_per_shard=24)


def start_of(run, **fields) -> SelectorStart:
    section = TrainSection.model_validate({"asn": {"pretrain_steps": 4}} | fields)
    inputs = open_inputs(run, section)
    stream = SampleStream(
        inputs.samples, stream_options(run, section), inputs.domains, with_entries=False
    )
    valid = lambda: open_inputs(run, section, section.valid_split).samples  # noqa: E731
    return SelectorStart(section, 0, stream, valid, torch.device("cpu"), lambda: None)


def test_each_name_makes_its_selector(run) -> None:
    made = {
        name: start_of(run, selector=name, static_weights={"code": 1.0}).make()
        for name in ("uniform", "static", "hedge", "asn", "constant", "bayes")
    }
    assert isinstance(made["static"], StaticSelector)
    for name in ("uniform", "hedge"):
        assert made[name].kind.name == name
    assert isinstance(made["asn"], SharedScorer)
    assert isinstance(made["constant"], AdaptiveSelector)
    # Each source is best in a third of the text: no weight is near 0 or 1.
    assert made["bayes"].weights_M.sum() == pytest.approx(1.0, abs=1e-5)
    assert float(made["bayes"].weights_M.min()) > 0.1
    again = start_of(run, selector="bayes").make()
    assert torch.equal(again.weights_M, made["bayes"].weights_M)


def test_paper_network_starts_untrained_since_the_fusion_loss_trains_it(run) -> None:
    made = start_of(run, asn={"preset": "fusion-x"}).make()
    fresh = new_selector(AsnSection(preset="fusion-x"), learner("asn"), 0, 3)
    for a, b in zip(made.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_search_beats_uniform_and_every_source() -> None:
    rng = np.random.default_rng(0)
    logs = -rng.exponential([1.0, 1.5, 6.0], (400, 3))
    found = search_weights(logs, trials=40, seed=1)
    assert sum(found) == pytest.approx(1.0)
    nats = mixture_nats(np.array(found), logs)
    alone = [mixture_nats(np.eye(3)[m], logs) for m in range(3)]
    assert nats < min(*alone, mixture_nats(np.full(3, 1 / 3), logs))
    want = -np.log(np.exp(logs) @ np.array(found)).mean()
    assert nats == pytest.approx(want)
    assert mixture_nats(np.array([0.5, 0.5]), np.array([[-1000.0, -1000.0]])) == 1000.0


def test_search_sees_rows_that_every_source_knows(run) -> None:
    batches = list(split_batches(start_of(run).valid(), ("code", "facts", "prose")))
    logs = known_logprobs(batches, where="here")
    counted = sum(s.num_rows for s in pool_nll(by_rule("uniform"), batches).values())
    assert len(logs) == counted
    with pytest.raises(InputError, match="no row"):
        known_logprobs([], where="here")


def test_frozen_selector_has_nothing_to_train_and_gives_the_same(run, tmp_path) -> None:
    start = start_of(run)
    trained = start.trained()
    trained.save(tmp_path)
    frozen = start_of(run, asn={"start_from": str(tmp_path), "frozen": True}).make()
    assert isinstance(frozen, FrozenSelector)
    assert not list(frozen.parameters())
    view = next(iter(split_batches(start.valid(), start.stream.domains))).sources.view
    assert torch.equal(frozen(view), trained(view))
    further = start_of(run, asn={"start_from": str(tmp_path)}).make()
    assert torch.equal(further(view), trained(view))
    assert list(further.parameters())


def test_one_that_was_made_from_the_same_before_is_not_trained_again(
    run, tmp_path, monkeypatch
) -> None:
    """The pool estimate's serves the training, and a training that was killed before its first step."""
    start = replace(start_of(run), kept_in=tmp_path / "kept")
    made = start.trained()
    monkeypatch.setattr(selector_start, "train_selector", lambda *_, **__: pytest.fail("trained"))
    again = start.make()
    for a, b in zip(made.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.requires_grad
        assert a.grad is None
    with pytest.raises(pytest.fail.Exception, match="trained"):
        replace(start, seed=1).make()
    other = start_of(run, asn={"pretrain_steps": 5})
    with pytest.raises(pytest.fail.Exception, match="trained"):
        replace(other, kept_in=start.kept_in).make()


def test_saved_selectors_that_do_not_fit_are_refused(run, tmp_path) -> None:
    with pytest.raises(MissingError, match="no selector"):
        start_of(run, asn={"start_from": str(tmp_path)}).make()
    start_of(run, selector="constant").make().save(tmp_path)
    with pytest.raises(MismatchError, match="kind constant"):
        start_of(run, asn={"start_from": str(tmp_path)}).make()


def invoke(folder: Path, *settings: str):
    words = ["selector", str(folder / "run.yaml")]
    for setting in ("train.asn.pretrain_steps=30", *settings):
        words += ["--set", setting]
    return call("train", *words)


def test_train_selector_needs_no_target_weights_and_says_what_pools_score(folder) -> None:
    for path in (folder / "target").glob("*.safetensors"):
        path.unlink()
    result = invoke(folder)
    assert result.exit_code == 0, result.output
    lines = {line[:34].strip(): line.split() for line in result.stdout.splitlines()}
    for name in ("code alone", "uniform", "hedge", "min_ce (hindsight)", "asn"):
        assert name in lines, result.stdout
    means = {name: float(words[-1]) for name, words in lines.items() if name in ("asn", "uniform")}
    assert means["asn"] < means["uniform"]
    again = invoke(folder)
    assert "complete, nothing to do" in again.output
    saved = folder / "run" / "selectors" / "asn"
    assert json.loads((saved / "trained.json").read_text())["sources"] == ["code", "prose", "facts"]
    own = invoke(folder, f"train.asn.start_from={saved}")
    assert own.exit_code == 2
    assert "trained from what it replaces" in own.output
    other = invoke(folder, "train.asn.hidden_size=8")
    assert other.exit_code == 2
    assert "by another recipe" in other.output
    kept = saved.rename(folder / "kept")
    further = invoke(folder, f"train.asn.start_from={kept}")
    assert further.exit_code == 0, further.output
    assert "nothing to do" not in further.output


def test_train_selector_refuses_what_does_not_learn(folder) -> None:
    result = invoke(folder, "train.selector=hedge")
    assert result.exit_code == 2
    assert "does not learn" in result.output


def test_table_is_finite(folder) -> None:
    record = json.loads((folder / "run/selectors/asn/trained.json").read_text())
    for values in record["bpb"].values():
        assert values
        assert all(math.isfinite(value) for value in values.values())
    assert record["hindsight"] == ["min_ce", "avg_ce"]
