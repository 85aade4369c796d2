"""The sampled estimator against float64 arithmetic: unbiased, of least variance, and repeatable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from extract.config import ExtractSection
from extract.engines.protocol import DenseRows, engine_spec, first_known
from extract.engines.sampling import BLOCK, sampled_rows, segment_uniforms, systematic_points
from extract.engines.transformers_engine import TransformersEngine
from extract.run import run_source
from extract.scoring.rows import ScoredSegment, scored_segment
from fuse_train.losses.losses import SourceRows, head_loss, with_tail_policy
from fuse_train.model.heads import Head
from launch.work import Part
from store_schema.config import ModelRef, load_run
from store_schema.disk.location import open_location
from store_schema.errors import ConfigError
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.command import refused
from tests.engine_contract import TOLERANCE_NATS, encoded_samples, reference_logprobs, spec_of
from tests.extract_runs import plan_run, write_run
from tests.tiny import tiny_model, tiny_tokenizer

V = 300
SEEDS = 4_000
F64 = npt.NDArray[np.float64]
SAMPLED = {"estimator": "sampled", "draws": 12}


def logits_of(size: int = V, *, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    """One row of logits [V], in no order."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(logits_V: torch.Tensor) -> F64:
    """[V] float64."""
    return torch.softmax(logits_V.double(), -1).numpy()


def estimates(logits_V: torch.Tensor, points_Rn: torch.Tensor, head: int = 0) -> F64:
    """[R, V] estimates of one and the same row, 0 for what was not drawn."""
    rows = logits_V.expand(len(points_Rn), -1)
    ids, logprobs = sampled_rows(rows, points_Rn, head=head)
    dense = torch.zeros(len(points_Rn), len(logits_V), dtype=torch.float64)
    return dense.scatter_add_(1, ids.clamp(max=len(logits_V) - 1), logprobs.double().exp()).numpy()


def seeded_points(draws: int, *, num_seeds: int = SEEDS) -> torch.Tensor:
    """[seeds, n] points of one position of one segment under many seeds of the run."""
    segment = EncodedSegment((1,), np.arange(3, dtype=np.uint32), np.arange(3, dtype=np.uint32))
    numbers = [segment_uniforms(segment, 3, seed=s, source="m")[1] for s in range(num_seeds)]
    return systematic_points(torch.tensor(numbers, dtype=torch.float64), draws)


def slow_row(logprobs: F64, uniform: float, *, draws: int, head: int = 0) -> dict[int, float]:
    """The estimate of one row in plain float64: id -> log of the estimated probability."""
    p = np.exp(logprobs)
    best = np.argsort(-p, kind="stable")[:head]
    rest = p.copy()
    rest[best] = 0
    points = (np.arange(draws) + uniform) / draws * rest.sum()
    ids = np.searchsorted(np.cumsum(rest), points, side="right")
    found = {int(i): float(logprobs[i]) for i in best}
    for i, count in zip(*np.unique(ids, return_counts=True), strict=True):
        found[int(i)] = float(np.log(count * rest.sum() / draws))
    return found


@pytest.mark.parametrize(("draws", "head"), [(1, 0), (12, 0), (12, 4), (50, 0)])
def test_unbiased_and_of_the_variance_that_theory_gives(draws: int, head: int) -> None:
    logits = logits_of()
    p = softmax(logits)
    found = estimates(logits, seeded_points(draws), head)
    best = np.argsort(-p)[:head]
    rest = 1 - p[best].sum()
    mean_count = p * draws / rest
    fraction = mean_count - np.floor(mean_count)
    variance = fraction * (1 - fraction) * (rest / draws) ** 2
    variance[best] = 0
    errors = found.mean(0) - p
    one_draw = rest / draws / SEEDS  # of the rarest ids three may turn up where none is expected
    assert (abs(errors) <= 4 * np.sqrt(variance / SEEDS) + 3 * one_draw).all()
    measured, independent = found.var(0), p * (rest - p) / draws
    common = mean_count * SEEDS > 200
    common[best] = False
    np.testing.assert_allclose(measured[common], variance[common], rtol=0.35)
    assert 0.95 < measured.sum() / variance.sum() < 1.05
    assert (variance <= independent + 1e-12)[common].all()
    if draws > 1:
        assert measured.sum() < 0.95 * np.delete(independent, best).sum()


