"""The report page: complete, escaped, self-contained, and sound in a real browser."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from fuse_eval.findings import document_line, headline, interference_line, pool_lines
from fuse_eval.page import duration, render_page
from launch.pages.charts import Bar, bar_chart, percent, significant, thinned, ticks
from tests import report_factory
from tests.browser import framed, needs_browser

VOID = {"meta", "link", "br", "hr", "img", "input", "line", "circle", "rect", "polyline"}


class _Tags(HTMLParser):
    """Collects tags and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID or (tag == "rect" and "/>" not in (self.get_starttag_text() or "")):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def _tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(page)
    assert not parser.open
    return parser.seen


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(report_factory.summary(), report_factory.steps())


def test_page_is_whole_and_loads_nothing(page: str) -> None:
    tags = _tags(page)
    assert not [tag for tag, _ in tags if tag in ("script", "img", "iframe", "object")]
    for _, attributes in tags:
        for key in ("src", "href", "data", "srcset"):
            assert (attributes.get(key) or "data:,").startswith("data:")
        assert not [key for key in attributes if key.startswith("on")]
    assert "@import" not in page
    assert "url(" not in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Bits per byte",
        "Interference",
        "Training",
        "Source weights",
        "Fusing",
        "What the pools would score",
        "Alignment",
        "Time and memory",
        "Configuration",
    ]


def test_page_speaks_to_screen_readers(page: str) -> None:
    tags = _tags(page)
    charts = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(charts) >= 10
    assert all(a.get("role") == "img" and a.get("aria-label") for a in charts)
    assert all(a.get("scope") in ("row", "col") for tag, a in tags if tag == "th")
    tables = [tag for tag, _ in tags if tag == "table"]
    assert len(tables) == len([tag for tag, _ in tags if tag == "caption"])
    assert ("html", {"lang": "en"}) in tags


def test_names_of_users_are_text_and_nothing_else() -> None:
    domains = (report_factory.HOSTILE, "b" * 90, "ünï ćode\n")
    summary = report_factory.summary(domains=domains, name="x")
    summary["settings"]["note"] = report_factory.HOSTILE
    page = render_page(summary, report_factory.steps(domains=domains))
    _tags(page)
    assert "<script" not in page
    assert html.escape(report_factory.HOSTILE, quote=False)[:20] in page
    assert "{{ 7*7 }}" in page  # shown, not computed


def test_parts_that_do_not_exist_yet_are_a_sentence() -> None:
    summary = report_factory.summary()
    for key in (
        "evaluation",
        "pool",
        "alignment",
        "seconds",
        "peak_rss_bytes_by_stage",
        "mean_bpb",
    ):
        summary[key] = {}
    summary["peak_rss_bytes"] = 0
    page = render_page(summary, {})
    _tags(page)
    for command in ("eval run", "eval pool", "align run", "train run"):
        assert f"logitfuse {command}" in page


def test_one_source_one_domain_no_control() -> None:
    summary = report_factory.summary(("only",), ("one",))
    evaluation = summary["evaluation"]
    for values in (evaluation["bpb"], evaluation["mean_bpb"], summary["bpb"], summary["mean_bpb"]):
        values.pop("clm_control", None)
    evaluation["comparisons"] = evaluation["comparisons"][1:2]
    del evaluation["interference"]
    summary["pool"]["without"] = {}
    steps = {"fused": report_factory.steps(("only",), ("one", "two"), count=3)["fused"]}
    page = render_page(summary, steps)
    _tags(page)
    assert "no CLM control was trained" in page
    assert "No CLM control was evaluated, and interference is measured against it." in page


def test_interference_names_the_worst_documents_and_counts_domains(page: str) -> None:
    start = page.index("<h2>Interference</h2>")
    section = page[start : page.index("<h2>Training</h2>")]
    _tags(section.removesuffix("<section>\n").rpartition("</section>")[0])
    for words in (
        "6 of 270 are worse than the control beyond the noise (in sum 24.8 nats, 6.60e-05 bits per "
        "byte of the split), 33 are too short to tell; 93 score worse at all",
        'title="code/file 0.txt"',
        ">1.250<small>+4.2\u202f%</small></td>",
        ">71.0</td>",
        "too short to tell</td>",
        ">2 of 90<",
        "Summed excess by domain",
    ):
        assert words in section, words
    assert section.count("beyond the noise</td>") == 2


