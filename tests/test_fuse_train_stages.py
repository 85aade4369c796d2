"""Stages of a training: which texts count when, how much; a stop at a border changes nothing."""

from __future__ import annotations

import os
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fuse_train.config import TrainSection
from fuse_train.data.order import SampleOrder
from fuse_train.data.shares import used_segments
from fuse_train.data.stream import SampleStream, StreamOptions, training_order
from fuse_train.inputs import warn_of_authors
from fuse_train.loop.objective import FusionObjective, StepTotals
from fuse_train.run import open_inputs, train_run
from fuse_train.selectors.by_name import by_rule
from fuse_train.selectors.selectors import SourceView
from fuse_train.stages_config import StageSection
from store_schema.errors import ConfigError, InputError, Stopped
from tests.aligned_factory import make_run
from tests.test_fuse_train_run import lines_of, same, timeless, weights
from tests.wrong_values import refuses

INPUTS = {"code": ("code", "answers"), "prose": ("prose", "answers"), "facts": (None, "given")}
STAGES = (
    StageSection(weights={"answers": 1.0, "given": 0.0}),
    StageSection(weights={"answers": 0.1, "given": 1.0}, epochs=1.5, clm_weight=0.5),
)
PROFUSER = {
    "selector": "author",
    "stages": [stage.model_dump() for stage in STAGES],
    "max_steps": None,
    "eval_every": None,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("stages"), inputs=INPUTS, train=PROFUSER)


@pytest.fixture(scope="module")
def opened(run):
    return open_inputs(run, run.sections["train"])


def options(stages=STAGES, **changes) -> StreamOptions:
    return StreamOptions(
        **({"seed": 3, "batch_segments": 5, "micro_batch_segments": 5, "shuffle_shards": 2,
            "cache_gib": 1.0, "stages": stages} | changes)
    )  # fmt: skip


