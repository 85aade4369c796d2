"""`align report`: its figures are those of a plain reading of the stores, part-done ones too."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import shutil
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.report.report import mass_where_tokens_begin, token_starts
from align.report.report_page import (
    LEAST_EXCESS,
    histogram_bars,
    missing_line,
    number,
    report_page,
    view_command,
)
from align.report.report_sums import Sums
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.layout import Arrays, Origin
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from tests.browser import framed, needs_browser
from tests.test_align_view import IDS, TEXTS, make_run, ok, refused

ORIGINS = ("boundary", "inside", "none")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report"))


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path.parent / "run/report/align.json").read_text())
    return found


class Plain:
    """Sums of one group, added up one position and one span at a time."""

    def __init__(self) -> None:
        self.positions = self.covered = self.spans = self.size = self.segments = 0
        self.kept: list[float] = []
        self.stored: list[float] = []
        self.aligned = self.own = self.all_nats = 0.0
        self.all_bytes = 0


def plain(run_file: Path, source: str) -> tuple[dict[Any, Plain], list[tuple[float, int]]]:
    """Groups by domain and by (domain, origin), and each segment's excess per byte with its row."""
    run = load_run(run_file)
    plan = open_plan(run)
    stores = [StoreReader.open(open_location(u(source))) for u in (run.store_url, run.aligned_url)]
    groups: dict[Any, Plain] = {}
    excess = []
    for record in plan.shards:
        if record.index not in stores[1].commits:
            continue
        own, made = (store.read(record.index) for store in stores)
        for d, segment in enumerate(plan.segments(record)):
            found = _segment(own, made, d)
            whole = groups.setdefault(segment.domain, Plain())
            whole.segments += 1
            whole.all_nats += float(made["source_nats"][d])
            whole.all_bytes += int(made["source_bytes"][d])
            nats = size = 0.0
            for origin, kept, stored in found["positions"]:
                for group in (whole, groups.setdefault((segment.domain, origin), Plain())):
                    group.positions += 1
                    group.covered += origin != "none"
                    if group is not whole or origin != "none":
                        group.kept.append(kept)
                        group.stored.append(stored)
            for origin, length, aligned, mine in found["spans"]:
                for group in (whole, groups.setdefault((segment.domain, origin), Plain())):
                    group.spans += 1
                    group.size += length
                    group.aligned += aligned
                    group.own += mine
                nats, size = nats + aligned - mine, size + length
            if size:
                excess.append((nats / size, segment.index))
    return groups, excess


def _segment(own: Arrays, made: Arrays, d: int) -> dict[str, Any]:
    theirs = range(*own["token_offsets"][d : d + 2].tolist())
    ours = range(*made["token_offsets"][d : d + 2].tolist())
    first = int(made["span_offsets"][d])
    positions, spans, start = [], [], 0
    for i in ours:
        row = next((r for r in theirs if own["byte_ends"][r] > start), theirs[-1])
        name = Origin(int(made["origin"][i])).name.lower()
        positions.append((name, 1 - float(made["tail_mass"][i]), 1 - float(own["tail_mass"][row])))
        start = int(made["byte_ends"][i])
    start = 0
    for s in range(first, int(made["span_offsets"][d + 1])):
        rows = [i for i in ours if made["span_index"][i] == s - first]
        labels = [float(made["label_logprobs"][i]) for i in rows]
        end, mine = int(made["span_byte_ends"][s]), -float(made["span_logprobs"][s])
        if not math.isnan(mine + sum(labels)):
            inside = any(made["origin"][i] == Origin.INSIDE for i in rows)
            spans.append(("inside" if inside else "boundary", end - start, -sum(labels), mine))
        start = end
    return {"positions": positions, "spans": spans}


