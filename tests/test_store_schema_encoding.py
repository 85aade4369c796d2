"""Compact entries: what comes back stays within the stated bound, whatever went in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from store_schema.encoding import codes
from store_schema.encoding.encoding import decode, encode, groups, needed_specs, stored_specs
from store_schema.encoding.frequency import ids_by_rank
from store_schema.encoding.group import Coder
from store_schema.encoding.selection import select_entries
from store_schema.errors import CorruptionError
from store_schema.layout import BRANCH, FORMS, Arrays, Form, array_names, check_shard
from store_schema.presets import PRESETS, Encoding, Preset, Selection, Steps, StoreSection
from tests import store_factory

VOCAB = 300


def _ranking(seed: int = 0) -> np.ndarray:
    return ids_by_rank(np.random.default_rng(seed).integers(0, 50, VOCAB))


def _coder(encoding: Encoding, seed: int = 0) -> Coder:
    return Coder(encoding, _ranking(seed), "store s, shard 0")


def _check(kind: Form, arrays: Arrays) -> None:
    check_shard(kind, arrays, vocab_size=VOCAB, where="made")


def _arrays(kind: Form, seed: int, *, top_k: int = 40, sharpness: float = 1.0) -> Arrays:
    """Rows from sure to flat, with exact ties, empty rows and rows that hold all the mass; answers
    have none."""
    rng = np.random.default_rng(seed)
    arrays = store_factory.arrays(kind, (7, 0, 30), top_k=top_k, vocab_size=VOCAB, seed=seed)
    if kind == "generated":
        return arrays
    offsets = arrays["entry_offsets"]
    for row in range(len(offsets) - 1):
        part = slice(offsets[row], offsets[row + 1])
        count = offsets[row + 1] - offsets[row]
        if not count:
            continue
        logits = np.sort(rng.normal(size=count + 1) * rng.uniform(0, 8 * sharpness))[::-1]
        if rng.random() < 0.2:
            logits[: count // 2] = logits[0]
        full = logits - np.logaddexp.reduce(logits)
        if rng.random() < 0.2:
            full = logits - np.logaddexp.reduce(logits[:-1])  # no tail at all
        arrays["entry_logprobs"][part] = np.minimum(full[:-1], 0)
    mass = np.add.reduceat(
        np.append(np.exp(arrays["entry_logprobs"].astype(np.float64)), 0), offsets[:-1]
    )
    mass[np.diff(offsets) == 0] = 0
    arrays["tail_mass"] = np.clip(1 - mass, 0, 1).astype(np.float32)
    _check(kind, arrays)
    return arrays


def _rows(arrays: Arrays, of: str = "") -> list[dict[int, float]]:
    offsets = arrays[f"{of}entry_offsets"]
    return [
        dict(
            zip(
                arrays[f"{of}entry_ids"][a:b].tolist(),
                arrays[f"{of}entry_logprobs"][a:b].astype(np.float64).tolist(),
                strict=True,
            )
        )
        for a, b in itertools.pairwise(offsets)
    ]


STEPS = st.builds(
    lambda step, ratio, label: Steps(step=step, max_step=min(step * ratio, 0.5), label_step=label),
    st.floats(1e-3, 0.2),
    st.floats(1, 30),
    st.sampled_from([2**-12, 2**-8, 0.05]),
)


@pytest.mark.parametrize("kind", ["source", "branched", "aligned"])
@settings(max_examples=60)
@given(steps=STEPS, seed=st.integers(0, 2**31), sharpness=st.sampled_from([0.1, 1.0, 4.0]))
def test_every_entry_stays_within_one_step(
    kind: Form, steps: Steps, seed: int, sharpness: float
) -> None:
    encoding = Encoding(steps=steps)
    given_arrays = select_entries(_arrays(kind, seed, sharpness=sharpness), encoding)
    coder = _coder(encoding, seed)
    back = decode(kind, encode(kind, given_arrays, coder), coder)
    _check(kind, back)
    assert set(back) == set(array_names(kind))
    in_steps = {"label_logprobs", "span_logprobs"}
    coded = {
        of + name for of in ("", BRANCH) for name in ("entry_ids", "entry_logprobs", "tail_mass")
    }
    for name in set(back) - coded - in_steps:
        np.testing.assert_array_equal(back[name], given_arrays[name], err_msg=name)
        assert back[name].dtype == given_arrays[name].dtype, name
    for name in in_steps & set(back):
        true, found = given_arrays[name].astype(np.float64), back[name].astype(np.float64)
        limit = steps.label_step / 2 + 1e-5 * np.abs(np.nan_to_num(true))
        np.testing.assert_array_equal(np.isnan(found), np.isnan(true))
        assert (np.nan_to_num(np.abs(found - true)) <= limit).all(), name
    for of in ("", BRANCH)[: 2 if kind == "branched" else 1]:
        for before, after in zip(_rows(given_arrays, of), _rows(back, of), strict=True):
            assert before.keys() == after.keys()
            for token, true in before.items():
                limit = codes.bound(steps, np.maximum(-true, -after[token]))
                assert abs(after[token] - true) <= limit * (1 + 1e-5) + 1e-6
        # Mass is conserved exactly, to float32.
        mass = np.array([sum(np.exp(list(row.values()))) for row in _rows(back, of)])
        np.testing.assert_allclose(mass + back[f"{of}tail_mass"], 1, atol=5e-6)


@pytest.mark.parametrize("sure", [0.5, 0.55, 0.6])
def test_where_rounding_all_one_way_would_move_a_sure_entry(sure: float) -> None:
    """Many entries of one code are rounded alike: what scaling gives back falls on the sure one."""
    steps, moved = Steps(step=0.02, max_step=0.5, label_step=0.01), 0
    for few in np.linspace(0.999, 0.95, 200):
        logprobs = np.log(np.array([sure, *[(few - sure) / 100] * 100])).astype(np.float32)
        mass = np.exp(logprobs.astype(np.float64)).sum()
        offsets = np.array([0, len(logprobs)])
        tail = np.array([1 - mass], np.float32)
        found, tails = codes.encode_rows(logprobs, offsets, tail, steps)
        moved += tails[0] == codes.TAIL_DERIVED
        ids = np.arange(len(logprobs), dtype=np.uint32)
        rises, packed = codes.pack_ids(found, ids, offsets)
        _, back, left, wrong = codes.decode_rows(rises, packed, offsets, tails, ids, steps)
        assert wrong == -1
        true, back = logprobs.astype(np.float64), back.astype(np.float64)
        limit = codes.bound(steps, np.maximum(-true, -back))
        assert (np.abs(back - true) <= limit * (1 + 1e-5) + 1e-6).all()
        assert np.exp(back).sum() + left[0] == pytest.approx(1, abs=5e-6)
    assert moved > 10


@pytest.mark.parametrize("kind", FORMS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_exact_changes_no_bit(kind: Form, seed: int) -> None:
    arrays = _arrays(kind, seed)
    coder = _coder(PRESETS["exact"], seed)
    back = decode(kind, encode(kind, select_entries(arrays, coder.encoding), coder), coder)
    for name, array in arrays.items():
        assert back[name].tobytes() == array.tobytes(), name
        assert back[name].dtype == array.dtype, name


def test_impossible_and_unknown_labels_come_back() -> None:
    encoding = PRESETS["tiny"]
    arrays = _arrays("source", 3)
    arrays["label_logprobs"][:4] = [-np.inf, np.nan, -5000.0, 0.0]
    back = decode("source", encode("source", arrays, _coder(encoding)), _coder(encoding))
    assert np.isneginf(back["label_logprobs"][0])
    assert np.isnan(back["label_logprobs"][1])
    assert back["label_logprobs"][2] == pytest.approx(-5000, abs=0.01)
    assert back["label_logprobs"][3] == 0


def test_encoding_is_its_own_inverse_on_what_it_made() -> None:
    """Reading and writing a store again changes no code: errors do not pile up."""
    encoding = Encoding(steps=Steps(step=0.02, max_step=0.2, label_step=2**-8))
    coder = _coder(encoding)
    once = decode("source", encode("source", _arrays("source", 5), coder), coder)
    twice = decode("source", encode("source", once, coder), coder)
    for left, right in zip(_rows(once), _rows(twice), strict=True):
        assert left.keys() == right.keys()
        for token, value in left.items():
            assert abs(right[token] - value) <= codes.bound(coder.steps, np.float64(-value))


def test_table_of_codes_against_its_definition() -> None:
    steps = Steps(step=0.02, max_step=0.2, label_step=2**-8)
    table = codes.values(steps)
    assert table[0] == 0
    assert (np.diff(table) > 0).all()
    assert np.diff(table).max() <= steps.max_step + 1e-12
    assert table[-2] <= codes.LARGEST_NATS <= table[-1]
    # Even in sqrt(p) before the corner, even in nats after it.
    *_, nats, code = codes.spacing(steps)
    roots = np.exp(-table[: int(code)] / 2)
    np.testing.assert_allclose(np.diff(roots), -steps.step / 2, rtol=1e-9)
    np.testing.assert_allclose(np.diff(table[int(code) + 2 :]), steps.max_step, rtol=1e-9)
    assert table[int(code)] <= nats <= table[int(code) + 1]


# ------------------------------------------------------------------------------- plain references


def _plain_place_major(values: np.ndarray, offsets: np.ndarray) -> list[int]:
    rows = [values[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    longest = max((len(row) for row in rows), default=0)
    return [row[k] for k in range(longest) for row in rows if len(row) > k]


@given(counts=st.lists(st.integers(0, 6), max_size=12))
def test_order_by_place_against_plain(counts: list[int]) -> None:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    entries = np.arange(offsets[-1], dtype=np.uint32) + 100
    placed = codes.to_place_major(entries, offsets)
    assert placed.tolist() == _plain_place_major(entries, offsets)
    assert codes.from_place_major(placed, offsets).tolist() == entries.tolist()


def test_ids_are_packed_as_documented() -> None:
    """Two rows; codes 3 3 5 5 5 and 0 0: groups by code, ranks rising inside, distances less one."""
    row_codes = np.array([3, 3, 5, 5, 5, 0, 0], np.uint32)
    ranks = np.array([9, 4, 7, 1, 2, 30, 31], np.uint32)
    offsets = np.array([0, 5, 7], np.int64)
    ranks = codes.sort_ties(row_codes, ranks, offsets)
    assert ranks.tolist() == [4, 9, 1, 2, 7, 30, 31]
    rises, ids = codes.pack_ids(row_codes, ranks, offsets)
    assert rises.tolist() == [3, 0, 0, 0, 2, 0, 0]
    assert ids.tolist() == [4, 1, 30, 4, 0, 4, 0]


def _plain_selection(row: list[float], rule: Selection) -> int:
    kept, mass = 0, 0.0
    for logprob in row:
        p = float(np.exp(logprob))
        if not (kept < rule.min_entries or mass < rule.top_p or (rule.floor and p >= rule.floor)):
            break
        kept += 1
        mass += p
    return kept


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    top_p=st.floats(0, 0.999),
    least=st.integers(1, 9),
    floor=st.sampled_from([0.0, 1e-3, 0.02, 0.3]),
)
def test_selection_against_plain(seed: int, top_p: float, least: int, floor: float) -> None:
    rule = Selection(top_p=top_p, min_entries=least, floor=floor)
    arrays = _arrays("source", seed)
    kept = select_entries(arrays, Encoding(selection=rule))
    check_shard("source", kept, vocab_size=VOCAB, where="kept")
    for before, after in zip(_rows(arrays), _rows(kept), strict=True):
        count = _plain_selection(list(before.values()), rule)
        assert list(after.items()) == list(before.items())[:count]
    assert select_entries(arrays, Encoding()) is arrays


def test_branches_go_with_their_entries() -> None:
    arrays = _arrays("branched", 3)
    kept = select_entries(arrays, Encoding(selection=Selection(top_p=0.0, min_entries=1)))
    check_shard("branched", kept, vocab_size=VOCAB, where="kept")
    places = set(
        zip(kept["branch_positions"].tolist(), kept["branch_tokens"].tolist(), strict=True)
    )
    before = zip(arrays["branch_positions"].tolist(), arrays["branch_tokens"].tolist(), strict=True)
    firsts = [next(iter(row), None) for row in _rows(arrays)]
    assert places == {(p, token) for p, token in before if firsts[p] == token} != set()
    assert np.diff(kept["branch_entry_offsets"]).max() == 1
    assert len(kept["branch_tail_mass"]) == len(places)


# ------------------------------------------------------------------------------- records on disk


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("kind", FORMS)
def test_every_array_of_the_layout_has_one_home(kind: Form, preset: Preset) -> None:
    encoding = PRESETS[preset]
    names = [name for group in groups(kind, encoding) for name in group.names]
    assert sorted(names) == sorted(array_names(kind))
    stored = [spec.name for spec in stored_specs(kind, encoding)]
    assert len(stored) == len(set(stored))
    assert [spec.name for spec in needed_specs(kind, encoding)] == stored
    made = encode(kind, _arrays(kind, 1), _coder(encoding))
    assert list(made) == stored
    for spec in stored_specs(kind, encoding):
        assert made[spec.name].dtype.str == spec.dtype, spec.name


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("preset", ["exact", "tiny"])
def test_one_array_needs_only_its_own_files(kind: Form, preset: Preset) -> None:
    encoding = PRESETS[preset]
    coder, arrays = _coder(encoding), _arrays(kind, 2)
    if kind != "generated":
        arrays = select_entries(arrays, encoding)
    stored = encode(kind, arrays, coder)
    whole = decode(kind, stored, coder)
    for name in array_names(kind):
        specs = needed_specs(kind, encoding, [name])
        needed = {spec.name: stored[spec.name] for spec in specs}
        part = decode(kind, needed, coder, [name])
        assert list(part) == [name]
        np.testing.assert_array_equal(part[name], whole[name])


@pytest.mark.parametrize(
    ("name", "place", "value", "what"),
    [
        ("token_ranks", 0, VOCAB, "rank out of range"),
        ("token_counts", 0, 8, "do not sum"),
        ("entry_counts", 1, 40_000, "do not sum"),
        ("entry_ids_coded", 0, 2**32 - 1, "position"),
        ("entry_ids_coded", -1, 2**32 - 1, "position"),
        ("entry_rises", 0, 2**32 - 1, "position"),
        ("tail_codes", 1, 2**32 - 1, "position"),
        ("origin", 0, 256, "out of range"),
    ],
)
def test_numbers_that_encode_never_writes_are_refused(
    name: str, place: int, value: int, what: str
) -> None:
    coder = _coder(Encoding(steps=PRESETS["compact"].steps))
    arrays = _arrays("aligned", 4)
    arrays["tail_mass"][1] = min(arrays["tail_mass"][1], 0.4)
    stored = encode("aligned", arrays, coder)
    stored[name] = stored[name].copy()
    stored[name][place] = value
    with pytest.raises(CorruptionError, match=what) as caught:
        decode("aligned", stored, coder)
    assert name.split("_")[0] in caught.value.line()


def test_the_largest_numbers_come_back() -> None:
    coder = _coder(Encoding(steps=PRESETS["compact"].steps))
    stored = encode("aligned", _arrays("aligned", 4), coder)
    stored["origin"] = np.full_like(stored["origin"], 255)
    assert (decode("aligned", stored, coder)["origin"] == 255).all()
    stored = encode("branched", _arrays("branched", 4), coder)
    steps = stored["branch_steps"] = stored["branch_steps"].copy()
    steps[-1] = 2**32 - 1 - int(steps[:-1].sum())
    assert decode("branched", stored, coder)["branch_positions"][-1] == 2**32 - 1
    steps[-1] += 1
    with pytest.raises(CorruptionError, match="position out of range"):
        decode("branched", stored, coder)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"step": 0, "max_step": 0.1, "label_step": 0.1}, "step"),
        ({"step": 0.1, "max_step": 0.05, "label_step": 0.1}, "smaller than step"),
        ({"step": 0.1, "max_step": 0.6, "label_step": 0.1}, "max_step"),
        ({"step": 0.1, "max_step": 0.2, "label_step": 0}, "label_step"),
    ],
)
def test_steps_that_cannot_be_are_refused(fields: dict[str, float], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        Steps(**fields)


def test_section_puts_given_fields_over_the_preset() -> None:
    section = StoreSection(preset="compact", floor=0.01, min_entries=3)
    assert section.encoding().selection == Selection(
        top_p=PRESETS["compact"].selection.top_p, min_entries=3, floor=0.01
    )
    assert section.encoding().steps == PRESETS["compact"].steps
    for field, value in (("floor", 1.0), ("top_p", 1.5), ("min_entries", 0), ("preset", "best")):
        with pytest.raises(ValidationError, match=field):
            StoreSection(**{field: value})


@pytest.mark.parametrize("vocab_size", [32_768, 128_256, 151_936, 262_144])
def test_vocabularies_of_every_size(vocab_size: int) -> None:
    """Past 2^17 and up to Gemma's: the last id of each comes back, in exact and in coded rows."""
    ranking = ids_by_rank(np.random.default_rng(1).integers(0, 9, vocab_size))
    arrays = store_factory.arrays("source", (40, 9), top_k=30, vocab_size=vocab_size, seed=6)
    arrays["token_ids"][3] = arrays["entry_ids"][5] = vocab_size - 1
    for preset in ("exact", "compact"):
        coder = Coder(PRESETS[preset], ranking, "store s, shard 0")
        kept = select_entries(arrays, coder.encoding)
        back = decode("source", encode("source", kept, coder), coder)
        check_shard("source", back, vocab_size=vocab_size, where="back")
        assert [row.keys() for row in _rows(back)] == [row.keys() for row in _rows(kept)]
        np.testing.assert_array_equal(back["token_ids"], arrays["token_ids"])
        assert back["entry_ids"].max() == vocab_size - 1


