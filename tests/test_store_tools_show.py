"""`store show`: what is shown is what is stored, whatever the text tries."""

from __future__ import annotations

import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.visible import cut, quoted, table, visible, width
from store_schema.disk.location import open_location
from store_schema.layout import Form
from store_schema.plan.plan import Plan, Segment
from store_schema.text.vocabulary import Vocabulary
from store_tools.places import find_places
from store_tools.show import (
    Branch,
    Expected,
    Position,
    ShownSegment,
    read_segment,
)
from store_tools.show_page import level, page
from store_tools.show_text import segment_text, share
from tests.planned_store import (
    TEXTS,
    VOCABULARY,
    make_run,
    ok,
    reader_of,
    refused,
    store_folder,
)

HOSTILE = "d4#0"
"""The segment with a script, bidi controls and line separators; d3#0 has NUL and escapes."""


def shown_of(folder: Path, segment: str, kind: Form = "source", top: int = 5) -> ShownSegment:
    (place,) = find_places(str(store_folder(folder, kind)))
    return read_segment(place, segment, top=top)


@pytest.mark.parametrize("kind", ["source", "aligned"])
def test_positions_are_those_of_the_store(tmp_path: Path, kind: Form) -> None:
    make_run(tmp_path, kinds=[kind])
    arrays = reader_of(tmp_path, kind).read(1)
    for place, text in enumerate(TEXTS[1]):
        shown = shown_of(tmp_path, f"d{3 + place}#0", kind, top=3)
        assert b"".join(position.data for position in shown.positions).decode() == text
        assert (shown.row, shown.shard) == (3 + place, 1)
        start = int(arrays["token_offsets"][place])
        for position in shown.positions:
            i = start + position.index
            row = slice(*arrays["entry_offsets"][i : i + 2])
            assert [e.token_id for e in position.best] == arrays["entry_ids"][row][:3].tolist()
            assert [e.logprob for e in position.best] == arrays["entry_logprobs"][row][:3].tolist()
            for item in position.best:
                assert item.written == VOCABULARY.written[item.token_id]
            assert position.tail_mass == arrays["tail_mass"][i]
            label = arrays["label_logprobs"][i]
            assert position.logprob == (None if np.isnan(label) else label)
            assert position.origin == (arrays["origin"][i] if kind == "aligned" else None)


def test_branches_stand_at_their_positions(tmp_path: Path) -> None:
    make_run(tmp_path, kinds=["branched"])
    arrays = reader_of(tmp_path, "branched").read(1)
    offsets = arrays["branch_entry_offsets"].tolist()
    expected = [
        (
            int(arrays["branch_positions"][b]),
            VOCABULARY.written[arrays["branch_tokens"][b]],
            float(arrays["branch_tail_mass"][b]),
            arrays["branch_entry_ids"][offsets[b] : min(offsets[b] + 2, offsets[b + 1])].tolist(),
        )
        for b in range(len(offsets) - 1)
    ]
    found = [
        (int(arrays["token_offsets"][place]) + position.index, branch.written, branch.tail_mass,
         [item.token_id for item in branch.best])
        for place in range(len(TEXTS[1]))
        for position in shown_of(tmp_path, f"d{3 + place}#0", "branched", top=2).positions
        for branch in position.branches
    ]  # fmt: skip
    assert found == expected
    assert len(found) > 10


def test_a_branch_is_shown_below_its_position() -> None:
    best = (Expected(7, b" a", -0.5), Expected(8, b"\n", -2.0))
    branches = (Branch(b" a", 0.1, (Expected(8, b"\n", -0.1),)), Branch(b"x", 1.0, ()))
    position = Position(0, b"\n", 8, -2.0, 0.25, best, None, branches=branches)
    shown = ShownSegment("s", "source", "s", 0, 0, None, (position,))
    rows = [line.strip() for line in segment_text(shown, 120).splitlines()[-2:]]
    assert rows == ['after " a": "\\n" 90.5%', 'after "x": nothing known']
    assert 'after " a": "\\n" 90.5%' in unescape(page(shown))