def test_each_stage_has_its_own_texts_each_once_an_epoch(opened) -> None:
    order = training_order(opened.samples, options())
    segments = [opened.plan.segments(shard) for shard in opened.samples.shards]
    found = [
        [segments[ref.shard][ref.segment] for ref in order.samples(step)]
        for step in range(order.num_steps)
    ]
    answers = sum(s.corpus == "answers" for part in segments for s in part)
    everything = sum(map(len, segments))
    first = -(-answers // 5)
    assert order.num_steps == first + -(-3 * everything // 10)
    assert {s.corpus for step in found[:first] for s in step} == {"answers"}
    assert {s.corpus for step in found[first:] for s in step} == {"answers", "given"}
    once = [s.segment_id for step in found[:first] for s in step][:answers]
    assert len(set(once)) == answers
    again = [s.segment_id for step in found[first:] for s in step][:everything]
    assert sorted(again) == sorted(s.segment_id for part in segments for s in part)
    assert [order.stage_at(step) for step in (0, first - 1, first, order.num_steps - 1)] == [
        *STAGES[:1] * 2,
        *STAGES[1:] * 2,
    ]


def test_without_stages_it_is_the_plain_order(opened) -> None:
    order = training_order(opened.samples, options(()))
    plain = SampleOrder(opened.samples.shard_sizes, seed=3, window_shards=2)
    assert [ref for step in range(9) for ref in order.samples(step)] == plain.samples(0, 45)
    assert (order.num_steps, order.stage_at(0), len(order)) == (None, None, len(plain))


def test_processes_share_a_step_of_stages(opened) -> None:
    one = SampleStream(opened.samples, options(), opened.domains)
    two = [SampleStream(opened.samples, options(), opened.domains, process=(i, 2)) for i in (0, 1)]
    for step in range(one.order.num_steps):
        assert one.step_refs(step) == [ref for part in two for ref in part.step_refs(step)]


def test_chats_stay_together_within_a_stage(opened, monkeypatch) -> None:
    monkeypatch.setattr(type(opened.samples), "chats", lambda self, at: np.arange(12) // 4)
    order = training_order(opened.samples, options(whole_chats=True))
    refs = [ref for step in range(order.num_steps) for ref in order.samples(step)]
    names = [name for shard in range(4) for name in opened.samples.corpora(shard)]
    answers = names.count("answers")
    units = [(ref.shard, ref.segment // 4) for ref in refs[:answers]]
    borders = sum(a != b for a, b in pairwise(units))
    assert borders == len(set(units)) - 1


@pytest.mark.parametrize("selector", ["author", "uniform"])
def test_the_loss_is_the_weighted_sum_of_its_texts(run, opened, selector) -> None:
    section = TrainSection(selector=selector, clm_weight=0.4)
    stream = SampleStream(opened.samples, options(micro_batch_segments=1), opened.domains)

    def corpora(step: int) -> set[str | None]:
        return {stream.sample(ref).segment.corpus for ref in stream.step_refs(step)}

    step = next(step for step in range(99) if corpora(step) == {"answers", "given"})
    together = SampleStream(opened.samples, options(), opened.domains).step_batches(step)
    apart = stream.step_batches(step)
    counts = [float(batch.weights_B) for batch in apart]
    assert {round(count, 6) for count in counts} == {0.1, 1.0}
    for labels in (True, False):  # fused, and ground truth alone
        model = AutoModelForCausalLM.from_pretrained(run.target.model, dtype=torch.float64)
        rule = by_rule(selector) if labels else None
        objective = FusionObjective(model, rule, section, list(run.sources))
        totals = StepTotals(100, 100)

        def gradient(batches, factors, objective=objective, totals=totals):
            objective.zero_grad()
            for batch, factor in zip(batches, factors, strict=True):
                loss, _ = objective(batch, totals)
                (loss * factor).backward()
            return torch.cat([p.grad.flatten() for p in objective.parameters()])

        plain = SampleStream(opened.samples, options((), micro_batch_segments=1), opened.domains)
        bare = [plain_batch(plain, ref) for ref in ordered(stream, step)]
        expected = gradient(bare, counts)
        torch.testing.assert_close(gradient(together, [1.0]), expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient(apart, [1.0] * 5), expected, rtol=1e-6, atol=1e-9)


def ordered(stream, step):
    """The samples of a step in the order of its micro-batches."""
    return sorted(stream.step_refs(step), key=lambda ref: stream.sample(ref).num_tokens)


def plain_batch(stream, ref):
    from fuse_train.data.batch import collate

    return collate([stream.sample(ref)], stream.domains)


def test_lambda_of_a_stage(opened, run) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.target.model)
    objective = FusionObjective(model, by_rule("uniform"), TrainSection(clm_weight=0.3))
    objective.at_progress(0.0, STAGES[1])
    assert objective.weights.clm_weight == 0.5
    objective.at_progress(0.0, STAGES[0])
    assert objective.weights.clm_weight == 0.3
    objective.at_progress(0.0)
    assert objective.weights.clm_weight == 0.3


def test_the_author_teaches_what_it_wrote_and_the_best_source_the_rest() -> None:
    covered = torch.ones(3, 2, 3, dtype=torch.bool)
    covered[0, 1, 2] = False
    bpb = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    past, none = torch.full(covered.shape, torch.nan), torch.zeros(*covered.shape, 0)
    view = SourceView(covered, none, bpb, past, author_B=torch.tensor([2, -1, 1]))
    found = by_rule("author")(view)
    assert found.argmax(-1).tolist() == [[2, 0], [0, 0], [1, 1]]
    assert found.sum(-1).unique().tolist() == [1.0]
    even = by_rule("author", otherwise="uniform")(view)
    assert even[0].tolist() == [[0, 0, 1], [0.5, 0.5, 0]]
    kept = view.of_sources([2, 0])
    assert kept.author_B.tolist() == [0, -1, -1]
    assert by_rule("author")(kept)[:, 0].argmax(-1).tolist() == [0, 1, 1]


def test_authors_that_are_no_sources_are_named(run, opened, tmp_path, caplog) -> None:
    section = run.sections["train"]
    warn_of_authors(opened, section)
    assert not caplog.text
    other = make_run(
        tmp_path / "other", inputs=INPUTS | {"code": ("coder", "answers")}, train=PROFUSER
    )
    warn_of_authors(open_inputs(other, section), section)
    assert "author is none of them: coder " in caplog.text
    nobody = make_run(tmp_path / "nobody", inputs={}, train={"selector": "author"})
    warn_of_authors(open_inputs(nobody, section), section)
    assert "no text has an author" in caplog.text


def test_batches_name_their_authors(opened) -> None:
    stream = SampleStream(opened.samples, options((), batch_segments=12), opened.domains)
    batch = stream.step_batches(0, micro_batch_segments=12)[0]
    names = [opened.samples.sources[i] if i >= 0 else None for i in batch.sources.author_B.tolist()]
    assert names == [
        None if s.startswith("facts") else s.partition("-")[0] for s in batch.segment_ids
    ]


@pytest.mark.parametrize("stop_at", [3, 4, 5])
def test_stopped_around_the_border_of_stages_it_is_the_same(
    run, tmp_path, monkeypatch, capsys, stop_at, straight
) -> None:
    """32 answers are 4 steps of 8: stopped in the step before the border, at it, and after it."""
    made = make_run(tmp_path, inputs=INPUTS, train=PROFUSER)
    original, seen = FusionObjective.forward, []

    def counted(self, batch, totals):
        seen.append(batch)
        if len(seen) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, totals)

    monkeypatch.setattr(FusionObjective, "forward", counted)
    with pytest.raises(Stopped):
        train_run(made)
    capsys.readouterr()
    train_run(made)
    said = capsys.readouterr().out
    assert f" goes on after step {stop_at} of 13" in said
    assert "step 13/13 (stage 2)" in said
    for place in ("run/final", "run/control/final"):
        assert same(weights(tmp_path / place), weights(straight / place))
    assert timeless(lines_of(tmp_path, "train")) == timeless(lines_of(straight, "train"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train_run(make_run(folder, inputs=INPUTS, train=PROFUSER))
    steps = [(line["step"], line["stage"]) for line in lines_of(folder, "train") if line["step"]]
    # One epoch of 32 answers, one and a half of 48 texts.
    assert steps == [(n, 1) for n in range(1, 5)] + [(n, 2) for n in range(5, 14)]
    return folder


def test_a_shorter_training_is_cut_and_no_other_fingerprint_changes(run) -> None:
    section = run.sections["train"]
    assert "stages" in section.content()
    assert "stages" not in TrainSection().content()
    assert section.control_section().stages == section.stages


def test_refused(run, opened, tmp_path) -> None:
    unknown = (StageSection(weights={"answer": 1.0, "given": 0.2}),)
    with pytest.raises(ConfigError) as caught:
        training_order(opened.samples, options(unknown))
    line = caught.value.line()
    assert "train.stages[0].weights" in line
    assert "expected answers, given, got answer" in line
    nameless = make_run(tmp_path, inputs={"code": (None, "answers")})
    samples = open_inputs(nameless, nameless.sections["train"]).samples
    with pytest.raises(InputError, match=r"32 segments.*corpus\.inputs"):
        training_order(samples, options())
    for wrong in (
        {"stages": [{"weights": {}}]},
        {"stages": [{"weights": {"a": 0.0}}]},
        {"stages": [{"weights": {"a": -1.0}}]},
        {"stages": [{"weights": {"a": 1.0}}], "loss": {"span_weight": 1.0}},
        {"stages": [{"weights": {"a": 1.0}, "epochs": 2, "steps": 3}]},
        {"stages": [{"weights": {"a": 1.0}}], "epochs": 2},
        {
            "stages": [{"weights": {"a": 1.0}, "clm_weight": 0.1}],
            "loss": {"clm_weight_schedule": {"kind": "linear", "end": 0.0}},
        },
    ):
        refuses(TrainSection, wrong)


# ---- a share of the text ---------------------------------------------------------------------------


def shares_of(opened, share: float) -> set[tuple[int, int]]:
    used = used_segments(opened.plan, opened.samples.shards, share)
    return {(shard, int(i)) for shard, own in enumerate(used) for i in own}


def test_a_share_has_whole_documents_of_each_domain_and_grows_into_a_larger_one(opened) -> None:
    segments = [opened.plan.segments(shard) for shard in opened.samples.shards]
    every = {(shard, i) for shard, own in enumerate(segments) for i in range(len(own))}
    shares = [0.05, 0.2, 0.5, 0.9, 1.0]
    found = [shares_of(opened, share) for share in shares]
    assert all(small <= large for small, large in pairwise(found))
    assert found[-1] == every
    assert found[0] < found[2] < every
    for share, kept in zip(shares, found, strict=True):
        by_domain: dict[str, dict[str, list[tuple[int, bool]]]] = {}
        for shard, own in enumerate(segments):
            for i, segment in enumerate(own):
                size = segment.byte_end - segment.byte_start
                documents = by_domain.setdefault(segment.domain, {})
                documents.setdefault(segment.document_id, []).append((size, (shard, i) in kept))
        for documents in by_domain.values():
            whole = {name: sum(size for size, _ in parts) for name, parts in documents.items()}
            taken = [name for name, parts in documents.items() if parts[0][1]]
            assert all(len({used for _, used in parts}) == 1 for parts in documents.values())
            size, total = sum(whole[name] for name in taken), sum(whole.values())
            assert share * total <= size
            # Without one of them it is too little: nothing was taken in vain.
            assert size - max(whole[name] for name in taken) < share * total


@pytest.mark.parametrize("stages", [(), STAGES])
def test_only_a_share_of_the_text_is_seen(opened, stages) -> None:
    share = 0.4
    kept = shares_of(opened, share)
    order = training_order(opened.samples, options(stages, text_share=share))
    steps = order.num_steps or -(-3 * len(order) // 5)
    refs = {(ref.shard, ref.segment) for step in range(steps) for ref in order.samples(step)}
    assert refs == kept
    whole = training_order(opened.samples, options(stages))
    assert len(order) < len(whole)


def test_a_share_is_a_training_of_its_own_and_all_the_text_is_as_before(run) -> None:
    section = run.sections["train"]
    assert "text_share" not in section.content()
    some = section.model_copy(update={"text_share": 0.5})
    assert some.content() == section.content() | {"text_share": 0.5}
