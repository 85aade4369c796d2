"""Interference by document: exact figures, what must and must not be found, and the error rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse_eval.interference.blocks import Blocks
from fuse_eval.interference.documents import (
    MIN_BLOCKS,
    DocumentDifferences,
    adjusted,
    block_correlation,
    document_differences,
    document_noise,
    interference_record,
    p_not_worse,
    student_tail,
)

T_TABLE = [
    # One-sided tails of Student's t from scipy.special.stdtr 1.17.1.
    (1.0, 1, 0.25),
    (2.5, 2, 0.06480586011075541),
    (-1.3, 5, 0.8748496829146615),
    (3.2, 7, 0.0075329056712446505),
    (6.5, 12, 1.4682517843374057e-05),
    (4.0, 99, 6.112576378555657e-05),
]


def make_blocks(
    documents: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    num_bytes: Sequence[int] | int = 100,
    domain: str = "x",
) -> Blocks:
    """Blocks of documents given as (fused, control) nats of their blocks."""
    names = [name for name, (fused, _) in documents.items() for _ in fused]
    numbers = [i for fused, _ in documents.values() for i in range(len(fused))]
    sizes = [num_bytes] * len(names) if isinstance(num_bytes, int) else num_bytes
    return Blocks(
        tuple(names),
        tuple(f"{name}#0" for name in names),
        (domain,) * len(names),
        np.asarray(numbers, np.int32),
        np.asarray(sizes, np.int64),
        {
            model: np.concatenate([np.asarray(pair[side], float) for pair in documents.values()])
            for side, model in enumerate(("fused", "clm_control"))
        },
    )


def differences(
    documents: dict[str, tuple[Sequence[float], Sequence[float]]],
) -> DocumentDifferences:
    return document_differences(make_blocks(documents), "fused", "clm_control")


@pytest.mark.parametrize(("t", "freedom", "expected"), T_TABLE)
def test_students_t_against_a_library(t: float, freedom: int, expected: float) -> None:
    assert student_tail(t, freedom) == pytest.approx(expected, rel=1e-9)


def test_students_t_at_its_ends() -> None:
    assert student_tail(0.0, 9) == pytest.approx(0.5)
    assert student_tail(math.inf, 9) == 0
    assert student_tail(-math.inf, 10) == 1
    assert student_tail(1.6448536269514722, 10**6) == pytest.approx(0.05, rel=0.005)  # normal


def test_benjamini_hochberg_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.5 by 4/rank: 0.04, 0.04, 0.04, 0.5 after the running minimum.
    assert adjusted(np.array([0.03, 0.5, 0.01, 0.02])) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert adjusted(np.array([0.9, 0.8])) == pytest.approx([0.9, 0.9])
    assert adjusted(np.array([])).tolist() == []


def _p(nats: Sequence[float], num_bytes: Sequence[int], correlation: float = 0.0) -> float:
    noise = document_noise(np.asarray(nats, float), np.asarray(num_bytes, np.int64))
    return p_not_worse(noise, correlation)


SYMMETRIC = np.array([-3.0, -1.5, -0.5, -0.25, 0.25, 0.5, 1.5, 3.0]) + 0.75


def test_equal_blocks_without_skew_are_the_ordinary_t_test() -> None:
    t = 0.75 / (SYMMETRIC.std(ddof=1) / math.sqrt(8))
    assert _p(SYMMETRIC, [64] * 8) == pytest.approx(student_tail(t, 7), rel=1e-12)


def test_neighbours_that_go_together_widen_the_noise() -> None:
    t = 0.75 / (SYMMETRIC.std(ddof=1) / math.sqrt(8))
    wider = student_tail(t / math.sqrt(1.5), 7)
    assert _p(SYMMETRIC, [64] * 8, 0.25) == pytest.approx(wider, rel=1e-12)
    assert _p(SYMMETRIC, [64] * 8, -0.25) == _p(SYMMETRIC, [64] * 8)


def test_correlation_of_neighbours_is_estimated_without_bias() -> None:
    rng = np.random.default_rng(4)
    for truth in (0.0, 0.3):
        noise = rng.normal(size=(4000, 40))
        for i in range(1, 40):  # 27 blocks before the first one make it stationary
            noise[:, i] += truth * noise[:, i - 1]
        documents = [
            row[-int(size) :] for row, size in zip(noise, rng.integers(8, 14, 4000), strict=True)
        ]
        residuals = [(one - one.mean()) * rng.exponential(5) for one in documents]
        assert block_correlation(residuals) == pytest.approx(truth, abs=0.025)
    assert block_correlation([]) == block_correlation([np.zeros(9)]) == 0


def test_a_lean_to_gains_needs_more_than_students_t() -> None:
    """One great gain among many small losses: t alone would call the rest of the losses sure."""
    nats = np.array([1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.2, 1.3, 1.0, 0.9, -4.0, 1.1])
    residuals = nats - nats.mean()
    t = nats.mean() / (nats.std(ddof=1) / math.sqrt(12))
    skew = (residuals**3).mean() / (residuals**2).mean() ** 1.5 * math.sqrt(12 * 11) / 10
    lean = skew / math.sqrt(12)
    hall = t + lean * t**2 / 3 + lean**2 * t**3 / 27 + lean / 6
    assert hall < t
    assert _p(nats, [64] * 12) == pytest.approx(student_tail(hall, 11), rel=1e-9)
    # The other way round, t is already careful.
    t = (2 - nats).mean() / (nats.std(ddof=1) / math.sqrt(12))
    assert _p(2 - nats, [64] * 12) == pytest.approx(student_tail(t, 11), rel=1e-9)


def test_unequal_blocks_are_tested_on_bits_per_byte() -> None:
    """A difference in proportion to the bytes has no noise, however the blocks' sizes differ."""
    sizes = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 10, 20, 30])
    assert _p(0.01 * sizes, sizes) < 1e-12
    assert _p(-0.01 * sizes, sizes) > 1 - 1e-12