# ------------------------------------------------------------------------------- at the edges


def _row(logprobs: list[float], tail: float) -> Arrays:
    """One segment of one position."""
    count = len(logprobs)
    return {
        "segment_ids": np.zeros(1, "<i8"),
        "token_offsets": np.array([0, 1], "<i8"),
        "token_ids": np.zeros(1, "<u4"),
        "byte_ends": np.ones(1, "<u4"),
        "entry_offsets": np.array([0, count], "<i8"),
        "entry_ids": np.arange(count, dtype="<u4"),
        "entry_logprobs": np.array(logprobs, "<f4"),
        "tail_mass": np.array([tail], "<f4"),
        "label_logprobs": np.array([-1.0], "<f4"),
    }


def _kept(rule: Selection, probabilities: list[float], steps: Steps | None = None) -> int:
    row = _row(np.log(probabilities).tolist(), max(1 - sum(probabilities), 0))
    kept = select_entries(row, Encoding(selection=rule, steps=steps))
    return len(kept["entry_ids"])


def test_selection_on_the_limit() -> None:
    halves = [0.5, 0.25, 0.125]
    first, second = (float(np.exp(np.float64(np.float32(np.log(p))))) for p in halves[:2])
    assert _kept(Selection(top_p=first), halves) == 1  # the entry that reaches it is the last
    assert _kept(Selection(top_p=0.51), halves) == 2
    assert _kept(Selection(top_p=0, floor=second), halves) == 2  # of this probability or more
    # A first entry that float32 rounds to 1 does not end a row that keeps all.
    assert _kept(Selection(), [1.0, 1e-9], PRESETS["fine"].steps) == 2
    assert _kept(Selection(), [1.0, 1e-29], PRESETS["fine"].steps) == 1  # less than exp(-64)