def test_no_interference_is_said_in_the_same_words() -> None:
    evaluation = report_factory.evaluation()
    found = evaluation["interference"]
    for figures in (found, *found["domains"].values()):
        figures["documents"] = {"total": 9, "worse": 0, "undecided": 0, "worse_by_point": 0}
        figures["excess"] = dict.fromkeys(figures["excess"], 0.0)
    found["worst_documents"] = []
    assert document_line(evaluation) == (
        "Documents: none of 9 is worse than the control beyond the noise; 0 score worse at all, "
        "noise included (0 nats, 0 bits per byte of the split)."
    )
    summary = report_factory.summary()
    page = render_page(summary | {"evaluation": evaluation}, report_factory.steps())
    _tags(page)
    assert "The worst documents" not in page
    assert ">0 of 9<" in page


def test_headline_says_what_the_interval_allows() -> None:
    evaluation = report_factory.evaluation()
    mean = evaluation["comparisons"][0]["mean"]
    assert "below the CLM control" in headline(evaluation)
    mean |= {"value": 0.02, "low": 0.01, "high": 0.03}
    assert "above the CLM control" in headline(evaluation)
    mean |= {"low": -0.01}
    assert headline(evaluation).startswith("No difference beyond the noise")
    assert "1 of 3 domains worse" in str(interference_line(evaluation))
    evaluation["comparisons"][0]["worse"] = []
    assert "no domain is worse" in str(interference_line(evaluation))


def test_pool_says_whether_it_pays_and_whom_to_drop() -> None:
    pool = report_factory.pool()
    lines = pool_lines(pool)
    assert lines[0].startswith("Fusing can pay: the asn pool")
    assert any("Consider dropping facts" in line for line in lines)
    pool["target_bpb"] = dict.fromkeys(pool["target_bpb"], 0.5)
    assert pool_lines(pool)[0].startswith("Fusing will hardly pay")
    pool["pool_bpb"] = {"asn": {}}
    assert "No row" in pool_lines(pool)[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (2.5, "2.50"),
        (1234.5, "1,234"),
        (0.012345, "0.0123"),
        (1e-9, "1.00e-09"),
        (float("nan"), "–"),
    ],
)
def test_significant_digits(value: float, shown: str) -> None:
    assert significant(value) == shown


def test_numbers_for_people() -> None:
    assert percent(-0.0312) == "−3.1\u202f%"
    assert percent(-0.0001) == "0.0\u202f%"
    assert duration(75) == "75 s"
    assert duration(351) == "5 min 51 s"
    assert duration(7300) == "2 h 01 min"
    assert ticks(0, 2.6) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert ticks(1, 1) == [1]
    assert thinned([(i, float("nan") if i == 3 else 1.0) for i in range(1000)], 10)[-1][1] == 1.0
    assert len(thinned([(i, 1.0) for i in range(1000)], 10)) == 10


PROBE = """<script>
addEventListener('load', () => {
  const wide = [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 1 && !e.closest('.table, pre, .quiet');
  }).map(e => e.tagName + '.' + e.className);
  const style = getComputedStyle(document.body);
  parent.postMessage(JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.slice(0, 5),
    paper: style.backgroundColor, ink: style.color, title: document.title,
  }), '*');
});
</script>"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_real_browser(tmp_path: Path, scheme: str) -> None:
    """No console message, no sideways scrolling at phone and desk width, both colour schemes."""
    domains = (report_factory.HOSTILE, "b" * 90, "prose")
    page = render_page(report_factory.summary(domains), report_factory.steps(domains))
    option = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    reports = framed(tmp_path, page, PROBE, option)
    assert sorted(r["inner"] for r in reports) == [320, 390, 1280]
    for report in reports:
        assert report["scroll"] <= report["inner"], report
        assert report["wide"] == [], report
        assert "logitfuse report" in report["title"]
        light = int(re.findall(r"\d+", str(report["paper"]))[0]) > 128
        assert light == (scheme == "light")


@pytest.mark.parametrize("top", [0.004, 3.0, 13_490.0, 8_250_000.0])
def test_labels_of_an_axis_stand_side_by_side(top: float) -> None:
    svg = str(bar_chart("x", [Bar("a label of some length", top, "c0", "")], unit="nats"))
    found = re.findall(r'<text x="([0-9.]+)"[^>]*class="tick">([^<]+)<', svg)
    assert len(found) >= 2
    places = [(float(x), 6.0 * len(label)) for x, label in found]
    for (x, width), (next_x, next_width) in pairwise(places):
        assert x + width / 2 < next_x - next_width / 2