def test_too_few_blocks_are_undecided() -> None:
    assert math.isnan(_p([1.0] * (MIN_BLOCKS - 1), [100] * (MIN_BLOCKS - 1)))
    assert _p([1.0] * MIN_BLOCKS, [100] * MIN_BLOCKS) == 0
    # One long block and many tiny ones are as good as one.
    assert math.isnan(_p([1.0] * 20, [10_000] + [1] * 19))
    assert math.isnan(_p([], []))


def test_blocks_without_bytes_are_not_tested_on() -> None:
    nats = [11.0, 12.0] * 4 + [0.0]
    blocks = make_blocks({"d": (nats, [10.0] * 8 + [0.0])}, num_bytes=[100] * 8 + [0])
    found = document_differences(blocks, "fused", "clm_control")
    assert found.p_values[0] == differences({"d": (nats[:8], [10.0] * 8)}).p_values[0]


def test_figures_by_hand() -> None:
    control = [10.0] * 8
    found = differences(
        {
            "better": ([9.0, 8.0] * 4, control),
            "noise": ([11.0, 9.5] * 4, control),
            "short": ([14.0] * 3, [10.0] * 3),
            "worse": ([12.0, 13.0] * 4, control),
        }
    )
    record = interference_record(found, "fused", "clm_control", 0.95)
    assert record["documents"] == {"total": 4, "worse": 1, "undecided": 1, "worse_by_point": 3}
    split_bits = math.log(2) * (3 * 800 + 300)
    assert record["excess"] == {
        "worse_nats": 20.0,
        "worse_bpb": pytest.approx(20 / split_bits),
        "worse_by_point_nats": 20.0 + 2.0 + 12.0,
        "worse_by_point_bpb": pytest.approx(34 / split_bits),
    }
    shown = [(d["document_id"], d["verdict"], d["excess_nats"]) for d in record["worst_documents"]]
    assert shown == [
        ("worse", "worse", 20.0),
        ("short", "undecided", 12.0),
        ("noise", "within noise", 2.0),
    ]
    first = record["worst_documents"][0]
    assert first["change"] == pytest.approx(100 / 80 - 1)
    assert first["bpb"] == pytest.approx(100 / 800 / math.log(2))
    assert first["against_bpb"] == pytest.approx(80 / 800 / math.log(2))
    assert record["worst_documents"][1]["p_value"] is None
    # t of four 2s and four 3s: 2.5 / (sqrt(2/7) / sqrt(8)).
    expected = student_tail(2.5 / math.sqrt(2 / 7 / 8), 7)
    assert first["p_value"] == pytest.approx(expected, rel=1e-9)