def require_equal(figures: Mapping[str, Any], group: Plain, *, domain: bool) -> None:
    def mean(values: list[float]) -> float | None:
        return pytest.approx(np.mean(values)) if values else None

    assert figures["positions"] == group.positions
    assert figures["mass_kept"] == mean(group.kept)
    assert figures["mass_stored"] == mean(group.stored)
    assert (figures["spans"], figures["common_bytes"]) == (group.spans, group.size)
    bits = group.size * math.log(2)
    for key, nats in (
        ("aligned_bpb", group.aligned),
        ("source_bpb", group.own),
        ("excess_bpb", group.aligned - group.own),
    ):
        assert figures[key] == (pytest.approx(nats / bits, abs=1e-9) if bits else None)
    added = (group.aligned - group.own) / group.spans if group.spans else None
    assert figures["excess_nats_per_span"] == (None if added is None else pytest.approx(added))
    if domain:
        assert figures["coverage"] == pytest.approx(group.covered / group.positions)
        assert figures["segments"] == group.segments
        assert figures["own_bytes"] == group.all_bytes
        own = group.all_nats / math.log(2) / group.all_bytes
        assert figures["own_bpb"] == pytest.approx(own)


def test_figures_are_those_of_a_plain_reading(run_file: Path) -> None:
    ok("report", run_file, "--worst", 4)
    found = written(run_file)
    assert list(found["sources"]) == ["one", "two"]
    for source, figures in found["sources"].items():
        groups, excess = plain(run_file, source)
        assert set(figures["domains"]) == {"code", "prose"}
        for domain, item in figures["domains"].items():
            require_equal(item, groups[domain], domain=True)
            assert tuple(item["origins"]) == tuple(reversed([o.name.lower() for o in Origin]))
            for origin in ORIGINS:
                part = groups.get((domain, origin), Plain())
                require_equal(item["origins"][origin], part, domain=False)
                assert item["origins"][origin]["share"] == pytest.approx(
                    part.positions / groups[domain].positions
                )
        every = figures["all"]
        both = [groups["code"], groups["prose"]]
        assert every["positions"] == sum(g.positions for g in both)
        assert every["excess_bpb"] == pytest.approx(
            sum(g.aligned - g.own for g in both) / sum(g.size for g in both) / math.log(2)
        )
        assert every["bytes"] == sum(len(t.encode()) for texts in TEXTS for t in texts)
        worst = sorted(excess, key=lambda pair: (-pair[0], pair[1]))[:4]
        assert [item["row"] for item in figures["worst"]] == [row for _, row in worst]
        assert [i["excess_nats_per_byte"] for i in figures["worst"]] == pytest.approx(
            [value for value, _ in worst]
        )
        assert [i["segment_id"] for i in figures["worst"]] == [IDS[row] for _, row in worst]
        bins = figures["histogram"]["segments"]
        expected: dict[str, int] = {}
        for value, _ in excess:
            place = str(min(max(round(value / math.log(2) / 0.01), -1000), 1000))
            expected[place] = expected.get(place, 0) + 1
        assert bins == expected


def test_the_command_that_is_printed_shows_the_segment(run_file: Path, tmp_path: Path) -> None:
    out = ok("report", run_file, "--source", "one", "--set", "seed=3")
    commands = [line.split(maxsplit=1)[1] for line in out.splitlines() if " align view " in line]
    listed = written(run_file)["sources"]["one"]["worst"]
    found = [item for item in listed if item["excess_nats_per_byte"] >= LEAST_EXCESS]
    assert len(commands) == len(found) >= 2
    assert len(listed) > len(found), "no segment is listed whose cost is shown as nothing"
    for command, worst in zip(commands, found, strict=True):
        words = shlex.split(command)
        assert words[:3] == ["logitfuse", "align", "view"]
        shown = ok(*words[2:], "--out", tmp_path / "page.html")
        assert f"(row {worst['row']}, " in shown


def test_the_method_is_the_stores_and_another_one_is_refused(run_file: Path) -> None:
    assert "one: aligned by method bytes" in ok("report", run_file, "--source", "one")
    assert written(run_file)["sources"]["one"]["method"] == "bytes"
    for command in (["report"], ["view", "--segment", IDS[0]]):
        line = refused(command[0], run_file, *command[1:], "--set", "align.method=mined")
        assert "align.method mined" in line
        assert "method bytes" in line


@pytest.mark.parametrize(
    "name", ["d#0", "it's #0", "a\nb#0", "\u202e#0", "$(rm -rf /)#0", "--x#0", ""]
)
def test_ids_that_cannot_be_pasted_become_rows(name: str) -> None:
    command = view_command("logitfuse align view r.yaml", "s", {"segment_id": name, "row": 7})
    assert command.isprintable()
    wanted = shlex.split(command)[5]
    assert wanted == (name if name.isprintable() and name else "7")


