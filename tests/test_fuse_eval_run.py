"""Pool estimate, evaluation and report on a small run with real (random) models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fuse_eval import bpb
from fuse_eval.interference.blocks import read_blocks
from fuse_eval.run import estimate_pools, evaluate
from fuse_eval.summary import build_summary
from launch.signals import StopFlag
from store_schema.config import RunConfig, load_run
from store_schema.disk.location import open_location
from store_schema.errors import MismatchError, MissingError, Stopped
from store_schema.layout import Origin
from store_schema.plan.plan import Plan
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import SegmentTokenizer
from tests import eval_run
from tests.command import call

FAST = {
    "train": {"asn": {"pretrain_steps": 4, "hidden_size": 8}},
    "evaluate": {"bootstrap_samples": 200, "batch_tokens": 900},
}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_models: dict[str, Path],
    sample_texts: dict[str, list[str]],
) -> RunConfig:
    """A run whose models are 'trained'."""
    run = eval_run.make_run(tmp_path_factory.mktemp("run"), tiny_models, sample_texts, **FAST)
    eval_run.pretend_training(run)
    return run


@pytest.fixture
def run(finished: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of the run that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "run")
    file = tmp_path / "run" / "run.yaml"
    file.write_text(file.read_text().replace(finished.folder, str(tmp_path / "run")))
    return load_run(file)


def _invoke(run: RunConfig, *words: str) -> Any:
    return call(*words, f"{run.folder}/run.yaml")


def _dense_nats(model_folder: str, tokenizer: SegmentTokenizer, text: str, start: int) -> float:
    """The plain lines: whole logits, log-softmax, sum over tokens that begin at `start` or later."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = tokenizer.encode_text([text])[0]
    ends = tokenizer.vocabulary.byte_ends(ids, text.encode(), where="test").tolist()
    context = list(tokenizer.bos_ids)
    with torch.no_grad():
        logits = model(torch.tensor([context + ids])).logits[0].double()
    rows = torch.log_softmax(logits, -1)
    begins = [0, *ends[:-1]]
    return -sum(
        float(rows[len(context) + i - 1, token])
        for i, token in enumerate(ids)
        if begins[i] >= start and len(context) + i > 0
    )


def test_scores_equal_a_dense_reference(finished: RunConfig) -> None:
    plan = Plan.open(open_location(f"{finished.folder}/plan"))
    tokenizers = bpb.run_tokenizers(finished, plan)
    text = bpb.scored_text(bpb.split_segments(plan, "test"), tokenizers)
    assert (text.starts > 0).any()  # prose has no BOS: its first token is context for all
    for name in ("code", "prose", "facts"):
        scored = bpb.score_model(
            finished.sources[name],
            text,
            tokenizers[name],
            name=name,
            batch_tokens=900,
            device=torch.device("cpu"),
            stop=StopFlag(),
        )
        for i in (0, 4, len(text.segments) - 1):
            start = int(text.starts[i])
            expected = _dense_nats(
                finished.sources[name].model, tokenizers[name], text.segments[i].text, start
            )
            assert len(scored[i]) == len(text.block_ends[i])
            if text.num_bytes[i]:
                assert scored[i].sum() == pytest.approx(expected, rel=1e-5)
            else:
                assert scored[i].sum() == 0


