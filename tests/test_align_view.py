"""`align view`: the page shows what both stores hold, whatever the text tries; in a browser, too."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from align.report.view import Span, Token, ViewedSource, read_view
from align.report.view_page import clusters, cut_text
from launch.pages.page import text_html
from launch.quantities import share_text
from launch.visible import cut, quoted, visible, width
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.errors import CorruptionError, MissingError
from store_schema.layout import Arrays, Kind, Origin
from store_schema.plan.find_segment import find_shard, row_number
from store_schema.plan.plan import Plan, Segment, write_plan
from store_schema.store.reader import StoreReader
from store_schema.store.segment_rows import Row
from store_schema.store.writer import StoreWriter
from store_schema.text.vocabulary import Vocabulary
from tests import command, store_factory
from tests.browser import browse, framed, needs_browser
from tests.run_file import write_run_file

ok = partial(command.ok, "align")
refused = partial(command.refused, "align")


HOSTILE_ID = "d'3 <b>\u202e${css}#0"
TEXTS = (
    ("def f(a):\n\treturn  a\r\n", "Emoji 😀👩‍👩‍👧🏳️‍🌈🇫🇷👍🏽 漢字 e\u0301 naïve", ""),
    (
        '\u0301lone </script><script>alert(1)</script>\u202e\u2028 & "q"',
        "العربية हिन्दी \x00\x1b[31m",
    ),
    ("x" * 3000 + " " * 300 + "end", "last one\u00a0\\ here"),
)
IDS = ("d0#0", "d1#0", "d2#0", HOSTILE_ID, "d4#0", "d5#0", "d6#0")
PIECES = {"one": 2, "two": 5, "target": 3}
"""Bytes of a token, by reader; "one" and the target begin each text with a token without bytes."""
DOMAINS = ("code", "prose")


def pieces_of(reader: str, text: bytes) -> list[bytes]:
    """How a reader cuts a text; tokens tear characters apart."""
    size = PIECES[reader]
    cut = [text[i : i + size] for i in range(0, len(text), size)]
    return [b"", *cut] if cut and reader != "two" else cut


def vocabulary(reader: str) -> Vocabulary:
    """Id 0 is special, id 1 the token that takes no bytes, then every piece that occurs."""
    found = {p for texts in TEXTS for t in texts for p in pieces_of(reader, t.encode()) if p}
    written = (b"<s>", b" ", *sorted(found))
    return Vocabulary(written, np.arange(len(written)) == 0)


def make_arrays(
    reader: str, texts: list[bytes], first_row: int, kind: Kind, own: Arrays | None, seed: int
) -> Arrays:
    """Random distributions over real tokens; `own` is the source that was aligned."""
    table = {data: i for i, data in enumerate(vocabulary(reader).written)}
    cut = [pieces_of(reader, text) for text in texts]
    made = store_factory.arrays(
        kind, [len(part) for part in cut], top_k=6, vocab_size=len(table), seed=seed
    )
    ends = [np.cumsum([len(piece) for piece in part]) for part in cut]
    made |= {
        "segment_ids": np.arange(first_row, first_row + len(texts)).astype("<i8"),
        "token_ids": np.array([table[p] if p else 1 for part in cut for p in part], "<u4"),
        "byte_ends": np.concatenate([np.zeros(0), *ends]).astype("<u4"),
    }
    return made if own is None else made | plain_spans(made, own)


def plain_spans(made: Arrays, own: Arrays) -> Arrays:
    """Spans in plain Python: between bytes where both sides end a token."""
    offsets, index, span_ends, logprobs, nats, sizes = [0], [], [], [], [], []
    for d in range(len(made["segment_ids"])):
        theirs = slice(*own["token_offsets"][d : d + 2])
        ours = slice(*made["token_offsets"][d : d + 2])
        own_ends = own["byte_ends"][theirs].tolist()
        ends = made["byte_ends"][ours].tolist()
        common = sorted((set(own_ends) & set(ends)) - {0})
        labels = own["label_logprobs"][theirs].tolist()
        starts = [0, *common]
        for low, high in zip(starts, common, strict=False):
            inside = [x for x, e in zip(labels, own_ends, strict=True) if low < e <= high]
            first = [x for x, e in zip(labels, own_ends, strict=True) if e == 0 and low == 0]
            logprobs.append(sum(first + inside))
            span_ends.append(high)
        index += [sum(c < e for c in common) if e else 0 for e in ends]
        offsets.append(len(span_ends))
        nats.append(-np.nansum(labels))
        sizes.append(own_ends[-1] if own_ends else 0)
    return {
        "span_offsets": np.array(offsets, "<i8"),
        "span_index": np.array(index, "<u4"),
        "span_byte_ends": np.array(span_ends, "<u4"),
        "span_logprobs": np.array(logprobs, "<f4"),
        "source_nats": np.array(nats, "<f8"),
        "source_bytes": np.array(sizes, "<i8"),
    }


def write_store(
    folder: Path,
    plan: Plan,
    reader: str,
    kind: Kind,
    arrays: Mapping[int, Arrays],
    settings: Mapping[str, object],
) -> StoreReader:
    """One store of the run with some shards of the plan."""
    table = vocabulary(reader)
    manifest = store_factory.manifest(kind, vocab_size=len(table), top_k=6).model_copy(
        update={
            "plan_fingerprint": plan.fingerprint,
            "num_shards": len(plan.shards),
            "vocabulary_fingerprint": table.fingerprint,
            "settings": dict(settings),
        }
    )
    location = open_location(folder)
    writer = StoreWriter.open(location, manifest, table)
    for shard, made in arrays.items():
        writer.write(plan.shards[shard], made)
    return StoreReader.open(location)


def make_run(
    folder: Path,
    *,
    leave_out: Mapping[str, Collection[int]] | None = None,
    change: Callable[[Arrays], None] | None = None,
) -> Path:
    """A run with a plan, two source stores and their aligned stores.

    Args:
        folder: Everything goes below it.
        leave_out: Shards that are not aligned, by source.
        change: Changes the aligned arrays of source "one" before they are written.

    Returns:
        The run file.
    """
    assigned, row = [], 0
    for texts in TEXTS:
        part = []
        for text in texts:
            size = len(text.encode())
            name = IDS[row]
            part.append(
                Segment(row, name, name, DOMAINS[row % 2], "train", 0, size, True, None, text)
            )
            row += 1
        assigned.append((part, {"one": 1, "two": 1, "target": 1}))
    plan = write_plan(
        open_location(folder / "run/plan"),
        assigned,
        corpus_fingerprint="c" * 32,
        request_fingerprint="r" * 32,
        tokenizers={"target": store_factory.TOKENIZER},
        settings={},
    )
    for number, source in enumerate(("one", "two")):
        own, aligned = {}, {}
        for shard in plan.shards:
            texts = [s.text.encode() for s in plan.segments(shard)]
            seed = 100 * number + shard.index
            own[shard.index] = make_arrays(source, texts, shard.start, "source", None, seed)
            made = make_arrays("target", texts, shard.start, "aligned", own[shard.index], seed + 50)
            if change and source == "one":
                change(made)
            if shard.index not in (leave_out or {}).get(source, ()):
                aligned[shard.index] = made
        store = write_store(folder / "run/stores" / source, plan, source, "source", own, {})
        settings = {"source_store": store.manifest.fingerprint(), "method": "bytes"}
        write_store(folder / "run/aligned" / source, plan, "target", "aligned", aligned, settings)
    return write_run_file(folder, {"one": "m", "two": "m", "target": "made/target"})


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("view"))


# ------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("source", ["one", "two"])
def test_what_is_viewed_is_what_both_stores_hold(run_file: Path, source: str) -> None:
    run = load_run(run_file)
    for row, text in enumerate(text for texts in TEXTS for text in texts):
        view = read_view(run, [source], str(row), top=3)
        assert read_view(run, [source], IDS[row], top=3) == view
        found = view.sources[0]
        for kind, url in (("tokens", run.store_url), ("positions", run.aligned_url)):
            reader = StoreReader.open(open_location(url(source)))
            arrays = reader.read(view.shard)
            at = arrays["segment_ids"].tolist().index(row)
            start, stop = arrays["token_offsets"][at : at + 2].tolist()
            rows = getattr(found, kind)
            assert len(rows) == stop - start
            data = text.encode()
            for i, item in enumerate(rows, start):
                first, last = arrays["entry_offsets"][i : i + 2].tolist()
                entries = arrays["entry_logprobs"][first:last].astype(np.float64)
                assert [e for e, _ in item.entries] == arrays["entry_ids"][first:last][:3].tolist()
                assert [x for _, x in item.entries] == entries[:3].tolist()
                assert item.left_out == max(len(entries) - 3, 0)
                assert item.left_out_mass == pytest.approx(np.exp(entries[3:]).sum())
                assert item.end == arrays["byte_ends"][i]
                label = arrays["label_logprobs"][i]
                assert item.logprob == (None if np.isnan(label) else label)
                assert item.tail_mass == arrays["tail_mass"][i]
                if item.end > item.start:
                    assert reader.vocabulary.written[item.token_id] == data[item.start : item.end]
        assert [int(o) for o in found.origins] == arrays["origin"][start:stop].tolist()
        assert [s.end for s in found.spans][-1:] == ([len(data)] if data else [])


def test_spans_and_bits_per_byte_by_hand(run_file: Path) -> None:
    found = read_view(load_run(run_file), ["one"], "0", top=3).sources[0]
    nats = {"source": 0.0, "aligned": 0.0, "bytes": 0}
    for number, span in enumerate(found.spans):
        own = [r.logprob for r in found.tokens if span.start < r.end <= span.end]
        own += [r.logprob for r in found.tokens if r.end == 0 and span.start == 0]
        labels = [
            r.logprob for r, s in zip(found.positions, found.span_of, strict=True) if s == number
        ]
        for values, stored in ((own, span.source_nats), (labels, span.aligned_nats)):
            if None in values:
                assert stored is None
            else:
                assert stored == pytest.approx(-sum(values), rel=1e-5)  # type: ignore[arg-type]
        if None not in own and None not in labels:
            nats["source"] += -sum(own)  # type: ignore[arg-type]
            nats["aligned"] += -sum(labels)  # type: ignore[arg-type]
            nats["bytes"] += span.end - span.start
    assert 0 < nats["bytes"] == found.common_bytes < found.positions[-1].end
    assert found.bpb is not None
    per_byte = [nats[k] / nats["bytes"] / np.log(2) for k in ("aligned", "source")]
    assert list(found.bpb) == pytest.approx(per_byte, rel=1e-5)


def test_the_source_token_that_covers_a_byte(run_file: Path) -> None:
    found = read_view(load_run(run_file), ["two"], "1", top=1).sources[0]
    size = found.tokens[-1].end
    for byte in range(size):
        index = found.covering(byte)
        assert index == byte // PIECES["two"]
    assert found.covering(size) == len(found.tokens) - 1
    assert ViewedSource("s", (), (), (), (), (), {}, {}).covering(0) is None


def test_shards_by_row_and_id(run_file: Path) -> None:
    plan = Plan.open(open_location(run_file.parent / "run/plan"))
    for row, name in enumerate(IDS):
        shard = next(s for s in plan.shards if s.start <= row < s.stop)
        assert find_shard(plan, str(row)) == find_shard(plan, name) == shard
    for wanted in ("d99#0", "7", "-1", "1 ", "", "²", "9" * 30):
        with pytest.raises(MissingError, match="no such segment"):
            find_shard(plan, wanted)
    assert row_number("²") is None


# ------------------------------------------------------------------------------- refusals


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    path = make_run(tmp_path, leave_out={"two": [1]})
    for wanted in ("d99#0", "99", "\x1b[31m"):
        line = refused("view", path, "--segment", wanted)
        assert "no such segment" in line
        assert "\x1b" not in line
    line = refused("view", path, "--segment", "4")
    assert "shard 1, which holds the segment, is not aligned yet" in line
    assert "aligned/two" in line
    ok("view", path, "--segment", "4", "--source", "one")
    assert "no such source" in refused("view", path, "--segment", "4", "--source", "three")
    assert "0 to 8" in refused("view", path, "--segment", "0", "--position", "9")
    assert "the segment has no tokens" in refused("view", path, "--segment", "2", "--position", "0")
    assert "--out" in refused("view", path, "--segment", "0", "--out", f"{tmp_path}/")
    (tmp_path / "file").write_text("")
    line = refused("view", path, "--segment", "0", "--out", tmp_path / "file/page.html")
    assert "page.html" in line
    shutil.rmtree(tmp_path / "run/stores/one")
    assert "no store" in refused("view", path, "--segment", "0")
    shutil.rmtree(tmp_path / "run/plan")
    assert "no plan" in refused("view", path, "--segment", "0")
    assert command.call("align", "view", path).exit_code == 2


def test_damage_and_stores_that_do_not_belong_together(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    aligned = tmp_path / "run/aligned"
    reader = StoreReader.open(open_location(aligned / "one"))
    victim = aligned / "one" / reader.commits[1].path / "origin/c/0"
    data = bytearray(victim.read_bytes())
    data[0] ^= 1
    victim.write_bytes(data)
    line = refused("view", path, "--segment", "3", "--source", "one")
    assert "shard 1" in line
    assert "origin" in line
    ok("view", path, "--segment", "0", "--source", "one")
    shutil.rmtree(aligned / "one")
    shutil.copytree(aligned / "two", aligned / "one")
    assert "aligned from another source store" in refused("view", path, "--segment", "0")
    shutil.rmtree(aligned / "one")
    shutil.copytree(tmp_path / "run/stores/two", aligned / "one")
    assert "store of another kind" in refused("view", path, "--segment", "0")


def test_tokens_that_are_not_the_texts_are_damage(tmp_path: Path) -> None:
    def shorter(made: Arrays) -> None:
        made["byte_ends"][made["token_offsets"][1] - 1] -= 1

    path = make_run(tmp_path, change=shorter)
    assert "tokens do not end where the text ends" in refused("view", path, "--segment", "0")

    def elsewhere(made: Arrays) -> None:
        made["segment_ids"] += 1

    path = make_run(tmp_path / "b", change=elsewhere)
    with pytest.raises(CorruptionError, match="row 0 is there 0 times"):
        read_view(load_run(path), ["one"], "0", top=1)


# ------------------------------------------------------------------------------- the text


class Page(HTMLParser):
    """Takes a page apart: its tags, attributes, the text of each source, the data of the script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class") or ""
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append((tag, kind))
        if kind == "text":
            self.texts.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        kinds = [kind for _, kind in self.open]
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data
        elif "text" in kinds and not any(kind.startswith("mark ") for kind in kinds):
            self.texts[-1] += data