def test_domains_add_up_to_the_split() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for domain in ("b", "a"):
        pairs = {
            f"{i}": (c + rng.normal(0.3 * (i % 3), 1, 12), c)
            for i in range(9)
            for c in [rng.exponential(40, 12)]
        }
        parts.append(make_blocks(pairs, domain=domain))
    blocks = Blocks(
        parts[0].document_ids + parts[1].document_ids,
        parts[0].segment_ids + parts[1].segment_ids,
        parts[0].domains + parts[1].domains,
        np.concatenate([p.numbers for p in parts]),
        np.concatenate([p.num_bytes for p in parts]),
        {m: np.concatenate([p.nats[m] for p in parts]) for m in parts[0].nats},
    )
    # Documents of one name in two domains are two.
    found = document_differences(blocks, "fused", "clm_control")
    record = interference_record(found, "fused", "clm_control", 0.9)
    assert list(record["domains"]) == ["a", "b"]
    for kind in ("documents", "excess"):
        for key, value in record[kind].items():
            over = sum(figures[kind][key] for figures in record["domains"].values())
            assert over == pytest.approx(value)
    assert record["documents"]["total"] == 18


def test_the_order_of_documents_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    pairs = {f"{i}": (rng.normal(10, 1, 9), rng.normal(10, 1, 9)) for i in range(7)}
    one, two = differences(pairs), differences(dict(reversed(pairs.items())))
    assert one.document_ids == two.document_ids
    assert one.p_values == pytest.approx(two.p_values, rel=1e-9)
    assert one.model_nats.tolist() == two.model_nats.tolist()


_nats = st.lists(st.floats(0, 500), min_size=1, max_size=30)


@given(documents=st.lists(_nats, min_size=1, max_size=8))
def test_a_model_is_not_worse_than_itself(documents: list[list[float]]) -> None:
    found = differences({f"{i}": (nats, nats) for i, nats in enumerate(documents)})
    record = interference_record(found, "fused", "clm_control", 0.95)
    assert record["documents"]["worse"] == record["documents"]["worse_by_point"] == 0
    assert record["excess"]["worse_by_point_nats"] == 0
    assert record["worst_documents"] == []


@given(
    lengths=st.lists(st.integers(MIN_BLOCKS, 40), min_size=2, max_size=8),
    excess=st.floats(0.5, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_constant_excess_on_one_document_is_found(
    lengths: list[int], excess: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    documents = {f"{i}": (c := rng.exponential(40, n), c) for i, n in enumerate(lengths)}
    documents["0"] = (documents["0"][0] + excess, documents["0"][1])
    record = interference_record(differences(documents), "fused", "clm_control", 0.95)
    assert [d["document_id"] for d in record["worst_documents"]] == ["0"]
    assert record["documents"]["worse"] == 1
    assert record["excess"]["worse_nats"] == pytest.approx(excess * lengths[0])


NOISE: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_t(5, size),
    "skewed to losses": lambda rng, size: rng.gamma(4, 0.5, size) - 2,
    "skewed to gains": lambda rng, size: 2 - rng.gamma(4, 0.5, size),
    "neighbours alike": lambda rng, size: np.convolve(rng.normal(size=size + 1), [1, 0.3], "valid"),
}


def simulated(rng: np.random.Generator, shifts: Sequence[float], noise: str) -> DocumentDifferences:
    """Documents of 8 to 40 blocks, each with its own true excess per block."""
    documents = {}
    for i, shift in enumerate(shifts):
        size = int(rng.integers(MIN_BLOCKS, 41))
        documents[f"{i:03}"] = (100 + shift + NOISE[noise](rng, size), np.full(size, 100.0))
    return differences(documents)


@pytest.mark.parametrize("noise", NOISE)
def test_false_discovery_rate_is_kept(noise: str) -> None:
    """Of the documents named, those without a true excess are at most 1 - confidence on average."""
    rng = np.random.default_rng(11)
    shifts = [1.2] * 30 + [0.0] * 70
    wrong, hit = [], []
    for _ in range(40):
        worse = simulated(rng, shifts, noise).worse(0.9)
        wrong.append(worse[30:].sum() / max(worse.sum(), 1))
        hit.append(worse[:30].mean())
    assert np.mean(wrong) <= 0.1
    assert np.mean(hit) > 0.75


@pytest.mark.parametrize("noise", [name for name in NOISE if name != "skewed to gains"])
def test_without_interference_nothing_is_named_most_of_the_time(noise: str) -> None:
    rng = np.random.default_rng(12)
    named = [simulated(rng, [0.0] * 60, noise).worse(0.9).any() for _ in range(100)]
    assert np.mean(named) <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 100)