def test_independent_points_give_independent_draws() -> None:
    """The inverse of the distribution function itself, by a chi-square of the paper's estimator."""
    logits = logits_of(seed=3)
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(SEEDS, 20, dtype=torch.float64, generator=generator).sort(-1).values
    observed = (estimates(logits, points) * 20).sum(0)
    expected = softmax(logits) * SEEDS * 20
    common = expected >= 5
    pool = [np.append(x[common], x[~common].sum()) for x in (observed, expected)]
    statistic = float(((pool[0] - pool[1]) ** 2 / pool[1]).sum())
    freedom = len(pool[0]) - 1
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [1, 5, BLOCK, BLOCK + 1, V])
@pytest.mark.parametrize("draws", [1, 12, 1000])
@pytest.mark.parametrize("head", [0, 1, 400])
def test_rows_are_distributions_of_distinct_ids(size: int, draws: int, head: int) -> None:
    logits = logits_of(size, scale=4.0)
    logits[:-1:7] = -torch.inf
    points = systematic_points(torch.linspace(0, 1 - 2**-53, 9, dtype=torch.float64), draws)
    ids, logprobs = sampled_rows(logits.expand(9, -1), points, head=head)
    p = softmax(logits)
    assert logprobs.max() <= 0
    np.testing.assert_allclose(logprobs.double().exp().sum(-1).numpy(), 1.0, atol=2e-7)
    for row_ids, row in zip(ids.numpy(), logprobs.double().exp().numpy(), strict=True):
        drawn = row_ids[row > 0]
        assert len(set(drawn.tolist())) == len(drawn)
        assert (p[drawn] > 0).all()
        dense = np.zeros(size)
        dense[drawn] = row[row > 0]
        kept = min(head, size)
        best = np.argsort(-p, kind="stable")[:kept]
        np.testing.assert_allclose(dense[best], p[best], rtol=1e-5, atol=1e-7)
        assert (abs(dense - p) <= (1 - p[best].sum()) / draws + 1e-6).all()
    if draws == 1 and head == 0:
        assert (logprobs == 0).all()


def test_rare_ids_of_a_large_vocabulary_are_where_float64_puts_them() -> None:
    logits = logits_of(131_072, scale=1.0)
    logits[0] = torch.logsumexp(logits[1:], 0)  # half of the mass before all the others
    points = systematic_points(torch.linspace(0, 0.999, 4, dtype=torch.float64), 500)
    ids, logprobs = sampled_rows(logits.expand(4, -1), points, head=0)
    ends = np.append(0.0, np.cumsum(softmax(logits)))
    first = torch.isfinite(logprobs)
    place, point = ids[first].numpy(), points[first].numpy()
    assert len(np.unique(place)) > 800
    assert (ends[place] <= point + 1e-7).all()
    assert (ends[place + 1] >= point - 1e-7).all()


def scored(
    folder: Path, segments: list[EncodedSegment], **options: Any
) -> dict[int, ScoredSegment]:
    """Segments through the engine and the step to the store's rows."""
    spec = spec_of(folder, "transformers", **(SAMPLED | options))
    engine = TransformersEngine(spec)
    return {
        i: scored_segment(dense, len(segments[i].token_ids), vocab_size=spec.vocab_size, where="s")
        for i, dense in engine.score(segments)
    }


def samples_of(folder: Path) -> list[EncodedSegment]:
    """The samples of the engines' contract."""
    return encoded_samples(SegmentTokenizer.load(ModelRef(model=str(folder)), name="m"))


@pytest.mark.parametrize(("name", "head"), [("code", 0), ("prose", 3)])
def test_engine_draws_what_plain_float64_draws(
    tiny_models: dict[str, Path], name: str, head: int
) -> None:
    folder = tiny_models[name]
    segments = samples_of(folder)
    rows = scored(folder, segments, sampled_head=head)
    same = total = 0
    for i, (labels, logprobs) in enumerate(reference_logprobs(folder, segments)):
        row, first = rows[i], first_known(segments[i])
        uniforms = segment_uniforms(segments[i], len(labels), seed=0, source="m")
        np.testing.assert_allclose(row.label_logprobs[first:], labels, atol=TOLERANCE_NATS)
        assert (row.tail_mass[first:] == 0).all()
        assert (row.tail_mass[:first] == 1).all()
        ends = np.cumsum(row.counts)
        for j, uniform in enumerate(uniforms):
            part = slice(ends[j + first] - row.counts[j + first], ends[j + first])
            ids, found = row.entry_ids[part].tolist(), row.entry_logprobs[part].astype(np.float64)
            assert abs(np.exp(found).sum() - 1) < 1e-6
            pairs = list(zip(-found, ids, strict=True))
            assert pairs == sorted(pairs)
            expected = slow_row(logprobs[j], uniform, draws=12, head=head)
            total += 1
            if set(ids) == set(expected):
                same += 1
                wanted = [expected[k] for k in ids]
                np.testing.assert_allclose(found, wanted, atol=TOLERANCE_NATS)
    # A point within float32's rounding of an id's edge may fall on its neighbour.
    assert total > 500
    assert same >= total - 2


