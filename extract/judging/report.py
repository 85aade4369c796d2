"""The terminal report of `judge`: authors of the best answers, figures of judges, what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from extract.judging.records import BEST_FILE, SCORES_FILE, JudgedRecord
from launch.visible import table

SHOWN_HELD = 5


def judged_report(record: JudgedRecord, folder: str) -> str:
    """The report as text.

    Args:
        record: The record of judging.
        folder: Its folder or URL.
    """
    sources = list(record.answers)
    lines = [f"best answers by author ({record.vote}):", *_authors(record, sources), ""]
    headers = ["judge", "scores", "none", "chose the best", *(f"mean {name}" for name in sources)]
    rows = [
        [
            title,
            judge.scores,
            sum(judge.failures.values()),
            f"{judge.chosen / max(judge.judged, 1):.1%}",
            *(judge.means.get(name, "-") for name in sources),
        ]
        for title, judge in record.judges.items()
    ]
    lines += table(headers, rows)
    for title, judge in record.judges.items():
        if judge.failures:
            lines.append(f"{title} has no score for some answers: {_counts(judge.failures)}")
    lines += _left_out(record)
    lines.append(f"prompts settled by: {_counts(record.settled_by)}")
    if record.ties_not_scored:
        lines.append(
            f"ties settled by order, since judge.scored_in has not all of their answers: "
            f"{record.ties_not_scored:,}"
        )
    lines.append(f"{folder}/{BEST_FILE} is a corpus (corpus.inputs); {SCORES_FILE} has all votes")
    if "://" in folder:
        lines.append("corpus inputs are read from disk: copy it there first")
    return "\n".join(lines)


def _authors(record: JudgedRecord, sources: list[str]) -> list[str]:
    whole: Counter[str] = Counter()
    rows: list[list[object]] = []
    for domain, by_author in record.best.items():
        whole.update(by_author)
        rows.append(_author_row(domain, by_author, sources))
    if len(rows) > 1:
        rows.append(_author_row("all", whole, sources))
    return table(["domain", "prompts", *sources], rows)


def _author_row(domain: str, counts: Mapping[str, int], sources: list[str]) -> list[object]:
    number = sum(counts.values())
    shares = [f"{counts.get(name, 0):,} ({counts.get(name, 0) / number:.0%})" for name in sources]
    return [domain, number, *shares]


def _left_out(record: JudgedRecord) -> list[str]:
    lines = []
    for name, reasons in record.left_out.items():
        lines.append(f"answers of {name} left out: {_counts(reasons)}")
    if record.silent:
        cut = f", {record.only_cut:,} of them with cut answers" if record.only_cut else ""
        lines.append(f"prompts dropped, no usable answer: {record.silent:,}{cut}")
    if record.too_few:
        lines.append(f"prompts dropped, fewer answers than judge.min_answers: {record.too_few:,}")
    if record.none_passes:
        lines.append(
            "prompts dropped, no answer scored as high as a judge's min_score: "
            f"{record.none_passes:,}"
        )
    if record.held:
        shown = ", ".join(record.held[:SHOWN_HELD])
        more = ", ..." if len(record.held) > SHOWN_HELD else ""
        what = "dropped" if record.held_dropped else "kept (judge.drop_held)"
        lines.append(
            f"prompts that contain their answer, {what}: {len(record.held):,} ({shown}{more})"
        )
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())