def test_by_row_or_by_id(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    assert ok("show", run_file, "--segment", "d5#0") == ok("show", run_file, "--segment", 5)
    bare = tmp_path / "bare"
    store_folder(tmp_path).rename(bare)
    (place,) = find_places(str(bare))
    alone = read_segment(place, "4", top=5)
    assert alone.segment is None
    assert b"".join(p.data for p in alone.positions).decode() == TEXTS[1][1]
    assert "no plan to find a segment's id in" in refused("show", bare, "--segment", "d4#0")
    assert "no such segment" in refused("show", bare, "--segment", "99")
    assert "row 4" in ok("show", bare, "--segment", "4")


def test_segments_that_are_not_there(tmp_path: Path) -> None:
    run_file = make_run(tmp_path, leave_out=[1])
    for wanted in ("d99#0", "99", "9", "-1", "1 ", "\x1b[31m", "9" * 30):
        assert "no such segment" in refused("show", run_file, "--segment", wanted)
    assert "\x1b" not in refused("show", run_file, "--segment", "\x1b[31m")
    assert "shard 1, which holds the segment, is not" in refused(
        "show", run_file, "--segment", "d4#0"
    )


def test_without_a_segment_the_first_ones_are_listed(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    head, titles, *lines = ok("show", run_file).splitlines()
    assert titles.split() == ["row", "segment", "domain", "bytes", "text"]
    assert "--segment" in head
    assert [line.split()[:3] for line in lines] == [
        [str(i), f"d{i}#0", ("code", "prose")[i % 2]] for i in range(7)
    ]
    assert "\\x00\\x1b[31m" in lines[3]
    bare = tmp_path / "bare"
    store_folder(tmp_path).rename(bare)
    assert [line.split()[0] for line in ok("show", bare).splitlines()[2:]] == list("0123456")


@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize("kind", ["source", "branched", "aligned"])
def test_the_table_fits_and_hides_nothing(tmp_path: Path, kind: Form, columns: int) -> None:
    run_file = make_run(tmp_path, kinds=[kind])
    for segment in range(7):
        output = ok("show", run_file, "--segment", segment, env={"COLUMNS": str(columns)})
        for line in output.split("\n")[2:]:
            assert all(c.isprintable() for c in line), line
            room = max(columns, 90 if kind == "aligned" else 80)
            assert width(line) <= room, line
    shown = shown_of(tmp_path, "3", kind)
    rows = [line for line in segment_text(shown, 160).splitlines()[3:] if re.match(r" *\d+ ", line)]
    assert len(rows) == len(shown.positions)
    for line, position in zip(rows, shown.positions, strict=True):
        assert line.split()[0] == str(position.index)
        if position.logprob is not None:
            known = rf" {position.logprob:.3f} +{re.escape(share(position.logprob))} "
            assert re.search(known, line)


def test_the_one_that_stands_there_is_marked() -> None:
    best = (Expected(7, b" a", -0.5), Expected(8, b"\n", -2.0), Expected(9, b'"', -9.0))
    position = Position(0, b"\n", 8, -2.0, 0.25, best, None)
    text = segment_text(ShownSegment("s", "source", "s", 0, 0, None, (position,)), 120)
    row = text.splitlines()[-1]
    assert row.split("  ")[-3:] == ['" a" 60.7%', '*"\\n" 13.5%', '"\\"" 0.01%']
    assert '0  "\\n" ' in row


# ------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Takes a page apart: tags, attributes, and the text of each token without its panel."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[str] = []
        self.panels: list[str] = []
        self.classes: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        kind = dict(attrs).get("class") or ""
        if tag == "span":
            self._open.append(kind.split()[0] if kind else "")
        if kind.startswith("t "):
            self.tokens.append("")
            self.classes.append(kind)
        if kind == "x":
            self.panels.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if "x" in self._open:
            self.panels[-1] += data
        elif "t" in self._open:
            self.tokens[-1] += data


ALLOWED = {
    *("html", "head", "meta", "link", "title", "style", "body", "main", "header", "p", "h1", "dl"),
    *("div", "dt", "dd", "span", "i", "b", "bdi", "footer"),
}


@pytest.mark.parametrize("kind", ["source", "aligned"])
def test_the_page_holds_the_text_and_loads_nothing(tmp_path: Path, kind: Form) -> None:
    run_file = make_run(tmp_path, kinds=[kind])
    for row, text in enumerate(text for texts in TEXTS for text in texts):
        path = tmp_path / "page.html"
        ok("show", run_file, "--segment", row, "--html", path)
        html = path.read_text(encoding="utf-8")
        found = Page(html)
        assert found.tags <= ALLOWED
        assert "default-src 'none'" in html
        assert not re.search(r"https?:|@import|url\(|javascript:", html)
        names = {name for name, _ in found.attributes}
        assert not {name for name in names if name.startswith("on") or name == "src"}
        assert [v for name, v in found.attributes if name == "href"] == ["data:,"]
        assert len(found.tokens) == len(found.panels) == len(text.encode())
        plain = "".join(found.tokens).replace("◦", "").replace("\u21b5\n", "\n")
        plain = plain.replace("\u2192\t", "\t").replace("␍", "\r")
        expected = "".join(
            c if c.isprintable() or c in "\n\t\r" else visible(c, backslash="\\") for c in text
        )
        assert plain == expected
        for hidden in ("\x00", "\x1b", "\u202e", "\u2028"):
            assert hidden not in html


def test_a_character_of_several_tokens_is_shown_once() -> None:
    parts = ["é".encode()[:1], "é".encode()[1:], b"\xff", b"\xe6\xbc"]
    positions = tuple(Position(i, data, i, None, 1.0, (), None) for i, data in enumerate(parts))
    found = Page(page(ShownSegment("s", "source", "s", 0, 0, None, positions)))
    assert found.tokens == ["◦", "é", "\\xff", "\\xe6\\xbc"]
    assert found.panels[0].startswith('"\\xc3"1 of 4 · probability not known · tail 1.000')


def test_hostile_names_and_tokens_are_escaped() -> None:
    attack = "<script>x</script>&'\"\u202e</style>${css}"
    data = attack.encode()
    best = (Expected(1, data, -1.0),)
    position = Position(0, data, 1, -1.0, 0.0, best, None)
    segment = Segment(0, attack, attack, attack, attack, 0, len(data), True, None, attack)
    html = page(ShownSegment(attack, "source", attack, 0, 0, segment, (position,)))
    found = Page(html)
    assert "script" not in found.tags
    assert html.count("</style>") == 1
    assert "\u202e" not in html
    assert found.tokens == [attack.replace("\u202e", "\\u202e")]
    # Title twice, store, source, domain, split, the text, its quoted form and the entry.
    assert html.count("&lt;script&gt;") == 9


def test_colours_fall_with_probability() -> None:
    shares = [1.0, 0.5, 0.2, 0.05, 0.005, 0.0005, 1e-9, 0.0]
    found = [level(math.log(p) if p else -math.inf) for p in shares]
    assert found == ["k0", "k0", "k1", "k2", "k3", "k4", "k5", "k5"]
    assert level(None) == "ku"


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    (tmp_path / "file").write_text("")
    line = refused("show", run_file, "--segment", 0, "--html", tmp_path / "file/page.html")
    assert "page.html" in line


# ------------------------------------------------------------------------------- text made visible


@given(st.binary(max_size=40))
def test_any_bytes_are_shown_on_one_line(data: bytes) -> None:
    shown = visible(data)
    assert shown.isprintable()
    if shown.isascii():
        written = shown.encode().decode("unicode_escape").encode("latin-1", "backslashreplace")
        assert written == data or not data.isascii()
    assert quoted(data)[1:-1].replace('\\"', '"') in (shown, "◌" + shown)


@given(st.text(max_size=40), st.integers(1, 30))
def test_columns_have_one_width(text: str, columns: int) -> None:
    shown = visible(text)
    first, second = table((cut(shown, columns), "|"), [("-" * columns, "|")])
    assert width(first) == width(second) == columns + len("  |")
    assert cut(shown, columns) == shown or cut(shown, columns).endswith("…")


def test_widths_of_terminals() -> None:
    cases = {"abc": 3, "漢字": 4, "e\u0301": 1, "한국": 4, "\u1112\u1161\u11ab": 2, "😀": 2, "é": 1}
    assert {text: width(text) for text in cases} == cases
    assert cut("漢字漢字", 5) == "漢字…"
    assert cut("漢字漢字", 4) == "漢…"


def test_a_mark_does_not_join_the_quote() -> None:
    assert quoted("\u0301".encode()) == '"\u25cc\u0301"'
    assert quoted(b"\\n\n") == '"\\\\n\\n"'


def test_ids_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    """Models may have more ids than their tokenizer, and give them probability."""
    table = Vocabulary((b"<s>", b"a", b""), np.array([True, False, True]))
    assert [table.spelling(i) for i in range(4)] == [b"<s>", b"a", b"<id 2>", b"<id 3>"]


def test_a_plan_that_lies_about_ids_is_found(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    plan = Plan.open(open_location(tmp_path / "run/plan"))
    path = tmp_path / "run/plan/segments.parquet"
    data = path.read_bytes()
    for cut_at in (10, len(data) // 2, len(data) - 9):
        path.write_bytes(data[:cut_at])
        assert "segments.parquet" in refused("show", run_file, "--segment", HOSTILE)
    assert len(plan.shards) == 3