@pytest.mark.parametrize("count", [25, 40, 80])
def test_near_equal_rows_without_tail_stay_within_a_step(count: int) -> None:
    """All errors of such a row point one way, so scaling it to sum 1 would take entries too far."""
    for offset in np.linspace(0, 1, 23):
        logits = np.linspace(0, -0.01 * offset, count)
        true = logits - np.logaddexp.reduce(logits)
        for preset in ("fine", "compact", "tiny"):
            coder = Coder(PRESETS[preset], _ranking(), "s")
            back = decode("source", encode("source", _row(true.tolist(), 0.0), coder), coder)
            found = dict(zip(back["entry_ids"], back["entry_logprobs"], strict=True))
            for token, value in enumerate(true):
                limit = codes.bound(coder.steps, np.maximum(-value, -found[token]))
                assert abs(found[token] - value) <= limit * (1 + 1e-5), (preset, offset)
            mass = np.exp(back["entry_logprobs"].astype(np.float64)).sum()
            assert mass <= 1 + 1e-6
            assert back["tail_mass"][0] >= 0
            assert abs(mass + back["tail_mass"][0] - 1) < 5e-6


def test_small_tails_and_huge_labels() -> None:
    coder = Coder(PRESETS["compact"], _ranking(), "s")
    row = _row([np.log(1 - 1e-6)], 1e-6)
    row["label_logprobs"][:] = -1e30
    back = decode("source", encode("source", row, coder), coder)
    assert back["tail_mass"][0] == pytest.approx(1e-6, rel=0.2)
    assert back["label_logprobs"][0] < -1e7
    assert encode("source", row, coder)["label_codes"].tolist() == [2**32 - 1]
    check_shard("source", back, vocab_size=VOCAB, where="back")


def test_tail_of_everything_beside_entries_is_refused() -> None:
    coder = Coder(PRESETS["compact"], _ranking(), "s")
    stored = encode("source", _row([-1.0], 0.3), coder)
    stored["tail_codes"][:] = codes.FIRST_TAIL_CODE  # code 0: probability 1
    with pytest.raises(CorruptionError, match="invalid entries at position 0"):
        decode("source", stored, coder)
    stored = encode("source", _row([-1.0], 0.3), coder)
    stored["entry_rises"][:] = 1 << 16  # must not wrap around to code 0
    with pytest.raises(CorruptionError, match="invalid entries at position 0"):
        decode("source", stored, coder)


def test_fields_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="have no effect while top_p is 1"):
        StoreSection(preset="exact", floor=0.01)
    assert StoreSection(preset="exact", floor=0.01, top_p=0).encoding().selection.floor == 0.01
    assert StoreSection(preset="tiny").encoding("sampled").selection.keeps_all
