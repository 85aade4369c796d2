"""The report's section on interference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fuse_eval.findings import (
    CONTROL,
    FUSED,
    VERDICTS,
    document_line,
    interference_line,
    title_of,
)
from fuse_eval.page_parts import Panels, Section
from launch.pages.charts import Bar, bar_chart, percent, share_of, significant
from launch.pages.parts import Cell, Row, Table, head_of

TITLE = "Interference"


def interference_section(evaluation: Mapping[str, Any] | None) -> Section:
    """Counts, excess, the worst documents and bars by domain.

    Args:
        evaluation: Content of evaluation.json, None when nothing was evaluated.
    """
    if not evaluation:
        return Section(TITLE, ["Nothing evaluated yet: run `logitfuse eval run`."], missing=True)
    interference = evaluation.get("interference")
    if not interference:
        text = "No CLM control was evaluated, and interference is measured against it."
        return Section(TITLE, [text], missing=True)
    lines = [interference_line(evaluation), document_line(evaluation)]
    level = share_of(1 - interference["confidence"], 0)
    texts = [
        "Documents on which the fused model is worse than the CLM control, beyond the noise of the "
        f"document's own blocks; at most {level} of them are expected to be false discoveries.",
        *(line for line in lines if line),
    ]
    worst = interference["worst_documents"]
    tables = [_worst_table(worst)] if worst else []
    panels = _domain_panels(interference["domains"])
    # Charts go beside the table if there is one.
    return Section(TITLE, texts, tables, *((panels, []) if tables else ([], panels)))


def _worst_table(worst: Sequence[Mapping[str, Any]]) -> Table:
    names = ["domain", title_of(CONTROL), title_of(FUSED), "nats more", "noise"]
    rows = [
        Row(
            item["document_id"],
            [
                Cell(item["domain"]),
                Cell(significant(item["against_bpb"], 4)),
                Cell(
                    significant(item["bpb"], 4),
                    "" if item["change"] is None else percent(item["change"]),
                ),
                Cell(significant(item["excess_nats"])),
                Cell(VERDICTS[item["verdict"]]),
            ],
        )
        for item in worst
    ]
    caption = (
        "The worst documents: those beyond the noise first, then by nats more than the control; "
        "bits per byte, small figures: change"
    )
    return Table(caption, head_of(["document", *names]), rows)


def _domain_panels(domains: Mapping[str, Mapping[str, Any]]) -> Panels:
    counts = []
    for domain, figures in domains.items():
        documents = figures["documents"]
        shown = f"{documents['worse']:,} of {documents['total']:,}"
        counts.append(Bar(domain, documents["worse"], "c1", shown))
    excess = [
        Bar(domain, bpb := figures["excess"]["worse_by_point_bpb"], "c1", significant(bpb))
        for domain, figures in domains.items()
    ]
    return [
        (
            "Documents worse beyond the noise",
            bar_chart(
                "Documents worse beyond the noise by domain",
                counts,
                unit="documents",
                top=max(1, *(bar.value for bar in counts)),
            ),
        ),
        (
            "Excess of all documents that score worse",
            bar_chart(
                "Summed excess by domain",
                excess,
                unit="bits per byte of the split",
                top=max(bar.value for bar in excess) or 1.0,
            ),
        ),
    ]