def test_part_done_stores_say_what_is_missing(tmp_path: Path) -> None:
    path = make_run(tmp_path, leave_out={"one": [1], "two": [0, 1, 2]})
    out = ok("report", path)
    assert "one: not aligned yet: 1 of 3 shards (1)" in out
    assert "two: not aligned yet: 3 of 3 shards (0-2)" in out
    found = written(path)["sources"]
    assert found["one"]["missing_shards"] == [1]
    assert found["two"]["domains"] == {}
    groups, _ = plain(path, "one")
    for domain, item in found["one"]["domains"].items():
        require_equal(item, groups[domain], domain=True)
    page = (tmp_path / "run/report/align.html").read_text(encoding="utf-8")
    assert "not aligned yet: 1 of 3 shards (1)" in page
    shutil.rmtree(tmp_path / "run/aligned/two")
    assert "two: not aligned yet: 3 of 3 shards" in ok("report", path)
    assert "nothing is aligned yet" in refused("report", path, "--source", "two")
    shutil.rmtree(tmp_path / "run/stores/one")
    assert "one: no source store, so the mass it stored is not known" in ok("report", path)
    assert written(path)["sources"]["one"]["all"]["mass_stored"] is None
    shutil.rmtree(tmp_path / "run/plan")
    assert "no plan" in refused("report", path)