def test_pools_equal_a_plain_reference(run: RunConfig) -> None:
    content = estimate_pools(run, StopFlag()).content
    plan = Plan.open(open_location(f"{run.folder}/plan"))
    shard = plan.splits()["test"][0]
    segments = plan.segments(shard)
    stores = {
        s: StoreReader.open(open_location(run.aligned_url(s))).read(shard.index)
        for s in run.sources
    }
    target = SegmentTokenizer.load(run.target, name="target")
    model = AutoModelForCausalLM.from_pretrained(run.target.model).eval()
    nats: dict[str, dict[str, float]] = {}
    sizes: dict[str, int] = {}
    first = stores["code"]
    for d, (segment, encoded) in enumerate(zip(segments, target.encode(segments), strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([encoded.input_ids])).logits[0].double()
        rows = torch.log_softmax(logits, -1)
        shift = len(encoded.context_ids) - 1
        source_bpb = [a["source_nats"][d] / a["source_bytes"][d] for a in stores.values()]
        begin, spans = 0, []
        for i, n in enumerate(range(first["token_offsets"][d], first["token_offsets"][d + 1])):
            end = int(first["byte_ends"][n])
            size, begin = end - begin, end
            labels = [float(a["label_logprobs"][n]) for a in stores.values()]
            covered = [a["entry_offsets"][n + 1] > a["entry_offsets"][n] for a in stores.values()]
            known = not np.isnan(labels).any() and any(covered) and i + shift >= 0
            target = -float(rows[i + shift, int(encoded.token_ids[i])])
            if i == 0 or not any(a["origin"][n] == Origin.INSIDE for a in stores.values()):
                spans.append([])
            spans[-1].append((size, labels, covered, known, target))
        for span in spans:
            size = sum(row[0] for row in span)
            if size == 0 or not all(row[3] for row in span):
                continue
            # A source's probability of the span is the product of its rows.
            labels = np.sum([np.maximum(row[1], -1000.0) for row in span], 0)
            covered = span[0][2]
            sizes[segment.domain] = sizes.get(segment.domain, 0) + size
            parts = {
                "uniform": -np.log(np.mean(np.exp(labels[np.array(covered)]))),
                "target": sum(row[4] for row in span),
            }
            best = min(np.flatnonzero(covered), key=lambda m: source_bpb[m])
            parts["min_ce"] = -labels[best]
            parts |= {source: -labels[m] for m, source in enumerate(stores)}
            into = nats.setdefault(segment.domain, {})
            for key, value in parts.items():
                into[key] = into.get(key, 0.0) + float(value)
    for domain, sums in nats.items():
        scale = np.log(2) * sizes[domain]
        assert content["domains"][domain]["common_bytes"] == sizes[domain]
        assert content["target_bpb"][domain] == pytest.approx(sums["target"] / scale, rel=1e-4)
        for name in ("uniform", "min_ce"):
            assert content["pool_bpb"][name][domain] == pytest.approx(sums[name] / scale, rel=1e-4)
        for source in stores:
            assert content["alone_bpb"][source][domain] == pytest.approx(
                sums[source] / scale, rel=1e-4
            )


def test_pool_command_says_what_to_do_and_does_nothing_twice(run: RunConfig) -> None:
    first = _invoke(run, "eval", "pool")
    assert first.exit_code == 0, first.output
    for words in (
        *("target now", "pool asn", "(hindsight)", "Best single source", "code alone"),
        *("best mixture with target", "Weight of the pool in its best mixture"),
        *("plain training (estimated)", "Forecast of fused against plain training"),
    ):
        assert words in first.output
    record = (Path(run.folder) / "report" / "pool.json").read_bytes()
    second = _invoke(run, "eval", "pool")
    assert "eval pool: complete, nothing to do" in second.output
    assert second.output.startswith(first.stdout.strip()[:200])
    assert (Path(run.folder) / "report" / "pool.json").read_bytes() == record
    content = json.loads(record)
    assert set(content["pool_bpb"]) == {"uniform", "min_ce", "avg_ce", "hedge", "asn"}
    assert set(content["without"]["asn"]) == set(run.sources)


def test_the_runs_own_selector_is_estimated_beside_those_asked_for(run: RunConfig) -> None:
    changed = load_run(
        f"{run.folder}/run.yaml",
        (
            *("train.selector=constant", "train.asn.pretrain_steps=2"),
            "evaluate.pool_selectors=[uniform]",
        ),
    )
    content = estimate_pools(changed, StopFlag()).content
    assert set(content["pool_bpb"]) == {"uniform", "constant"}
    assert set(content["mixture"]) == set(content["forecast"]) == set(content["target_bpb"])


def test_static_weights_of_the_train_section_are_estimated(run: RunConfig) -> None:
    train = {"selector": "static", "static_weights": {"code": 1.0}}
    changed = load_run(
        f"{run.folder}/run.yaml",
        (f"train={json.dumps(train)}", "evaluate.pool_selectors=[uniform]"),
    )
    content = estimate_pools(changed, StopFlag()).content
    assert set(content["pool_bpb"]) == {"uniform", "static"}
    # All weight on one source: the pool is that source alone.
    assert content["pool_bpb"]["static"] == pytest.approx(content["alone_bpb"]["code"], rel=1e-5)
    assert set(content["mixture"]) == set(content["target_bpb"])
    for domain, best in content["mixture"].items():
        of_both = content["target_bpb"][domain], content["alone_bpb"]["code"][domain]
        assert 0.0 <= best["pool_weight"] <= 1.0
        assert best["bpb"] <= min(of_both) * (1 + 1e-6)
        assert best["bpb"] >= min(of_both) * 0.5
    assert set(content["forecast"]) == set(content["target_bpb"])
    for domain, found in content["forecast"].items():
        assert found["control_bpb"] <= content["target_bpb"][domain] * (1 + 1e-6)
        assert 0.0 <= found["gain"] <= found["most"] < 1.0


def test_evaluation_command_resumes_and_does_nothing_twice(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    original = bpb.score_model

    def counting(*args: Any, name: str, **kwargs: Any) -> list[np.ndarray]:
        if len(scored) == 3:
            raise Stopped("stopped by SIGTERM")
        scored.append(name)
        return original(*args, name=name, **kwargs)

    monkeypatch.setattr(bpb, "score_model", counting)
    with pytest.raises(Stopped):
        evaluate(run, StopFlag())
    assert not (Path(run.folder) / "report" / "evaluation.json").exists()
    monkeypatch.setattr(
        bpb,
        "score_model",
        lambda *a, name, **k: (scored.append(name), original(*a, name=name, **k))[1],
    )
    first = _invoke(run, "eval", "run")
    assert first.exit_code == 0, first.output
    assert sorted(scored) == sorted(["target_before", "clm_control", "fused", *run.sources])
    for words in (
        "fused",
        "CLM control",
        "Interference",
        "Documents",
        "Specialist code",
        "interval",
    ):
        assert words in first.output
    second = _invoke(run, "eval", "run")
    assert "eval run: complete, nothing to do" in second.output
    content = json.loads((Path(run.folder) / "report" / "evaluation.json").read_text())
    models = {"target_before", "clm_control", "fused", *run.sources}
    assert set(content["bpb"]) == models
    assert all(set(values) == {"code", "odd", "prose"} for values in content["bpb"].values())


def test_a_pass_that_does_not_fit_says_which_option_to_lower(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    monkeypatch.setattr("fuse_train.loop.likelihood.row_nats", full)
    done = _invoke(run, "eval", "run")
    assert done.exit_code == 2
    assert "scoring of 900 tokens at a time does not fit in memory" in done.output
    assert "set evaluate.batch_tokens to 450 or less" in done.output


def test_blocks_hold_what_the_evaluation_says(run: RunConfig) -> None:
    content = evaluate(run, StopFlag()).content
    report = open_location(f"{run.folder}/report")
    blocks = read_blocks(report, content)
    domains = np.asarray(blocks.domains)
    for model, values in content["bpb"].items():
        for domain, value in values.items():
            rows = domains == domain
            nats, size = blocks.nats[model][rows].sum(), blocks.num_bytes[rows].sum()
            assert nats / size / np.log(2) == pytest.approx(value, rel=1e-12)
    whole = sum(sizes["bytes"] for sizes in content["domains"].values())
    assert blocks.num_bytes.sum() == whole
    counts = content["interference"]["documents"]
    assert counts["total"] == len(set(blocks.document_ids))
    # The control has the larger noise on its weights: where it is better, that is excess.
    sums = {
        model: np.array([nats[np.asarray(blocks.document_ids) == d].sum() for d in ids])
        for model, nats in blocks.nats.items()
        for ids in [sorted(set(blocks.document_ids))]
    }
    excess = np.maximum(sums["fused"] - sums["clm_control"], 0)
    assert content["interference"]["excess"]["worse_by_point_nats"] == pytest.approx(excess.sum())
    assert counts["worse_by_point"] == (excess > 0).sum()


def test_a_lost_blocks_file_is_written_again_without_scoring(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(run, StopFlag()).content
    file = Path(run.folder) / "report" / "blocks.parquet"
    data = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(bpb, "score_model", None)
    again = evaluate(run, StopFlag())
    assert again.fresh
    assert again.content == first
    assert file.read_bytes() == data


def test_evaluation_as_json_is_its_file(run: RunConfig) -> None:
    done = _invoke(run, "eval", "run", "--json")
    assert done.exit_code == 0, done.output
    file = Path(run.folder) / "report" / "evaluation.json"
    assert json.loads(done.stdout) == json.loads(file.read_text())
    assert json.loads(_invoke(run, "eval", "run", "--json").stdout) == json.loads(done.stdout)


def test_interference_of_a_run_against_itself(run: RunConfig) -> None:
    evaluate(run, StopFlag())
    done = _invoke(run, "eval", "interference", "--json", "--against", run.folder)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    ratio = found["other_run"]["worse_by_point"]
    assert ratio["nats"] == pytest.approx(found["interference"]["excess"]["worse_by_point_nats"])
    assert ratio["value"] in (None, 1.0)


def test_new_weights_are_scored_again_and_others_are_not(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(run, StopFlag())
    eval_run.pretend_training(run, better=0.05)
    scored: list[str] = []
    original = bpb.score_model
    monkeypatch.setattr(
        bpb,
        "score_model",
        lambda *a, name, **k: (scored.append(name), original(*a, name=name, **k))[1],
    )
    assert evaluate(run, StopFlag()).fresh
    assert scored == ["fused"]


def test_the_same_weights_score_the_same(run: RunConfig) -> None:
    eval_run.pretend_training(run, better=0.0, worse=0.0)
    content = evaluate(run, StopFlag()).content
    assert content["bpb"]["fused"] == content["bpb"]["target_before"]
    change = content["comparisons"][0]["mean"]
    assert change["value"] == change["low"] == change["high"] == 0
    assert content["interference"]["documents"]["worse_by_point"] == 0
    assert content["interference"]["excess"]["worse_by_point_nats"] == 0


def test_report_holds_what_programs_need(run: RunConfig) -> None:
    empty = _invoke(run, "report")
    assert empty.exit_code == 0, empty.output
    page = Path(run.folder) / "report" / "index.html"
    assert "Not evaluated yet" in page.read_text()
    assert _invoke(run, "eval", "pool").exit_code == 0
    assert _invoke(run, "eval", "run").exit_code == 0
    assert _invoke(run, "report").exit_code == 0
    summary = json.loads((Path(run.folder) / "report" / "summary.json").read_text())
    assert {"target_before", "clm_control", "fused", *run.sources} == set(summary["bpb"])
    assert set(summary["pool_bpb"]) == {"uniform", "min_ce", "avg_ce", "hedge", "asn"}
    assert set(summary["coverage"]) == set(run.sources)
    assert all(0 < share <= 1 for share in summary["coverage"].values())
    assert {"pool", "evaluate", "report"} <= set(summary["seconds"])
    assert summary["peak_rss_bytes"] > 10**7
    assert summary["interference"] == summary["evaluation"]["interference"]
    assert "<h2>Interference</h2>" in page.read_text()
    assert summary["settings"]["name"] == "t"
    assert "Not evaluated yet" not in page.read_text()
    before = page.read_bytes()
    assert "complete, nothing to do" in _invoke(run, "report").output
    assert page.read_bytes() == before


def test_what_is_missing_is_told_in_one_line(run: RunConfig) -> None:
    shutil.rmtree(Path(run.folder) / "control")
    with pytest.raises(MissingError, match="logitfuse train run"):
        evaluate(run, StopFlag())
    without = load_run(f"{run.folder}/run.yaml", ("train.control=false", "evaluate.sources=false"))
    content = evaluate(without, StopFlag()).content
    assert set(content["bpb"]) == {"target_before", "fused"}
    assert "interference" not in content
    assert "no CLM control was evaluated" in _invoke(run, "eval", "interference").stderr
    shutil.rmtree(Path(run.folder) / "final")
    result = _invoke(run, "eval", "run")
    assert result.exit_code == 2
    # Through the group's own entry point the error is one line without a traceback.
    assert isinstance(result.exception, SystemExit)


def test_another_tokenizer_than_the_plans_is_refused(
    run: RunConfig, tiny_models: dict[str, Path]
) -> None:
    other = load_run(f"{run.folder}/run.yaml", (f"sources.prose.model={tiny_models['code']}",))
    for kind in ("stores", "aligned"):  # else it is the store's model that is told of
        shutil.rmtree(Path(run.folder) / kind)
    with pytest.raises(MismatchError, match="tokenizer of prose is not the plan's"):
        evaluate(other, StopFlag())
    summary = build_summary(other)
    assert summary["bpb"] == {}


def test_a_source_that_became_another_model(run: RunConfig, tiny_models: dict[str, Path]) -> None:
    """All the same when the stages had been through: a report names no model that was not scored."""
    file = Path(run.folder) / "run.yaml"
    for command in (("eval", "pool"), ("eval", "run"), ("report",)):
        assert _invoke(run, *command).exit_code == 0
    before = (Path(run.folder) / "report/summary.json").read_bytes()
    text = file.read_text()
    file.write_text(text.replace(str(tiny_models["prose"]), str(tiny_models["facts"])))
    for command in (("eval", "pool"), ("eval", "run"), ("report",)):
        done = _invoke(run, *command)
        assert done.exit_code == 2, done.output
        assert "made from another model than the run file's source prose" in done.stderr
        assert "Traceback" not in done.stderr
    assert (Path(run.folder) / "report/summary.json").read_bytes() == before


def test_stop_is_heard(run: RunConfig) -> None:
    stop = StopFlag()
    stop.ask(15)
    with pytest.raises(Stopped):
        evaluate(run, stop)
    with pytest.raises(Stopped):
        estimate_pools(run, stop)
    assert not (Path(run.folder) / "report" / "pool.json").exists()
