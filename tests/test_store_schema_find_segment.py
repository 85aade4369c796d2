"""Segments by id, row or document, and what is said of those that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store_schema.disk.location import open_location
from store_schema.errors import ConfigError, MissingError
from store_schema.plan.find_segment import find_segment, nearest_name, segment_in_document
from store_schema.plan.plan import Plan, Segment, write_plan

DOCUMENTS = (("poem", 3), ("letter", 1), ("12", 1), ("long", 11))


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """Documents of several segments, four to a shard."""
    names = [(name, number) for name, count in DOCUMENTS for number in range(count)]
    made = [
        Segment(i, f"{name}#{number}", name, "prose", "train", 0, 4, False, None, f"text {i}")
        for i, (name, number) in enumerate(names)
    ]
    shards = [(made[i : i + 4], {"target": 1}) for i in range(0, len(made), 4)]
    return write_plan(
        open_location(tmp_path_factory.mktemp("found")),
        shards,
        corpus_fingerprint="c" * 32,
        request_fingerprint="r" * 32,
        tokenizers={},
        settings={},
    )


def test_by_id_and_by_row(plan: Plan) -> None:
    for shard in plan.shards:
        for segment in plan.segments(shard):
            for wanted in (segment.segment_id, str(segment.index)):
                assert find_segment(plan, wanted) == (shard, segment)


def test_by_document(plan: Plan) -> None:
    assert segment_in_document(plan, "letter", None) == "letter#0"
    assert segment_in_document(plan, "poem", "2") == "poem#2"
    assert segment_in_document(plan, "poem", "poem#1") == "poem#1"
    assert segment_in_document(plan, "12", "0") == "12#0"


def test_what_is_not_there_is_told_with_what_is(plan: Plan) -> None:
    with pytest.raises(ConfigError) as told:
        segment_in_document(plan, "poem", None)
    assert told.value.line() == (
        "the document has several segments in document poem: expected one of poem#0, poem#1, poem#2"
    )
    with pytest.raises(ConfigError, match="long#7 and 3 more"):
        segment_in_document(plan, "long", None)
    for wanted in ("3", "letter#0", "poem"):
        with pytest.raises(MissingError, match=f"one of poem#0, poem#1, poem#2, got {wanted}"):
            segment_in_document(plan, "poem", wanted)
    with pytest.raises(MissingError, match=r"no such document in .*the nearest is poem;"):
        segment_in_document(plan, "poems", "0")
    for wanted, nearest in (("poem", "poem#"), ("lettre#0", "letter#0"), ("long#11", "long#1")):
        with pytest.raises(MissingError, match=f"the nearest is {nearest}"):
            find_segment(plan, wanted)
    with pytest.raises(MissingError) as far:
        find_segment(plan, "\u202e" * 5000)
    line = far.value.line()
    assert "expected an id such as poem#0 or a row below 16" in line
    assert line.isascii()
    assert len(line) < 2000
    assert "nearest" not in line


def test_many_longer_names_that_begin_alike_hide_none() -> None:
    assert nearest_name("0000x", [f"{i:012d}zzzzzzzz" for i in range(700)] + ["0000"]) == "0000"


@given(st.text("ab#01", min_size=4, max_size=12), st.data())
def test_a_name_with_a_letter_too_many_is_found(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name)))
    typed = f"{name[:at]}x{name[at:]}"
    others = [f"{i:012d}zzzzzzzz" for i in range(700)]
    assert nearest_name(typed, [*others, name]) == name
    assert nearest_name("", others) is None


def test_the_plan_is_opened_from_disk(plan: Plan, tmp_path: Path) -> None:
    again = Plan.open(plan.location)
    assert find_segment(again, "long#10")[1].text == "text 15"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(MissingError, match="no plan"):
        Plan.open(open_location(tmp_path / "nothing"))