def test_damage_is_one_line(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    reader = StoreReader.open(open_location(tmp_path / "run/aligned/two"))
    victim = tmp_path / "run/aligned/two" / reader.commits[2].path / "span_steps/c/0"
    data = bytearray(victim.read_bytes())
    data[-9] ^= 4
    victim.write_bytes(data)
    line = refused("report", path)
    assert "shard 2" in line
    assert "span_steps" in line
    assert not (tmp_path / "run/report").exists()

    def elsewhere(made: Arrays) -> None:
        made["segment_ids"] += 1

    other = make_run(tmp_path / "b", change=elsewhere)
    assert "segments are not those of the plan" in refused("report", other)
    assert "no such source" in refused("report", path, "--source", "three")


def test_each_shard_is_read_once_in_turn(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of one shard: none is read before the one before it is done, none twice."""
    reads: list[tuple[str, int]] = []
    read = StoreReader.read

    def noted(self: StoreReader, shard: int, *names: Any) -> Arrays:
        reads.append((self.manifest.kind, shard))
        return read(self, shard, *names)

    monkeypatch.setattr(StoreReader, "read", noted)
    ok("report", run_file, "--source", "one")
    assert reads == [(kind, shard) for shard in range(3) for kind in ("aligned", "source")]


# ------------------------------------------------------------------------------- the parts


@given(st.lists(st.tuples(st.lists(st.integers(0, 4)), st.lists(st.integers(0, 4))), max_size=5))
def test_masses_come_from_the_token_that_covers(
    segments: list[tuple[list[int], list[int]]],
) -> None:
    """Against one search after another, with tokens without bytes and segments without tokens."""
    made = [_tokens([pair[side] for pair in segments]) for side in (0, 1)]
    own, target = made
    own["tail_mass"] = np.linspace(0, 1, len(own["byte_ends"])).astype("<f4")
    found = mass_where_tokens_begin(own, target)
    for d in range(len(segments)):
        rows = range(*own["token_offsets"][d : d + 2].tolist())
        start = 0
        for i in range(*target["token_offsets"][d : d + 2].tolist()):
            assert token_starts(target["token_offsets"], target["byte_ends"])[i] == start
            if rows:
                row = next((r for r in rows if own["byte_ends"][r] > start), rows[-1])
                assert found[i] == pytest.approx(1 - own["tail_mass"][row])
            else:
                assert np.isnan(found[i])
            start = int(target["byte_ends"][i])


def _tokens(sizes: list[list[int]]) -> Arrays:
    ends = [np.cumsum(part, dtype=np.int64) for part in sizes]
    return {
        "token_offsets": np.cumsum([0, *map(len, sizes)]).astype("<i8"),
        "byte_ends": np.concatenate([np.zeros(0), *ends]).astype("<u4"),
    }


@given(st.dictionaries(st.integers(-1000, 1000), st.integers(1, 9), min_size=1), st.integers(1, 40))
def test_wide_bins_hold_every_segment_in_its_place(bins: dict[int, int], most: int) -> None:
    left, counts, size = histogram_bars({str(i): n for i, n in bins.items()}, most)
    assert len(counts) <= most
    expected = [0] * len(counts)
    for i, n in bins.items():
        expected[math.floor((i * 0.01 - left) / (size * 0.01))] += n
    assert counts == expected


def test_numbers_for_people() -> None:
    shown = [number("share", 0.5), number("positions", 12345), number("excess_bpb", 0.5)]
    assert shown == ["50.0%", "12,345", "+0.500"]
    assert number("own_bpb", None) == "–"
    assert number("excess_bpb", -0.0001) == number("own_bpb", 0.0) == "0.000"
    assert number("excess_nats_per_byte", 0.0001) == "+0.0001"
    assert missing_line({"missing_shards": [], "shards": 4}) == ""
    assert Sums().figures()["aligned_bpb"] is None


# ------------------------------------------------------------------------------- the page


class Nested(HTMLParser):
    """Tags that nest, and those seen."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


ATTACK = "<script>x</script>&'\"\u202e</style>${css}\n"


def hostile_page(run_file: Path) -> str:
    """The page of a run whose names are an attack."""
    ok("report", run_file)
    report = written(run_file)
    report["name"] = ATTACK
    one = report["sources"]["one"]
    one["domains"] = {ATTACK: one["domains"]["code"], "b" * 90: one["domains"]["prose"]}
    for worst in one["worst"]:
        worst |= {"segment_id": ATTACK, "domain": ATTACK}
    one["worst"][0]["segment_id"] = "w" * 300
    return report_page(report, "logitfuse align view 'a b.yaml'")


def test_page_is_whole_and_loads_nothing(run_file: Path) -> None:
    page = hostile_page(run_file)
    tags = Nested(page).seen
    assert not {tag for tag, _ in tags} & {"script", "img", "iframe", "object"}
    assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]
    assert [a["href"] for _, a in tags if "href" in a] == ["data:,"]
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|@import|url\(", page)
    assert "\u202e" not in page
    assert page.count("</style>") == 1
    assert html.escape("<script>x</script>") in page
    assert "${css}" in page
    charts = [a for tag, a in tags if tag == "svg"]
    assert len(charts) == 6
    assert all(a.get("role") == "img" and a.get("aria-label") for a in charts)
    assert all(a.get("scope") in ("row", "col") for tag, a in tags if tag == "th")


def test_bars_are_as_long_as_their_values(run_file: Path) -> None:
    ok("report", run_file)
    item = written(run_file)["sources"]["one"]
    page = (run_file.parent / "run/report/align.html").read_text(encoding="utf-8")
    chart = page.split("<h3>Coverage by domain</h3>")[1].split("</svg>")[0]
    lengths = [float(w) for w in re.findall(r'<rect [^>]*width="([0-9.]+)"', chart)]
    values = [item["domains"][d]["coverage"] for d in ("code", "prose")]
    assert lengths[0] / lengths[1] == pytest.approx(values[0] / values[1], rel=0.02)
    for value in values:
        assert f">{value:.1%}</text>" in chart
    histogram = page.split("<h3>Segments by excess bits per byte</h3>")[1].split("</svg>")[0]
    counts = [int(n) for n in re.findall(r": ([0-9,]+) segments</title>", histogram)]
    assert sum(counts) == sum(item["histogram"]["segments"].values())


PROBE = """<script>
addEventListener('load', () => {
  const wide = [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 1 && !e.closest('.table');
  }).map(e => e.tagName + '.' + e.className);
  parent.postMessage(JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.slice(0, 5),
  }), '*');
});
</script>"""


@pytest.mark.slow
@needs_browser
def test_page_in_a_real_browser(run_file: Path, tmp_path: Path) -> None:
    reports = framed(tmp_path, hostile_page(run_file), PROBE)
    assert sorted(r["inner"] for r in reports) == [320, 390, 1280]
    for report in reports:
        assert report["scroll"] <= report["inner"], report  # type: ignore[operator]
        assert report["wide"] == [], report
