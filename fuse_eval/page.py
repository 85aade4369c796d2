"""The report page: one self-contained HTML file made from the summary and the step logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fuse_eval import training_charts
from fuse_eval.advantage import advantage_section
from fuse_eval.answers.report import answer_section
from fuse_eval.findings import (
    BEFORE,
    CONTROL,
    FUSED,
    comparison,
    document_line,
    headline,
    interference_line,
    pool_lines,
    specialist_lines,
    title_of,
)
from fuse_eval.harness.report import harness_section
from fuse_eval.interference.section import interference_section
from fuse_eval.page_parts import Panels, Section, figure_table
from fuse_eval.palette import colours_of
from fuse_eval.summary import STAGES
from launch.pages.charts import (
    Bar,
    Range,
    Stack,
    bar_chart,
    interval_chart,
    percent,
    share_of,
    significant,
    stack_chart,
)
from launch.pages.page import render
from launch.pages.parts import Cell, Row, Table, Tile, head_of


def render_page(
    summary: Mapping[str, Any], steps: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """The whole page.

    Args:
        summary: From `build_summary`.
        steps: From `step_logs`.

    Returns:
        HTML that loads nothing.
    """
    evaluation = summary["evaluation"] or None
    notes = []
    if evaluation:
        notes = [
            interference_line(evaluation),
            document_line(evaluation),
            *specialist_lines(evaluation),
        ]
    return render(
        "fuse_eval",
        "page",
        title=summary["name"],
        headline=headline(evaluation),
        notes=[note for note in notes if note],
        figures=_tiles(summary),
        sections=[
            _bpb_section(evaluation),
            interference_section(evaluation),
            *training_sections(summary, steps),
            _pool_section(summary["pool"]),
            *([answer_section(summary["answers"])] if summary.get("answers") else []),
            *([harness_section(summary["harness"])] if summary.get("harness") else []),
            *([advantage_section(summary["advantage"])] if summary.get("advantage") else []),
            _alignment_section(summary["alignment"]),
            _cost_section(summary),
        ],
        config=yaml.safe_dump(summary["settings"], sort_keys=False, allow_unicode=True),
        identity=_identity_table(summary),
    )


def training_sections(
    summary: Mapping[str, Any], steps: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Section]:
    """Loss curves and source weights."""
    if not steps:
        missing = "Nothing trained yet: run `logitfuse train run`."
        return [Section("Training", [missing], missing=True)]
    sections = [
        Section(
            "Training",
            ["Loss terms over optimizer steps, and bits per byte on the validation split."],
            panels=training_charts.loss_panels(steps),
        )
    ]
    weights = training_charts.weight_panels(steps, list(summary["settings"]["sources"]))
    if weights:
        text = "Mean weight that the selector gives to each source where it has a distribution."
        sections.append(Section("Source weights", [text], panels=weights))
    fusion = training_charts.fusion_panels(steps)
    if fusion:
        text = (
            "How much the fusion loss counts beside ground truth. It falls in a domain as the target "
            "learns what the sources know there, and to zero where it has overtaken them."
        )
        sections.append(Section("Fusing", [text], panels=fusion))
    return sections


def _tiles(summary: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    mean = summary["mean_bpb"]
    for model in (BEFORE, CONTROL, FUSED):
        if model in mean:
            note = "bits per byte, mean of domains"
            if model != BEFORE:
                note = f"{percent(mean[model] / mean[BEFORE] - 1)} from the start"
            tiles.append(Tile(title_of(model), significant(mean[model], 4), note))
    change = comparison(summary["evaluation"], FUSED, CONTROL)
    if change:
        domains = change["domains"]
        worst = max(domains, key=lambda domain: domains[domain]["value"])
        shown = percent(domains[worst]["value"])
        tiles.append(Tile("worst domain against control", shown, worst))
    if summary["seconds"]:
        note = "all stages, all their runs"
        tiles.append(Tile("time", duration(sum(summary["seconds"].values())), note))
    if summary["peak_rss_bytes"]:
        size = f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB"
        tiles.append(Tile("peak memory", size, "largest stage"))
    return tiles


def duration(seconds: float) -> str:
    """A duration as text, such as "45 s", "12 min 05 s", "2 h 03 min"."""
    if seconds < 90:
        return f"{significant(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 90:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _bpb_section(evaluation: Mapping[str, Any] | None) -> Section:
    if not evaluation:
        missing = "Nothing evaluated yet: run `logitfuse eval run` after training."
        return Section("Bits per byte", [missing], missing=True)
    bpb = evaluation["bpb"]
    against = CONTROL if CONTROL in bpb else BEFORE
    caption = (
        f"Bits per byte on split {evaluation['split']}, lower is better; "
        f"small figures: change against {title_of(against)}"
    )
    sources = [model for model in bpb if model not in (BEFORE, CONTROL, FUSED)]
    excluded = sum(item["excluded_bytes"] for item in evaluation["domains"].values())
    total = sum(item["bytes"] for item in evaluation["domains"].values())
    texts = [
        "Every model is scored on the same bytes: in each segment, from the first byte at which "
        f"all models begin a token they have a distribution for. {total:,} bytes are counted, "
        f"{excluded:,} before that are context."
    ]
    return Section(
        "Bits per byte",
        texts,
        [figure_table(caption, "model", bpb, own=FUSED, against=against, sources=sources)],
        _change_panels(evaluation),
        _bpb_panels(bpb),
    )


def _change_panels(evaluation: Mapping[str, Any]) -> Panels:
    change = comparison(evaluation, FUSED, CONTROL)
    if change is None:
        return []
    rows = [
        Range(domain, item["value"], item["low"], item["high"])
        for domain, item in change["domains"].items()
    ]
    mean = change["mean"]
    rows.append(Range("mean", mean["value"], mean["low"], mean["high"], strong=True))
    unit = f"change of bits per byte, % ({share_of(evaluation['confidence'], 0)} interval)"
    name = "Change of bits per byte from CLM control to fused by domain"
    chart = interval_chart(name, rows, unit=unit, good="fused better", bad="control better")
    return [("Fused against the CLM control", chart)]


def _bpb_panels(bpb: Mapping[str, Mapping[str, float]]) -> Panels:
    colours = colours_of([model for model in bpb if model not in (BEFORE, CONTROL, FUSED)])
    domains = sorted({domain for values in bpb.values() for domain in values})
    top = max(value for values in bpb.values() for value in values.values()) * 1.02
    panels = []
    for domain in domains:
        bars = [
            Bar(title_of(model), values[domain], colours[model], significant(values[domain]))
            for model, values in bpb.items()
            if domain in values
        ]
        chart = bar_chart(
            f"Bits per byte in {domain} by model", bars, unit="bits per byte", top=top
        )
        panels.append((domain, chart))
    return panels


def _pool_section(pool: Mapping[str, Any]) -> Section:
    title = "What the pools would score"
    if not pool:
        missing = "No estimate yet: run `logitfuse eval pool` once the stores are aligned."
        return Section(title, [missing], missing=True)
    rows = sum(item["common_rows"] for item in pool["domains"].values())
    every = sum(item["rows"] for item in pool["domains"].values())
    covered = sum(item["common_bytes"] for item in pool["domains"].values())
    whole = sum(item["bytes"] for item in pool["domains"].values())
    share = f"{share_of(rows / max(every, 1))} of its tokens, {share_of(covered / max(whole, 1))}"
    texts = [
        "Estimated from the aligned stores alone, before training, on the rows where every source "
        f"gives the label a known probability: {share} of the bytes.",
        *pool_lines(pool),
    ]
    named: dict[str, Mapping[str, float]] = {"target now": pool["target_bpb"]}
    named |= {f"{source} alone": values for source, values in pool["alone_bpb"].items()}
    for selector, values in pool["pool_bpb"].items():
        hindsight = " (hindsight)" if selector in pool.get("hindsight", ()) else ""
        named[f"pool {selector}{hindsight}"] = values
    caption = f"Bits per byte of the label on split {pool['split']}, same rows for all"
    tables = [figure_table(caption, "", named, against="target now")]
    tables.append(
        figure_table(
            "Each source on its own tokens, whole segments: its NLL before any alignment",
            "source",
            pool["source_bpb"],
        )
    )
    if pool["without"]:
        tables.append(_without_table(pool["without"]))
    return Section(title, texts, tables)


def _without_table(without: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    sources = sorted({source for by_source in without.values() for source in by_source})
    rows = [
        Row(
            f"without {source}",
            [Cell(percent(by_source[source]["change"], 2)) for by_source in without.values()],
        )
        for source in sources
    ]
    caption = "Change of the pool's mean bits per byte when a source is left out (− means: drop it)"
    return Table(caption, head_of(["", *(f"{name} pool" for name in without)]), rows)


def _alignment_section(alignment: Mapping[str, Mapping[str, float]]) -> Section:
    title = "Alignment"
    if not alignment:
        missing = "Nothing aligned yet: run `logitfuse align run`."
        return Section(title, [missing], missing=True)
    parts = [
        ("token starts on a boundary", "c0"),
        ("inside a source token", "c4"),
        ("no information", "cmuted"),
    ]
    rows = [
        Stack(source, (figures["boundary"], figures["inside"], figures["none"]))
        for source, figures in alignment.items()
    ]
    chart = stack_chart(
        "Share of target positions by origin of their distribution, by source",
        rows,
        parts,
        unit="share of the target's positions, %",
    )
    table = Table(
        "Target positions with a distribution, and mean probability mass of the entries: as stored "
        "in the source's tokens, as aligned in the target's",
        head_of(["source", "positions", "covered", "mass stored", "mass aligned"]),
        [
            Row(
                source,
                [
                    Cell(f"{figures['positions']:,.0f}"),
                    Cell(share_of(figures["coverage"])),
                    *(Cell(_mass(figures, key)) for key in ("mass_stored", "mass_aligned")),
                ],
            )
            for source, figures in alignment.items()
        ],
    )
    text = "Where each source's distributions land on the target's tokens."
    return Section(title, [text], [table], [("Origin of distributions", chart)])


def _mass(figures: Mapping[str, float], key: str) -> str:
    return significant(figures[key]) if key in figures else "–"


def _cost_section(summary: Mapping[str, Any]) -> Section:
    seconds, peak = summary["seconds"], summary["peak_rss_bytes_by_stage"]
    if not seconds:
        return Section("Time and memory", ["No stage has been logged yet."], missing=True)
    stages = [stage for stage in STAGES if stage in seconds]
    times = [Bar(stage, seconds[stage], "c0", duration(seconds[stage])) for stage in stages]
    memory = [
        Bar(stage, peak[stage] / 2**30, "c2", f"{peak[stage] / 2**30:.2f}") for stage in stages
    ]
    panels = [
        (
            "Time by stage",
            bar_chart("Seconds by stage", times, unit="seconds, all runs of a stage"),
        ),
        ("Peak memory by stage", bar_chart("Peak memory by stage", memory, unit="GiB resident")),
    ]
    return Section("Time and memory", panels=panels)


def _identity_table(summary: Mapping[str, Any]) -> Table:
    rows = [
        Row(name, [Cell(str(value))])
        for part in ("fingerprints", "versions")
        for name, value in summary[part].items()
    ]
    return Table("Inputs", head_of(["", "value"]), rows)
