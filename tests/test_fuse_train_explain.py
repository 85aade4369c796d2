"""`train explain`: its numbers are the training loss's own, and each bad input is one line."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fuse_train.config import TrainSection
from fuse_train.data.batch import collate
from fuse_train.data.partial import uncovered_arrays
from fuse_train.data.samples import AlignedSamples
from fuse_train.explain.positions import Position, TopToken, explain_sample, pool_top
from fuse_train.explain.segment import explain_segment
from fuse_train.explain.text import marked_text
from fuse_train.gate.held_out import HeldOutText
from fuse_train.inputs import open_inputs
from fuse_train.loop.checkpoint import STATE_FILE, TrainState, step_folders
from fuse_train.loop.objective import FusionObjective, StepTotals
from fuse_train.loop.schedule import progress_at, steps_in_all
from fuse_train.losses.losses import SourceRows
from fuse_train.run import train_run
from fuse_train.selector_fit.selector_start import untrained
from fuse_train.selectors.features import shard_features
from store_schema.disk.location import open_location
from store_schema.disk.sealed import seal, unseal
from store_schema.store.reader import StoreReader
from tests.aligned_factory import make_run
from tests.command import call, error_line
from tests.selector_views import build_selector
from tests.test_fuse_train_run import with_train
from tests.tiny import tiny_model, tiny_tokenizer

SHARES = {"code": 0.4, "prose": 0.5, "facts": 0.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stores and a target that nothing was trained on."""
    return make_run(tmp_path_factory.mktemp("explain"), train={"selector": "hedge"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training: its folder and its run."""
    folder = tmp_path_factory.mktemp("explain_trained")
    run = make_run(folder, shards={"train": 2, "valid": 1})
    train_run(run)
    return folder, run


def command(folder: Path, *arguments: object) -> Result:
    return call("train", "explain", folder / "run.yaml", *arguments)


def ok(folder: Path, *arguments: object) -> str:
    result = command(folder, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(folder: Path, *arguments: object) -> str:
    """The one line that a bad input ends with."""
    result = command(folder, *arguments)
    assert result.stdout == ""
    return error_line(result)


def folder_of(run) -> Path:
    return Path(run.run_dir).parent


def selector_of(name: str, section: TrainSection, sources: tuple[str, ...]):
    if name != "asn":
        return build_selector(section, sources)
    selector = untrained(section, 0, len(sources)).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(selector.score.weight)
    return selector


def objective_of(run, name: str, **options: object) -> tuple[FusionObjective, AlignedSamples]:
    options = {"fusion_gate": {"kind": "held_out"}} | options
    section = TrainSection.model_validate({"selector": name, "clm_weight": 0.25, **options})
    inputs = open_inputs(run, section)
    model = AutoModelForCausalLM.from_pretrained(run.target.model).eval()
    sources = inputs.samples.sources
    objective = FusionObjective(model, selector_of(name, section, sources), section, sources)
    objective.fusion_shares = SHARES
    return objective, inputs


# --------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", ["uniform", "hedge", "asn"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_sums_are_those_of_the_objective(run, name: str, row: int) -> None:
    # Without a cut the weights are the gates that the pool's loss is taken on.
    objective, inputs = objective_of(run, name, asn={"cut": "none"})
    sample = inputs.samples.load(0, with_sources=True).sample(row)
    batch = collate([sample], inputs.domains)
    labels = batch.num_labels
    objective.train(False)
    _, sums = objective(batch, StepTotals(labels, 1))
    found = explain_sample(objective, sample, inputs.domains, inputs.tokenizer.vocabulary)
    assert len(found) == len(sample.labels)
    assert sum(p.target_nats is not None for p in found) == labels
    nats = math.fsum(p.target_nats for p in found if p.target_nats is not None)
    assert nats == pytest.approx(float(sums["clm"]), rel=1e-5)
    pool = math.fsum(p.pool_nats for p in found if p.pool_nats is not None)
    assert pool == pytest.approx(float(sums["pool"]), rel=1e-5)
    assert sum(p.fused for p in found) == int(sums["covered"]) > 5
    weights = torch.tensor([p.weights for p in found]).sum(0)
    torch.testing.assert_close(weights, sums["weights_GM"].sum(0), rtol=1e-5, atol=1e-5)
    share = SHARES[sample.segment.domain]
    for p in found:
        assert p.fusion_weight == pytest.approx(0.75 * share if p.fused else 0.0, abs=1e-6)
        assert p.fused == (p.pool_nats is not None) == bool(p.pool_top)


@pytest.mark.parametrize("name", ["uniform", "hedge", "asn"])
def test_numbers_against_dense_float64(run, name: str) -> None:
    objective, inputs = objective_of(run, name)
    vocabulary, shard = inputs.tokenizer.vocabulary, inputs.samples.shards[1]
    decoded = inputs.samples.load(1, with_sources=True)
    sample = decoded.sample(4)
    found = explain_sample(objective, sample, inputs.domains, vocabulary)

    model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
    (encoded,) = inputs.tokenizer.encode([sample.segment])
    ids = [*encoded.input_ids, *sample.labels[len(encoded.token_ids) :]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    dense = logits[len(encoded.context_ids) - 1 : -1].log_softmax(-1)
    assert len(dense) == len(found)
    for p, logq, label in zip(found, dense, sample.labels, strict=True):
        assert p.token_id == label
        assert p.target_nats == pytest.approx(-float(logq[label]), rel=1e-5, abs=1e-5)
        best = logq.exp().topk(3)
        assert [one.token_id for one in p.target_top] == best.indices.tolist()
        assert [one.probability for one in p.target_top] == pytest.approx(
            best.values.tolist(), rel=1e-4
        )
        assert all(one.data == vocabulary.written[one.token_id] for one in p.target_top)

    stores = [StoreReader.open(open_location(run.aligned_url(s))) for s in run.sources]
    arrays = [reader.read(shard.index) for reader in stores]
    checked = 0
    for p, row in zip(found, range(sample.rows.start, sample.rows.stop), strict=False):
        pool, label = np.zeros(len(vocabulary)), 0.0
        covered = [a["entry_offsets"][row] < a["entry_offsets"][row + 1] for a in arrays]
        if name == "uniform" and any(covered):
            assert p.weights == pytest.approx([c / sum(covered) for c in covered])
        assert sum(p.weights) == pytest.approx(float(any(covered)))
        for weight, a in zip(p.weights, arrays, strict=True):
            entries = slice(*map(int, a["entry_offsets"][row : row + 2]))
            probs = np.exp(a["entry_logprobs"][entries].astype(np.float64))
            pool[a["entry_ids"][entries]] += weight * probs
            if weight:
                label += weight * math.exp(float(a["label_logprobs"][row]))
        if not any(covered):
            assert p.pool_nats is None
            assert p.pool_top == ()
            continue
        checked += 1
        assert p.pool_nats == pytest.approx(-math.log(label), rel=1e-5, abs=1e-5)
        # Entries are made so that the label's is its log-probability.
        assert pool[p.token_id] == pytest.approx(label, rel=1e-4)
        best = np.sort(pool)[::-1][:3]
        assert [one.probability for one in p.pool_top] == pytest.approx(best.tolist(), rel=1e-5)
        for one in p.pool_top:
            assert pool[one.token_id] == pytest.approx(one.probability, rel=1e-5)
    assert checked > 10


def test_tokens_that_several_sources_have_are_summed() -> None:
    ids = torch.tensor([[[5, 2, -1], [2, 7, 5]], [[1, -1, -1], [3, -1, -1]]])
    probs = torch.tensor([[[0.5, 0.25, 0.0], [0.75, 0.125, 0.125]], [[1.0, 0, 0], [0.5, 0, 0]]])
    weights = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    tail = torch.zeros(2, 2)
    assert pool_top(SourceRows(ids, probs, tail), weights, 3) == [
        [(2, 0.5), (5, 0.3125), (7, 0.0625)],
        [(3, 0.5)],
    ]


@pytest.mark.parametrize("name", ["hedge", "asn", "min_ce"])
def test_labels_ahead_change_no_weight(run, name: str) -> None:
    objective, inputs = objective_of(run, name)
    vocabulary = inputs.tokenizer.vocabulary
    shard = inputs.samples.load(0, with_sources=True)
    sample = shard.sample(3)
    row = sample.num_tokens // 2
    at = sample.rows.start + row
    rng = np.random.default_rng(0)
    sources = []
    for m, arrays in enumerate(shard.sources):
        labels = arrays["label_logprobs"].copy()
        known = ~np.isnan(labels[at : sample.rows.stop])
        labels[at : sample.rows.stop][known] = -rng.exponential(9 - 4 * m, known.sum())
        nats = arrays["source_nats"].copy()
        nats[sample.index] = -np.nansum(labels[sample.rows])
        sources.append(arrays | {"label_logprobs": labels, "source_nats": nats})
    texts = [segment.text.encode() for segment in shard.segments]
    features = None
    if shard.features_NMF is not None:
        ends, prior_DM = shard.byte_ends, inputs.samples.prior.of(shard.segments)
        features = shard_features(sources, shard.token_offsets, ends, texts, prior_DM)
    other = replace(shard, sources=tuple(sources), features_NMF=features)
    before = explain_sample(objective, sample, inputs.domains, vocabulary)
    after = explain_sample(objective, other.sample(3), inputs.domains, vocabulary)
    same = [a.weights == pytest.approx(b.weights) for a, b in zip(before, after, strict=True)]
    if name == "min_ce":  # in hindsight: the changes are seen everywhere
        assert not any(same[t] for t in range(row) if before[t].fused)
    else:
        assert all(same[: row + 1])
    assert not all(same[row + 1 :])
    pools = [(a.pool_nats, b.pool_nats) for a, b in zip(before, after, strict=True)]
    assert any(a != b for a, b in pools[row:])


def test_a_first_token_without_bos_has_no_figures(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, bos=False, shards={"train": 1, "valid": 1}, train={"selector": "hedge"}
    )
    found = explain_segment(run, segment="0")
    first, *rest = found.positions
    assert (first.target_nats, first.pool_nats, first.target_top) == (None, None, ())
    assert first.weights == (0.0, 0.0, 0.0)
    assert all(p.target_nats is not None for p in rest)
    listed = ok(tmp_path, "--segment", 0, "--all")
    assert re.search(r"^ +0 .* - +- +- +0\.000  no source$", listed, re.MULTILINE)
    assert json.loads(ok(tmp_path, "--segment", 0, "--json"))["positions"]["target_nats"][0] is None


# ------------------------------------------------------------------------ as the training stands


def test_before_training_the_share_is_measured(run) -> None:
    found = explain_segment(run, segment="code-0#0")
    assert found.model == "the target as it is, no checkpoint yet"
    assert found.selector == "hedge"
    assert found.share_from.startswith("measured now on split valid with the target as it is")
    section = run.sections["train"]
    samples = open_inputs(run, section, "valid").samples
    inputs = open_inputs(run, section)
    model = AutoModelForCausalLM.from_pretrained(run.target.model)
    from fuse_train.loop.likelihood import row_nats
    from fuse_train.loop.validation import load_valid
    from fuse_train.selector_fit.selector_training import split_batches

    valid = load_valid(inputs.plan, inputs.plan.splits()["valid"], inputs.tokenizer, None)
    held_out = HeldOutText.of(split_batches(samples, inputs.domains), valid.segment_ids)
    rows = dict(zip(valid.segment_ids, row_nats(model, valid.encoded), strict=True))
    one = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    shares = held_out.shares(build_selector(section, samples.sources), rows, one)
    assert found.fusion_share == pytest.approx(shares["code"], rel=1e-6)
    fused = [p for p in found.positions if p.fused]
    expected = (1 - section.clm_weight) * shares["code"]
    assert [p.fusion_weight for p in fused] == pytest.approx([expected] * len(fused), rel=1e-5)
    free = with_train(run, fusion_gate={"kind": "none"})
    open_gate = explain_segment(free, segment="code-0#0")
    assert (open_gate.fusion_share, open_gate.share_from) == (1.0, "no fusion gate")


def test_a_run_is_shown_as_its_newest_checkpoint_stands(trained) -> None:
    folder, run = trained
    found = explain_segment(run, segment="prose-1#0")
    newest = max(step_folders(folder / "run/checkpoints").items())[1]
    assert found.model == f"checkpoint {newest.name}"
    assert found.selector == f"asn of {newest.name}"
    assert found.share_from == f"last evaluation before {newest.name}"
    state = unseal(TrainState, (newest / STATE_FILE).read_bytes(), where="state")
    assert found.fusion_share == state.fusion_shares["prose"]
    saved = json.loads((newest / "trainer/selector.json").read_text())
    assert saved["kind"] == "shared"
    plain = AutoModelForCausalLM.from_pretrained(newest)
    (encoded,) = open_inputs(run, run.sections["train"]).tokenizer.encode([found.segment])
    with torch.no_grad():
        logq = plain(input_ids=torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    count = len(encoded.token_ids)
    expected = [-float(logq[t, encoded.input_ids[t + 1]]) for t in range(count)]
    assert [p.target_nats for p in found.positions[:count]] == pytest.approx(expected, rel=1e-4)


def test_models_by_name(trained) -> None:
    folder, run = trained
    shown = {
        name: explain_segment(run, segment="3", model=name)
        for name in (None, "target", "final", "control")
    }
    nats = {name: [p.target_nats for p in found.positions] for name, found in shown.items()}
    assert nats["target"] != nats["final"] != nats["control"] != nats["target"]
    assert shown["final"].model_folder == str(folder / "run/final")
    for name, path in (("final", "final"), ("control", "control/final"), ("target", "../target")):
        given = explain_segment(run, segment="3", model=str(folder / "run" / path))
        assert [p.target_nats for p in given.positions] == nats[name]
        assert given.model == f"the model in {folder / 'run' / path}"
    weights = {name: [p.weights for p in found.positions] for name, found in shown.items()}
    assert weights[None] == weights["target"] == weights["control"], "the pool is the run's"


def test_without_checkpoints_the_final_model_and_its_selector_are_shown(trained) -> None:
    folder, run = trained
    before = explain_segment(run, segment="3")
    aside = folder / "run/aside"
    (folder / "run/checkpoints").rename(aside)
    try:
        found = explain_segment(run, segment="3")
    finally:
        aside.rename(folder / "run/checkpoints")
    assert found.model == "the final fused model"
    assert found.selector == "asn of selector/"
    assert [p.weights for p in found.positions] == [p.weights for p in before.positions]
    assert found.share_from == "measured now on split valid with the final fused model"


def test_scheduled_weights_are_those_of_the_checkpoints_step(tmp_path: Path) -> None:
    schedule = {"clm_weight_schedule": {"kind": "linear", "end": 0.5}}
    options = {"selector": "uniform", "control": False, "clm_weight": 0.1, "loss": schedule}
    run = make_run(tmp_path, shards={"train": 2, "valid": 1}, train=options)
    assert explain_segment(run, segment="0").clm_weight == 0.1
    train_run(run)
    assert explain_segment(run, segment="0").clm_weight == pytest.approx(0.5)
    assert [progress_at(step, 6) for step in (0, 1, 5, 6)] == [0.0, 0.2, 1.0, 1.0]
    assert progress_at(0, 1) == 0.0
    newest = max(step_folders(tmp_path / "run/checkpoints").items())[1]
    # The weight of the loss follows the gate's share of the checkpoint.
    state = unseal(TrainState, (newest / STATE_FILE).read_bytes(), where="state")
    data = seal(state.model_copy(update={"fusion_shares": dict.fromkeys(SHARES, 0.5)}))
    (newest / STATE_FILE).write_bytes(data)
    line = refused(tmp_path, "--segment", 0)
    assert "files.json" in line or "checksum" in line or "changed" in line


def test_adapters_of_a_checkpoint_are_in_the_numbers(tmp_path: Path) -> None:
    options = {"selector": "uniform", "control": False, "keep_best": False, "lr": 1e-2}
    run = make_run(
        tmp_path, shards={"train": 2, "valid": 1}, train=options | {"lora": {"r": 2, "alpha": 8}}
    )
    train_run(run)
    nats = {
        name: [p.target_nats for p in explain_segment(run, segment="0", model=name).positions]
        for name in (None, "final", "target")
    }
    assert nats[None] == pytest.approx(nats["final"], rel=1e-4)
    assert nats[None] != pytest.approx(nats["target"], rel=1e-3)


def test_steps_of_a_training() -> None:
    section = TrainSection(epochs=1.5, batch_segments=8)
    assert [steps_in_all(section, count) for count in (1, 48, 49)] == [1, 9, 10]
    assert steps_in_all(section.model_copy(update={"max_steps": 4}), 48) == 4


# --------------------------------------------------------------------------- what is printed


def test_one_json_object_with_arrays(trained) -> None:
    folder, run = trained
    shown = json.loads(ok(folder, "--segment", "facts-2#0", "--json"))
    found = explain_segment(run, segment="facts-2#0")
    assert set(shown) == {
        *("segment", "document", "row", "shard", "domain", "split", "text", "model"),
        *("model_folder", "selector", "hindsight", "clm_weight", "fusion_share"),
        *("fusion_share_from", "first_reading", "sources", "positions"),
    }
    assert (shown["segment"], shown["document"], shown["row"]) == ("facts-2#0", "facts-2", 2)
    assert shown["sources"] == ["code", "prose", "facts"]
    arrays = shown["positions"]
    assert set(arrays) == {
        *("token_ids", "tokens", "byte_starts", "byte_ends", "begins_span", "target_nats"),
        *("pool_nats", "weights", "fusion_weights"),
        *(f"{who}_top_{what}" for who in ("target", "pool") for what in ("ids", "tokens")),
        *(f"{who}_top_probabilities" for who in ("target", "pool")),
    }
    assert {len(array) for array in arrays.values()} == {len(found.positions)}
    assert arrays["target_nats"] == [p.target_nats for p in found.positions]
    assert arrays["pool_nats"] == [p.pool_nats for p in found.positions]
    assert arrays["weights"] == [list(p.weights) for p in found.positions]
    assert arrays["pool_top_ids"] == [[o.token_id for o in p.pool_top] for p in found.positions]
    assert {len(row) for row in arrays["target_top_probabilities"]} == {3}
    text = shown["text"].encode()
    ends = list(zip(arrays["byte_starts"], arrays["byte_ends"], strict=True))
    assert b"".join(text[start:end] for start, end in ends) == text
    assert ends[-1][1] == len(text)
    whole = [
        (token, text[start:end])
        for token, (start, end) in zip(arrays["tokens"], ends, strict=True)
        if start < end
    ]
    assert all(token == data.decode(errors="backslashreplace") for token, data in whole)


def test_the_listing_has_the_most_different_positions_first(trained) -> None:
    folder, run = trained
    found = explain_segment(run, segment="code-0#0")
    shown = ok(folder, "--segment", "code-0#0", "--top", 4)
    assert "\x1b" not in shown, "no colours where nobody sees them"
    rows = re.findall(r"^ *(\d+) +\".*?\" +([\d.]+) +([\d.]+) +([+-][\d.]+) ", shown, re.MULTILINE)
    assert len(rows) == 4
    differences = sorted(
        (abs(p.target_nats - p.pool_nats) for p in found.positions if p.fused), reverse=True
    )
    assert [abs(float(ahead)) for *_, ahead in rows] == pytest.approx(differences[:4], abs=1e-3)
    by_index = {p.index: p for p in found.positions}
    for index, target, pool, ahead in rows:
        assert float(target) == pytest.approx(by_index[int(index)].target_nats, abs=1e-3)
        assert float(pool) == pytest.approx(by_index[int(index)].pool_nats, abs=1e-3)
        assert float(ahead) == pytest.approx(float(target) - float(pool), abs=2e-3)
    assert shown.count("{+") + shown.count("[-") == 4 + 2, "in the text, and once in the legend"
    assert "20 of" in ok(folder, "--segment", "code-0#0")
    every = ok(folder, "--segment", "code-0#0", "--all")
    indices = re.findall(r"^ *(\d+) +\"", every, re.MULTILINE)
    # The last one is the end of the document, which no source says anything of.
    assert indices == [str(p.index) for p in found.positions]


def a_position(start: int, end: int, ahead: float) -> Position:
    return Position(0, start, end, 0, b"x", target_nats=5.0 + ahead, pool_nats=5.0)


def test_marks_say_who_is_ahead() -> None:
    positions = [a_position(4, 8, 1.0), a_position(0, 3, -1.0)]
    marked = click.unstyle(marked_text("def foo(a)\nx\x1b", positions))
    assert marked == "[-def-] {+foo(+}a)\nx\\x1b"
    assert click.unstyle(marked_text("a\nb", [a_position(1, 2, 1.0)])) == "a{+\\n+}b"


@given(st.text("ab é漢😀"), st.data())
def test_marked_text_is_the_text(text: str, data: st.DataObject) -> None:
    size = len(text.encode())
    cuts = sorted(data.draw(st.sets(st.integers(0, size))) | {0, size})
    tokens = [a_position(*pair, 1.0) for pair in pairwise(cuts)]
    chosen = [token for token in tokens if data.draw(st.booleans())]
    marked = click.unstyle(marked_text(text, chosen))
    assert marked.replace("{+", "").replace("+}", "") == text
    assert (marked.count("{+") > 0) == bool(chosen)
    assert marked.count("{+") <= len(chosen)


def test_likely_tokens_beyond_the_tokenizer_have_a_name(run) -> None:
    vocabulary = open_inputs(run, run.sections["train"]).tokenizer.vocabulary
    assert vocabulary.spelling(len(vocabulary) + 3) == b"<id %d>" % (len(vocabulary) + 3)
    assert TopToken(0, vocabulary.spelling(0), 0.5).data == vocabulary.written[0]


# ---------------------------------------------------------------------------------- refusals


def test_segments_that_are_not_there(run) -> None:
    folder = folder_of(run)
    line = refused(folder, "--segment", "code-0")
    assert "no such segment" in line
    assert "expected an id such as code-0#0 or a row below 72, got code-0" in line
    assert "the nearest is code-0#0" in line
    assert "the nearest is prose-13#0" in refused(folder, "--segment", "porse-13#0")
    line = refused(folder, "--segment", "72")
    assert "a row below 72, got 72" in line
    line = refused(folder, "--segment", "\x1b[31m漢")
    assert "\x1b" not in line
    assert "nearest" not in line
    assert "no segment named" in refused(folder)
    line = refused(folder, "--document", "fact-2")
    assert "no such document" in line
    assert "the nearest is facts-2;" in line
    assert "no such segment in document code-0: expected one of code-0#0, got 1" in refused(
        folder, "--document", "code-0", "--segment", 1
    )
    assert "two ways" in refused(folder, "--segment", 0, "--all", "--top", 3)


def test_by_document(run) -> None:
    folder = folder_of(run)
    by_id = ok(folder, "--segment", "code-3#0", "--json")
    assert by_id == ok(folder, "--segment", 3, "--json")
    for words in (["--document", "code-3"], ["--document", "code-3", "--segment", 0]):
        assert by_id == ok(folder, *words, "--json")


def test_a_split_without_stores(tmp_path: Path) -> None:
    run = make_run(tmp_path, train={"selector": "uniform", "fusion_gate": {"kind": "none"}})
    inputs = open_inputs(run, run.sections["train"])
    (shard,) = inputs.plan.splits()["test"]
    name = inputs.plan.segments(shard)[0].segment_id
    ok(tmp_path, "--segment", name)
    commits = [tmp_path / f"run/aligned/{s}/commits/{shard.index:05d}.json" for s in run.sources]
    commits[1].unlink()
    line = refused(tmp_path, "--segment", name)
    assert f"shard {shard.index} (split test), which holds the segment, is not aligned yet" in line
    assert "missing for prose" in line
    assert "`logitfuse align run` writes it" in line
    partly = json.loads(
        ok(tmp_path, "--segment", name, "--json", "--set", "train.allow_partial=true")
    )
    weights = np.array(partly["positions"]["weights"])
    assert (weights[:, 1] == 0).all()
    assert weights.sum() > 5
    for commit in commits[::2]:
        commit.unlink()
    for extra in ([], ["--set", "train.allow_partial=true"]):
        line = refused(tmp_path, "--segment", name, *extra)
        assert "is not aligned yet" in line
        assert "missing for code, prose, facts" in line
    ok(tmp_path, "--segment", 0)


def test_a_segment_that_no_source_knows(run, monkeypatch) -> None:
    plain = AlignedSamples.load

    def uncovered(self, position, *, with_sources):
        shard = plain(self, position, with_sources=with_sources)
        return replace(shard, sources=tuple(uncovered_arrays(a) for a in shard.sources))

    monkeypatch.setattr(AlignedSamples, "load", uncovered)
    line = refused(folder_of(run), "--segment", "facts-5#0")
    assert "no source covers any position of the segment in segment facts-5#0" in line
    assert "`logitfuse align view`" in line


def test_models_that_are_not_there(run, tmp_path: Path) -> None:
    folder = folder_of(run)
    for name, label in (("final", "fused"), ("control", "control")):
        line = refused(folder, "--segment", 0, "--model", name)
        assert f"the {label} training has no final model" in line
        assert "`logitfuse train run` makes it" in line
    line = refused(folder, "--segment", 0, "--model", "fnal")
    assert "no such model in --model: expected target, final, control, or a model's folder" in line
    (tmp_path / "empty").mkdir()
    line = refused(folder, "--segment", 0, "--model", tmp_path / "empty")
    assert "has no config.json" in line
    hf = tiny_tokenizer("byte_level", ["aaaa bbbb"], 300, bos=True)
    other = tiny_model(tmp_path / "other", "llama", hf)
    line = refused(folder, "--segment", 0, "--model", other)
    assert "the model reads other tokens than the target" in line


def test_a_checkpoint_of_another_recipe(trained) -> None:
    folder, _ = trained
    line = refused(folder, "--segment", 0, "--set", "train.lr=0.123")
    assert "checkpoint was made from another config" in line