def seen(text: str) -> str:
    """Text as the page is to show it."""
    signs = {"\n": "↵\n", "\t": "→\t", "\r": "␍", "\u200d": "\u200d", "\u200c": "\u200c"}
    shown = "".join(
        signs.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text
    )
    return ("\u25cc" if text[:1] == "\u0301" else "") + shown


def test_the_page_holds_the_text_and_loads_nothing(run_file: Path, tmp_path: Path) -> None:
    for row, text in enumerate(text for texts in TEXTS for text in texts):
        path = tmp_path / "page.html"
        ok("view", run_file, "--segment", row, "--out", path)
        page = path.read_text(encoding="utf-8")
        found = Page(page)
        assert found.texts == [seen(text)] * 2
        assert not {tag for tag, _ in found.tags} & {"img", "iframe", "object", "b2"}
        names = {name for _, attributes in found.tags for name in attributes}
        assert not {name for name in names if name.startswith("on") or name == "src"}
        assert [a["href"] for _, a in found.tags if "href" in a] == ["data:,"]
        assert not re.search(r"https?:|@import|url\(|javascript:|innerHTML|eval\(", page)
        assert len(found.scripts) == 2
        for hidden in ("\x00", "\x1b", "\u202e", "\u2028"):
            assert hidden not in page
        data = json.loads(found.scripts[0])
        assert [source["name"] for source in data["sources"]] == ["one", "two"]
        assert data["position"] == 0
        marks = [a for _, a in found.tags if (a.get("class") or "").startswith("mark ")]
        # Source one and the target begin each text with a token without bytes.
        assert len(marks) == (3 if text else 0)