def test_draws_do_not_depend_on_batch_or_order(tiny_models: dict[str, Path]) -> None:
    folder = tiny_models["code"]
    segments = samples_of(folder)
    base = scored(folder, segments)
    shuffled = list(reversed(segments))
    last = len(segments) - 1
    for options in ({"batch_tokens": 1, "head_rows": 7}, {"batch_tokens": 65_536}):
        other = scored(folder, shuffled, **options)
        for i in range(len(segments)):
            assert np.array_equal(base[i].entry_ids, other[last - i].entry_ids)
            np.testing.assert_allclose(
                base[i].entry_logprobs, other[last - i].entry_logprobs, atol=1e-6
            )


def test_each_seed_source_and_segment_has_numbers_of_its_own() -> None:
    ids = np.array([5, 6], np.uint32)
    segments = [
        EncodedSegment((), ids, ids),
        EncodedSegment((5,), ids[1:], ids[1:]),
        EncodedSegment((5, 6), ids, ids),
    ]
    keys = [(0, "m", s) for s in segments] + [(1, "m", segments[0]), (0, "n", segments[0])]
    numbers = [segment_uniforms(s, 8, seed=seed, source=source) for seed, source, s in keys]
    assert len({float(x) for row in numbers for x in row}) == 8 * len(keys)
    assert all((row >= 0).all() and (row < 1).all() for row in numbers)
    longer = segment_uniforms(segments[0], 100, seed=0, source="m")
    assert np.array_equal(longer[:8], numbers[0])
    # A run may be resumed under another numpy: these very numbers must stay.
    assert numbers[0][:2].tolist() == [0.12796637462336236, 0.6783394818106229]


def test_padding_ids_are_never_drawn(tmp_path: Path) -> None:
    """Their mass goes to the real ids in proportion, so the tail stays 0."""
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    folder = tiny_model(tmp_path / "m", "llama", tokenizer, vocab_padding=61)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[len(tokenizer) :] *= 3  # much of the mass
    model.save_pretrained(folder)
    segments = samples_of(folder)
    labels, logprobs = reference_logprobs(folder, segments)[-1]
    real = np.exp(logprobs[:, : len(tokenizer)])
    assert real.sum(1).mean() < 0.7
    row = scored(folder, segments[-1:], draws=1000)[0]
    np.testing.assert_allclose(row.label_logprobs[-len(labels) :], labels, atol=TOLERANCE_NATS)
    assert (row.entry_ids < len(tokenizer)).all()
    dense = np.zeros((len(row.counts), len(tokenizer)))
    place = np.repeat(np.arange(len(row.counts)), row.counts)
    dense[place, row.entry_ids] = np.exp(row.entry_logprobs.astype(np.float64))
    expected = real / real.sum(1, keepdims=True)
    assert abs(dense[-len(expected) :] - expected).max() < 1.001e-3


def test_the_whole_head_is_the_whole_distribution(tiny_models: dict[str, Path]) -> None:
    folder = tiny_models["prose"]
    segments = samples_of(folder)[:3]
    size = spec_of(folder, "transformers").vocab_size
    rows = scored(folder, segments, sampled_head=size, draws=1)
    for i, (_, logprobs) in enumerate(reference_logprobs(folder, segments)):
        first = first_known(segments[i])
        assert (rows[i].counts[first:] == size).all()
        found = np.empty_like(logprobs)
        ids = rows[i].entry_ids.reshape(len(logprobs), size).astype(np.int64)
        np.put_along_axis(found, ids, rows[i].entry_logprobs.reshape(ids.shape), axis=1)
        np.testing.assert_allclose(found, logprobs, atol=TOLERANCE_NATS)
    with pytest.raises(ConfigError, match=rf"sampled_head is larger .* at most {size}, got"):
        spec_of(folder, "transformers", **SAMPLED, sampled_head=size + 1)


def test_top_k_of_a_small_vocabulary_does_not_stop_a_sampled_store(
    tiny_models: dict[str, Path],
) -> None:
    folder = tiny_models["code"]
    section = ExtractSection(engine="transformers", estimator="sampled", top_k=1 << 17)
    ref = ModelRef(model=str(folder))
    spec = engine_spec("m", folder, ref, section, vocab_size=300, longest=96, seed=0)
    assert spec.section.max_entries == 12


