"""Interference by document: exact figures, what must and must not be found, and the error rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse_eval.blocks import Blocks
from fuse_eval.interference import (
    MIN_BLOCKS,
    DocumentDifferences,
    adjusted,
    document_differences,
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


def test_equal_blocks_are_the_ordinary_t_test() -> None:
    nats = np.array([1.0, -0.5, 2.0, 0.25, 1.5, -1.0, 0.5, 0.75])
    t = nats.mean() / (nats.std(ddof=1) / math.sqrt(8))
    assert p_not_worse(nats, np.full(8, 64)) == pytest.approx(student_tail(t, 7), rel=1e-12)


def test_unequal_blocks_are_tested_on_bits_per_byte() -> None:
    """A difference in proportion to the bytes has no noise, however the blocks' sizes differ."""
    sizes = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 10, 20, 30])
    assert p_not_worse(0.01 * sizes, sizes) < 1e-12
    assert p_not_worse(-0.01 * sizes, sizes) > 1 - 1e-12
    # Blocks without bytes say nothing.
    with_empty = p_not_worse(np.append(0.01 * sizes, 0.0), np.append(sizes, 0))
    assert with_empty == p_not_worse(0.01 * sizes, sizes)


def test_too_few_blocks_are_undecided() -> None:
    assert math.isnan(p_not_worse(np.ones(MIN_BLOCKS - 1), np.full(MIN_BLOCKS - 1, 100)))
    assert p_not_worse(np.ones(MIN_BLOCKS), np.full(MIN_BLOCKS, 100)) == 0
    # One long block and many tiny ones are as good as one.
    assert math.isnan(p_not_worse(np.ones(20), np.array([10_000] + [1] * 19)))
    assert math.isnan(p_not_worse(np.zeros(1), np.zeros(1, int)))


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


def test_the_order_of_blocks_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    blocks = make_blocks({f"{i}": (rng.normal(10, 1, 9), rng.normal(10, 1, 9)) for i in range(7)})
    order = rng.permutation(63)
    mixed = Blocks(
        tuple(blocks.document_ids[i] for i in order),
        tuple(blocks.segment_ids[i] for i in order),
        blocks.domains,
        blocks.numbers[order],
        blocks.num_bytes[order],
        {m: v[order] for m, v in blocks.nats.items()},
    )
    one, two = (document_differences(b, "fused", "clm_control") for b in (blocks, mixed))
    assert one.document_ids == two.document_ids
    assert one.p_values == pytest.approx(two.p_values, rel=1e-9)
    assert one.model_nats == pytest.approx(two.model_nats)


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


def simulated(
    rng: np.random.Generator, shifts: Sequence[float], *, correlation: float
) -> DocumentDifferences:
    """Documents of 8 to 40 blocks whose differences are skewed and hang together a little."""
    documents = {}
    for i, shift in enumerate(shifts):
        size = int(rng.integers(MIN_BLOCKS, 41))
        noise = rng.gamma(4, 0.5, size) - 2  # long tail to the right, mean 0, deviation 1
        noise *= rng.choice([-1, 1])
        noise[1:] += correlation * noise[:-1]
        documents[f"{i:03}"] = (100 + shift + noise, np.full(size, 100.0))
    return differences(documents)


def test_false_discovery_rate_is_kept() -> None:
    """Of the documents named, those without a true excess are at most 1 - confidence on average."""
    rng = np.random.default_rng(11)
    shifts = [1.0] * 30 + [0.0] * 70
    wrong, hit = [], []
    for _ in range(120):
        worse = simulated(rng, shifts, correlation=0.0).worse(0.9)
        wrong.append(worse[30:].sum() / max(worse.sum(), 1))
        hit.append(worse[:30].mean())
    assert 0.02 <= np.mean(wrong) <= 0.1  # expected: 0.1 x 70 % for an exact test
    assert np.mean(hit) > 0.75


def test_without_interference_nothing_is_named_most_of_the_time() -> None:
    rng = np.random.default_rng(12)
    named = [simulated(rng, [0.0] * 100, correlation=0.0).worse(0.95).any() for _ in range(200)]
    assert np.mean(named) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)