def test_hostile_names_stay_text(run_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    out = ok("view", run_file, "--segment", HOSTILE_ID, "--out", path)
    assert "\u202e" not in out
    page = path.read_text(encoding="utf-8")
    assert "${css}" in page
    assert page.count("<b>") == 1  # the legend's own
    assert page.count("</style>") == 1
    assert escape("d'3 <b>\\u202e${css}#0") in page
    assert page.count("</script>") == 2


def test_pieces_join_to_the_text_and_hold_their_tokens() -> None:
    text = "a😀b e\u0301"
    ends = {"s": [2, 3, 6, 8, 10], "t": [0, 1, 5, 5, 7, 10, 10]}
    rows = {k: _rows(v) for k, v in ends.items()}
    source = ViewedSource("s", rows["s"], rows["t"], (), (), (), {}, {})
    pieces = cut_text(text, source)
    assert [piece.text for piece in pieces] == ["a", "😀", "b", " ", "e\u0301", ""]
    assert pieces[1].tokens == ([(0, 1), (1, 1), (2, 2)], [(2, 4)])
    assert pieces[2].tokens == ([(2, 1)], [(4, 1)])
    assert pieces[4].tokens == ([(3, 1), (4, 2)], [(5, 3)])
    assert [piece.marks[1] for piece in pieces] == [[0], [], [3], [], [], [6]]
    assert [piece.marks[0] for piece in pieces] == [[]] * 6


def _rows(ends: list[int]) -> tuple[Row, ...]:
    starts = [0, *ends[:-1]]
    return tuple(Row(a, b, 0, None, 1.0, (), 0, 0.0) for a, b in zip(starts, ends, strict=True))


@given(st.text(max_size=30), st.lists(st.integers(0, 90)), st.lists(st.integers(0, 90)))
def test_any_text_in_any_tokens(text: str, one: list[int], two: list[int]) -> None:
    """Pieces join to the text; every token stands in them with all its bytes, in order."""
    size = len(text.encode())
    sides = [_rows(sorted({min(e, size) for e in ends} | {size})) for ends in (one, two)]
    pieces = cut_text(text, ViewedSource("s", sides[0], sides[1], (), (), (), {}, {}))
    assert "".join(piece.text for piece in pieces) == text
    assert "".join(clusters(text)) == text
    for side, rows in enumerate(sides):
        held = [0] * len(rows)
        for piece in pieces:
            for i, length in piece.tokens[side]:
                assert length > 0
                held[i] += length
            assert sum(length for _, length in piece.tokens[side]) == piece.end - piece.start
            for i in piece.marks[side]:
                held[i] += 1
                assert piece.start >= rows[i].start
        assert held == [max(row.end - row.start, 1) for row in rows]
    for piece in pieces[:-1]:
        plain = html.unescape(re.sub(r"<[^>]*>", "", text_html(piece.text)))
        assert all(c.isprintable() or c in "\n\t\u200c\u200d" for c in plain)


@given(st.binary(max_size=30), st.integers(3, 20))
def test_names_fit_a_terminal(data: bytes, columns: int) -> None:
    assert visible(data).isprintable()
    assert width(cut(quoted(data), columns)) <= columns


# ------------------------------------------------------------------------------- the terminal


def test_one_position_as_a_table(run_file: Path, tmp_path: Path) -> None:
    out = ok("view", run_file, "--segment", 0, "--position", 4, "--out", tmp_path / "page.html")
    assert out.endswith(f"written to {tmp_path / 'page.html'}\n")
    view = read_view(load_run(run_file), ["one", "two"], "0", top=12)
    text = view.segment.text.encode()
    for source in view.sources:
        row = source.positions[4]
        covering = source.covering(row.start)
        assert covering is not None
        token = source.tokens[covering]
        assert token.start <= row.start < token.end
        block = out.split(f"\n{source.name}: position 4, ")[1].split("\n\n")[0]
        assert block.startswith(f"{quoted(text[row.start : row.end])}, bytes {row.start} to")
        assert f"source token {covering}: " in block
        for item in (row, token):
            assert re.search(
                rf" tail +{re.escape(share_text(item.tail_mass))}( |$)", block, re.MULTILINE
            )
            for _, logprob in item.entries:
                assert f" {share_text(np.exp(logprob))}" in block
        assert block.count("*") == sum(r.logprob is not None for r in (row, token))
    default = tmp_path / "here"
    assert f"{default}/report/view-0.html" in ok(
        "view", make_run(tmp_path / "c"), "--segment", 0, "--set", f"run_dir={default}",
        "--set", f"data_dir={tmp_path / 'c/run'}",
    )  # fmt: skip
    assert (default / "report/view-0.html").is_file()


def test_unknown_labels_and_tokens_are_named() -> None:
    span = Span(0, 1, None, 2.0)
    assert span.excess_nats is None
    source = ViewedSource(
        "s", (), (), (Origin.NONE,), (0,), (span,), {}, {5: Token(b"<id 5>", True)}
    )
    assert source.bpb is None
    assert source.common_bytes == 0


# ------------------------------------------------------------------------------- the browser

PROBE = """<script>
addEventListener('load', () => {
  const panel = document.getElementById('panel');
  const say = () => ({
    titles: [...panel.querySelectorAll('h2')].map(e => e.textContent),
    lit: [...document.querySelectorAll('section:not([hidden]) .on-t')].map(e => e.dataset.byte),
    marks: [...document.querySelectorAll('section:not([hidden]) .mark.on')].length,
    labels: [...panel.querySelectorAll('.r.label bdi')].map(e => e.textContent),
    span: panel.querySelector('.span').textContent,
    spaces: [...new Set([...panel.querySelectorAll('bdi')].map(e => getComputedStyle(e).whiteSpace))],
  });
  const key = (key, shiftKey) =>
    document.body.dispatchEvent(new KeyboardEvent('keydown', {key, shiftKey, bubbles: true}));
  const steps = {open: say()};
  key('ArrowRight'); steps.right = say();
  key('ArrowRight', true); steps.source = say();
  key('End'); key('ArrowRight'); steps.end = say();
  key('Home'); key('ArrowLeft'); steps.home = say();
  const piece = document.querySelector('section [data-byte="3"]');
  piece.dispatchEvent(new MouseEvent('mouseover', {bubbles: true})); steps.hover = say();
  document.querySelector('section').dispatchEvent(new MouseEvent('mouseleave')); steps.away = say();
  piece.click(); steps.click = say();
  document.querySelectorAll('.sources button')[1].click(); steps.other = say();
  const wide = [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 1 && !e.closest('.table, pre');
  }).map(e => e.tagName + '.' + e.className);
  parent.postMessage(JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.slice(0, 5), steps,
  }), '*');
});
</script>"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("row", range(7))
def test_the_policy_lets_its_script_run_and_nothing_complains(
    run_file: Path, tmp_path: Path, row: int
) -> None:
    path = tmp_path / "page.html"
    ok("view", run_file, "--segment", row, "--out", path)
    dom, errors = browse(tmp_path, path)
    assert "CONSOLE" not in errors, errors[-2000:]
    panel = dom[dom.index('id="panel"') :].split("</aside>")[0]
    assert ("The segment has no tokens." if row == 2 else "one, token 1 of") in panel
    assert "alert(1)</script>" not in dom


@pytest.mark.slow
@needs_browser
def test_keys_pointer_and_sources_in_a_real_browser(run_file: Path, tmp_path: Path) -> None:
    """The figures follow, and no page scrolls sideways at phone or desk width."""
    path = tmp_path / "page.html"
    ok("view", run_file, "--segment", 0, "--position", 2, "--out", path)
    view = read_view(load_run(run_file), ["one", "two"], "0", top=12)
    one, two = view.sources
    last = len(one.positions) - 1

    def titles(source: ViewedSource, token: int | None, position: int) -> list[str]:
        return [
            f"{source.name}, token {token} of {len(source.tokens)}",
            f"target, position {position} of {len(source.positions)}",
        ]

    def at(source: ViewedSource, position: int) -> list[str]:
        return titles(source, source.covering(source.positions[position].start), position)

    reports = framed(tmp_path, path.read_text(encoding="utf-8"), PROBE)
    assert sorted(r["inner"] for r in reports) == [320, 390, 1280]
    for report in reports:
        assert report["scroll"] <= report["inner"], report  # type: ignore[operator]
        assert report["wide"] == [], report
        steps = report["steps"]
        assert isinstance(steps, dict)
        assert steps["open"]["titles"] == at(one, 2)
        assert steps["open"]["spaces"] == ["break-spaces"]  # "   " must not become " "
        assert steps["right"]["titles"] == at(one, 3)
        token = one.covering(one.positions[3].start)
        assert token is not None
        target = next(i for i, r in enumerate(one.positions) if r.end > one.tokens[token + 1].start)
        assert steps["source"]["titles"] == titles(one, token + 1, target)
        assert steps["end"]["titles"] == at(one, last)
        assert steps["home"]["titles"] == at(one, 0)
        assert steps["home"]["marks"] == 1  # position 0 has no bytes
        hovered = titles(one, one.covering(3), next(
            i for i, r in enumerate(one.positions) if r.end > 3
        ))  # fmt: skip
        assert steps["hover"]["titles"] == steps["click"]["titles"] == hovered
        assert steps["away"]["titles"] == steps["home"]["titles"]
        assert steps["hover"]["lit"] == ["3", "4"]  # "tar"get bytes 3 to 6, cut by source at 4
        held = next(i for i, r in enumerate(one.positions) if r.end > 3)
        assert steps["other"]["titles"] == at(two, held)
        span = two.spans[two.span_of[held]]
        assert f"bytes {span.start} to {span.end} " in steps["other"]["span"]


@pytest.mark.slow
@needs_browser
def test_very_long_lines_and_odd_text_do_not_scroll_sideways(
    run_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    for row in (1, 3, 5):
        ok("view", run_file, "--segment", row, "--out", path)
        page = path.read_text(encoding="utf-8")
        for report in framed(tmp_path, page, PROBE):
            assert report["scroll"] <= report["inner"], report  # type: ignore[operator]
            assert report["wide"] == [], report