def test_unused_columns_are_dropped_in_silence() -> None:
    logprobs = np.full((2, 4), -np.inf, np.float32)
    logprobs[0, [0, 3]] = np.log([0.25, 0.75])
    logprobs[1, 2] = 0
    dense = DenseRows(np.tile([7, 2, 5, 3], (2, 1)), logprobs, np.float32([-1, -2]), sampled=True)
    row = scored_segment(dense, 2, vocab_size=9, where="s")
    assert row.counts.tolist() == [2, 1]
    assert row.entry_ids.tolist() == [3, 7, 5]
    assert row.tail_mass.tolist() == [0, 0]


def fusion_gradient(
    logits_V: torch.Tensor, ids_RK: torch.Tensor, probs_RK: torch.Tensor, tail_R: torch.Tensor
) -> torch.Tensor:
    """Mean gradient [H] of CE(P, Q) by the hidden state over rows that share one hidden state."""
    generator = torch.Generator().manual_seed(9)
    hidden_H = torch.randn(16, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(len(logits_V), 16, dtype=torch.float64, generator=generator) * 0.3
    num_rows = len(ids_RK)
    hidden_RH = hidden_H.repeat(num_rows, 1).requires_grad_()
    rows = SourceRows(ids_RK[:, None], probs_RK[:, None], tail_R[:, None])
    loss = head_loss(
        hidden_RH,
        Head(weight_VH),
        torch.zeros(num_rows, dtype=torch.int64),
        torch.zeros(num_rows, dtype=torch.float64),
        rows,
        torch.ones(num_rows, 1, dtype=torch.float64),
        chunk_rows=512,
    )
    (gradient_RH,) = torch.autograd.grad(loss.total, hidden_RH)
    return gradient_RH.mean(0)


def test_the_mean_gradient_is_that_of_the_whole_distribution() -> None:
    """And that of the top k is not, with its tail dropped or its entries scaled to 1."""
    logits = logits_of()
    p = torch.softmax(logits.double(), -1)
    everything = torch.arange(V)[None]
    full = fusion_gradient(logits, everything, p[None], torch.zeros(1, dtype=torch.float64))

    def error(gradient: torch.Tensor) -> float:
        return float((gradient - full).norm() / full.norm())

    ids, logprobs = sampled_rows(logits.expand(SEEDS, -1), seeded_points(12), head=0)
    none = torch.zeros(SEEDS, dtype=torch.float64)
    ids = torch.where(torch.isfinite(logprobs), ids, -1)
    assert error(fusion_gradient(logits, ids, logprobs.double().exp(), none)) < 0.02
    best = p.topk(12)
    tail = 1 - best.values.sum(-1, keepdim=True)
    top = SourceRows(best.indices[None, None], best.values[None, None], tail[None])
    for policy in ("drop", "renormalise"):
        cut = with_tail_policy(top, policy)
        entries = (cut.entry_ids_RMK[:, 0], cut.entry_probs_RMK[:, 0], cut.tail_RM[:, 0])
        assert error(fusion_gradient(logits, *entries)) > 0.1, policy


def test_a_resumed_run_draws_the_same(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    models = {name: tiny_models[name] for name in ("prose", "target")}
    options = {"engine": "transformers", "top_k": 16, **SAMPLED}
    path = plan_run(write_run(tmp_path, models, extract=options))
    run = load_run(path)
    run_source(run, "prose", Part())
    store = tmp_path / "run" / "stores" / "prose"
    before = StoreReader.open(open_location(str(store)))
    contents = {shard: commit.content_sha256 for shard, commit in before.commits.items()}
    assert len(contents) > 2
    for name in sorted((store / "commits").iterdir())[1:]:
        name.unlink()
    run_source(run, "prose", Part())
    after = StoreReader.open(open_location(str(store)))
    assert {n: commit.content_sha256 for n, commit in after.commits.items()} == contents
    for shard in contents:
        after.verify(shard)
        arrays = after.read(shard)
        rows = np.diff(arrays["entry_offsets"]) > 0
        assert (arrays["tail_mass"][rows] == 0).all()


def test_vllm_is_refused_before_anything_runs(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    models = {name: tiny_models[name] for name in ("prose", "target")}
    run = write_run(tmp_path, models, extract={"engine": "vllm", "estimator": "sampled"})
    assert "needs engine transformers" in refused("corpus", "build", run)
