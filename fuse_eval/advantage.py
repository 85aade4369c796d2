"""`eval advantage`: how often each source is best, by likelihood, by its own answers, and by both.

Source: ProFuser (2408.04998). Training mode: the source with the lowest NLL of a prompt's reference
answer. Inference mode: the author of the answer that `logitfuse judge` chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from fuse_eval.page_parts import Panels, Section
from fuse_eval.palette import colours_of
from launch.pages.charts import Bar, bar_chart, share_of
from launch.visible import table
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.disk.parquet import ParquetFile, parquet_errors
from store_schema.errors import MissingError
from store_schema.plan.plan import Plan, ShardRecord
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.store.same_source import require_same_source

BEST_ANSWERS = "judged/best.parquet"
MODES = ("training", "inference", "both")
_ARRAYS = ("segment_ids", "token_offsets", "label_logprobs")


def advantage(run: RunConfig) -> dict[str, Any]:
    """Count how often each source is best.

    Args:
        run: A run with source stores and judged answers.

    Returns:
        `domains`: by domain and mode how often each source is best, and the number of prompts that
        were counted; `agree`: of the prompts that both modes know, the share with the same source in
        both; `unknown`: prompts without a likelihood by all sources, without a judged answer, and whose
        best answers tie, so that the order of the sources decided.

    Raises:
        MissingError: No plan, stores that are not complete, or nothing judged.
        MismatchError: A store is of another plan or model.
        CorruptionError: Damaged files.
    """
    plan = open_plan(run)
    nats, domains = _reference_nats(run, plan)
    authors = _best_authors(run)
    sources = list(run.sources)
    counted: dict[str, dict[str, Counter[str]]] = {}
    unknown = Counter[str]()
    agree = together = 0
    for prompt, domain in domains.items():
        by_mode = counted.setdefault(domain, {mode: Counter() for mode in MODES})
        nats_M = nats[prompt]
        likely = None if np.isnan(nats_M).any() else sources[int(nats_M.argmin())]
        author, settled_by = authors.get(prompt, (None, None))
        tied = settled_by == "order"
        author = None if tied else author
        if likely is not None:
            by_mode["training"][likely] += 1
        if author is not None:
            by_mode["inference"][author] += 1
        unknown["likelihood"] += likely is None
        unknown["tie"] += tied
        unknown["answer"] += author is None and not tied
        if likely is not None and author is not None:
            together += 1
            agree += likely == author
            by_mode["both"][likely if likely == author else ""] += 1
    return {
        "sources": sources,
        "prompts": {domain: sum(d == domain for d in domains.values()) for domain in counted},
        "domains": {
            domain: {
                mode: {"of": sum(counts.values())} | {name: counts[name] for name in sources}
                for mode, counts in by_mode.items()
            }
            for domain, by_mode in sorted(counted.items())
        },
        "agree": agree / together if together else None,
        "unknown": dict(unknown),
    }


def _reference_nats(
    run: RunConfig, plan: Plan
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """NLL of each prompt's reference answer by source ([M] nats), and each prompt's domain."""
    stores = {name: StoreReader.open(open_location(run.store_url(name))) for name in run.sources}
    for name, reader in stores.items():
        require_same_source(run, name, reader, plan)
        reader.require_plan(plan)
        reader.require_shards(plan.shards)
    nats: dict[str, np.ndarray[Any, Any]] = {}
    domains: dict[str, str] = {}
    for shard in plan.shards:
        segments = plan.segments(shard)
        by_source = [_segment_nats(reader, shard) for reader in stores.values()]
        for segment in segments:
            if segment.context is None or segment.author is not None:
                continue  # no prompt, or itself an answer of a source
            domains[segment.document_id] = segment.domain
            here = np.array([of_source[segment.index] for of_source in by_source])
            nats[segment.document_id] = nats.get(segment.document_id, 0.0) + here
    if not domains:
        raise MissingError(
            "no text with a prompt before it",
            where=plan.location.url,
            expected="prompts with their given answers",
            hint="inputs with prompt and response, or chats (docs/extraction.md)",
        )
    return nats, domains


def _segment_nats(reader: StoreReader, shard: ShardRecord) -> dict[int, float]:
    """NLL (nats) of each segment by its row in the plan; NaN if a token's is not known."""
    arrays = reader.read(shard.index, _ARRAYS)
    parts = np.split(-arrays["label_logprobs"].astype(np.float64), arrays["token_offsets"][1:-1])
    ids = arrays["segment_ids"].tolist()
    return {index: float(part.sum()) for index, part in zip(ids, parts, strict=True)}


def _best_authors(run: RunConfig) -> dict[str, tuple[str, str]]:
    """Author of the best answer by prompt, and what decided."""
    location = open_location(run.folder)
    where = f"{location.url}/{BEST_ANSWERS}"
    if not location.exists(BEST_ANSWERS):
        raise MissingError("no judged answers", where=where, hint="run `logitfuse judge` first")
    with location.open_read(BEST_ANSWERS) as file, parquet_errors(where, "judge again"):
        table = ParquetFile(file).read(["prompt_id", "author", "settled_by"])
        columns = [table[name].to_pylist() for name in ("prompt_id", "author", "settled_by")]
        return {prompt: (author, by) for prompt, author, by in zip(*columns, strict=True)}


def advantage_table(content: Mapping[str, Any]) -> str:
    """The counts as text tables."""
    lines = ["how often each source is the best (share of prompts)"]
    for domain, by_mode in content["domains"].items():
        heads = [f"{mode} ({by_mode[mode]['of']:,})" for mode in MODES]
        rows = [
            [name, *(_share(by_mode[mode][name], by_mode[mode]["of"]) for mode in MODES)]
            for name in content["sources"]
        ]
        lines += ["", domain, *(f"  {line}" for line in table(["source", *heads], rows))]
    lines.append("")
    if content["agree"] is not None:
        lines.append(f"Both name the same source for {content['agree']:.0%} of the prompts.")
    left = content["unknown"]
    lines += [
        f"Without {what}: {left[key]:,} prompts."
        for key, what in (
            ("likelihood", "a likelihood by every source"),
            ("answer", "a judged answer"),
            ("tie", "one best answer, since no judge tells them apart"),
        )
        if left.get(key)
    ]
    return "\n".join(lines)


def _share(number: int, of: int) -> str:
    return "-" if not of else f"{number:,} ({number / of:.0%})"


def advantage_section(content: Mapping[str, Any]) -> Section:
    """The counts as charts, for the report page."""
    colours = colours_of(content["sources"])
    panels: Panels = []
    for domain, by_mode in content["domains"].items():
        for mode in MODES:
            of = by_mode[mode]["of"]
            bars = [
                Bar(name, share, colours[name], share_of(share))
                for name in content["sources"]
                for share in [by_mode[mode][name] / max(of, 1)]
            ]
            title = f"{domain}, {mode} ({of:,} prompts)"
            panels.append((title, bar_chart(title, bars, unit="share of prompts", top=1.0)))
    text = (
        "How often each source is the best: by the likelihood of the reference answer (training), by "
        "its own answer (inference), and by both."
    )
    return Section("Whose answer", [text], panels=panels)
