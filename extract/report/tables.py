"""Tables that the commands show: of the corpus, of the plan and its costs, of the extracted stores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from extract.corpus.corpus import CorpusRecord
from extract.scoring.bos_probe import BosFigures, read_figures
from extract.scoring.score import UNSCORED
from launch.quantities import size_text
from launch.visible import table
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.layout import ENTRY_BYTES, POSITION_BYTES
from store_schema.plan.plan import PlanRecord
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader


def corpus_report(record: CorpusRecord) -> str:
    """Documents and bytes by split and domain, and what was left out and why."""
    rows = [
        (split, domain, number, record.size_bytes[split][domain])
        for split, domains in record.documents.items()
        for domain, number in domains.items()
    ]
    lines = table(["split", "domain", "documents", "bytes"], rows)
    packed = Counter(entry.packed for entry in record.inputs if entry.packed)
    if packed:
        shown = ", ".join(f"{number:,} in {name}" for name, number in sorted(packed.items()))
        lines.append(f"compressed inputs: {shown}")
    lines += _shape_lines(record)
    if record.taken_as:
        shown = ", ".join(
            f"{name} taken as {split} ({number:,} documents)"
            for split, names in record.taken_as.items()
            for name, number in names.items()
        )
        lines.append(f"splits by other names: {shown} (corpus.split_names)")
    if record.left_out:
        shown = ", ".join(f"{name} {number:,}" for name, number in record.left_out.items())
        lines.append(f"left out, by split: {shown}")
    if record.dropped:
        shown = ", ".join(f"{name} {number:,}" for name, number in record.dropped.items())
        lines.append(f"dropped, by reason: {shown}")
    if record.not_nfc:
        lines.append(_normalised(record, record.not_nfc))
    lines.append(f"corpus {record.corpus_fingerprint}, {record.num_documents:,} documents")
    return "\n".join(lines)


def _shape_lines(record: CorpusRecord) -> list[str]:
    """Lines on how rows were read, notes on chats, and columns and fields that were not read."""
    lines = []
    for entry in record.inputs:
        if set(entry.shapes) - {"text"}:
            shown = ", ".join(f"{number:,} rows as {name}" for name, number in entry.shapes.items())
            lines.append(f"{entry.name}: {shown} (corpus.inputs[].chat.format)")
    if record.notes:
        shown = ", ".join(f"{number:,} {what}" for what, number in record.notes.items())
        lines.append(f"of chats: {shown}")
    if record.unread:
        shown = ", ".join(f"{name} {number:,}" for name, number in record.unread.items())
        lines.append(f"not read, values by column or field: {shown}")
    return lines


def _normalised(record: CorpusRecord, number: int) -> str:
    readers = ", ".join(record.nfc_readers)
    if record.unicode == "keep":
        return f"{number:,} documents are not NFC and were kept unchanged (corpus.unicode)"
    reason = f", as the tokenizer of {readers} reads it" if readers else ""
    return f"text of {number:,} documents was normalised to NFC{reason} (corpus.unicode)"


def plan_figures(
    record: PlanRecord, models: Sequence[str], *, entries: int, tokens_per_s: float
) -> dict[str, Any]:
    """Tokens by split and model, and time and disk space that scoring each source will take.

    Args:
        record: The plan's.
        models: Names of the run's sources and "target"; the plan may have more models.
        entries: Maximal entries kept at each position.
        tokens_per_s: The assumed speed.
    """
    splits: dict[str, Any] = {}
    for shard in record.shards:
        split = splits.setdefault(
            shard.split,
            {"shards": 0, "segments": 0, "bytes": 0, "tokens": dict.fromkeys(models, 0)},
        )
        split["shards"] += 1
        split["segments"] += shard.stop - shard.start
        split["bytes"] += shard.num_bytes
        for name in models:
            split["tokens"][name] += shard.num_tokens[name]
    context, sources = record.settings.get("context_tokens", {}), {}
    for name in models:
        if name == "target":
            continue
        positions = sum(split["tokens"][name] for split in splits.values())
        read = positions + context.get(name, 0)
        sources[name] = {
            "positions": positions,
            "tokens_read": read,
            "most_bytes": positions * (POSITION_BYTES + ENTRY_BYTES * entries),
            "hours": read / tokens_per_s / 3600,
        }
    return {
        "shards": len(record.shards),
        "segments": record.num_segments,
        "splits": splits,
        "sources": sources,
        "entries": entries,
        "assumed_tokens_per_s": tokens_per_s,
        "dropped": record.settings.get("dropped", {}),
        "unwritten": record.settings.get("unwritten", {}),
    }


def plan_report(figures: Mapping[str, Any]) -> str:
    """`plan_figures` as text."""
    models = list(next(iter(figures["splits"].values()))["tokens"])
    rows = [
        [name, split["shards"], split["segments"], split["bytes"], *split["tokens"].values()]
        for name, split in figures["splits"].items()
    ]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(rows[0])))])
    lines = table(["split", "shards", "segments", "bytes", *(f"tok {m}" for m in models)], rows)
    lines += ["", *_costs(figures)]
    if figures["dropped"]:
        shown = ", ".join(f"{name} {number:,}" for name, number in figures["dropped"].items())
        lines.append(f"documents dropped, by reason: {shown}")
    for name, kinds in figures["unwritten"].items():
        shown = ", ".join(f"{kind} {number:,}" for kind, number in kinds.items())
        lines.append(f"not written by the chat template of {name}, in all contexts: {shown}")
    return "\n".join(lines)


def _costs(figures: Mapping[str, Any]) -> list[str]:
    costs = [
        [
            name,
            cost["positions"],
            cost["tokens_read"],
            size_text(cost["most_bytes"]),
            f"{cost['hours']:.3g}",
        ]
        for name, cost in figures["sources"].items()
    ]
    return [
        *table(["source", "positions", "tokens read", "on disk, at most", "hours"], costs),
        f"on disk: positions x ({POSITION_BYTES} + {ENTRY_BYTES} x {figures['entries']} entries) bytes "
        "before anything is left out or compressed (`logitfuse store tune` measures that); "
        f"hours: tokens read, context included, at {figures['assumed_tokens_per_s']:,.0f} tokens/s "
        "(plan.assumed_tokens_per_s), one worker",
    ]


@dataclass(frozen=True, slots=True)
class SourceFigures:
    """Figures of a source's store, summed over its commits.

    Args:
        name: The source.
        num_shards: (Finished shards, all shards).
        tokens: Positions.
        tokens_per_s: Mean over the time spent scoring.
        tail_mass: Mean over positions.
        bpb: Bits per byte by split and domain, over the bytes that have a probability.
        size_bytes: On disk.
        bos: Figures with and without BOS if they were measured; see `extract.scoring.bos_probe`.
        segments: Segments of the finished shards.
        unscored: Those of them without a distribution (`extract.on_bad: record`).
    """

    name: str
    num_shards: tuple[int, int]
    tokens: int
    tokens_per_s: float
    tail_mass: float
    bpb: dict[tuple[str, str], float]
    size_bytes: int
    bos: BosFigures | None = None
    segments: int = 0
    unscored: int = 0

    @classmethod
    def read(cls, run: RunConfig, name: str) -> SourceFigures:
        """Read the commits of a source's store."""
        plan = open_plan(run)
        reader = StoreReader.open(open_location(run.store_url(name)))
        commits = {index: reader.commits[index] for index in reader.committed(plan.shards)}
        model = reader.manifest.model
        total: Counter[str] = Counter()
        nats: Counter[tuple[str, str]] = Counter()
        covered: Counter[tuple[str, str]] = Counter()
        tail = 0.0
        for commit in commits.values():
            split = plan.shards[commit.shard].split
            for key, value in commit.stats.items():
                kind, slash, domain = key.partition("/")
                if slash and kind == "nats":
                    nats[split, domain] += value  # type: ignore[assignment]
                elif slash and kind == "bytes":
                    covered[split, domain] += int(value)
            total["seconds"] += commit.stats["seconds"]  # type: ignore[assignment]
            total["size"] += sum(file.size for file in commit.files.values())
            total["tokens"] += commit.counts.positions
            total["segments"] += commit.counts.segments
            total[UNSCORED] += int(commit.stats.get(UNSCORED, 0))
            tail += commit.stats["tail_mass_mean"] * commit.counts.positions
        tokens = total["tokens"]
        return cls(
            name=name,
            num_shards=(len(commits), len(plan.shards)),
            tokens=tokens,
            tokens_per_s=tokens / max(total["seconds"], 1e-9),
            tail_mass=tail / max(tokens, 1),
            bpb={
                key: nats[key] / math.log(2) / covered[key] for key in sorted(nats) if covered[key]
            },
            size_bytes=total["size"],
            bos=read_figures(run, name, model.tokenizer_fingerprint),
            segments=total["segments"],
            unscored=total[UNSCORED],
        )

    def figures(self) -> dict[str, Any]:
        """All of it for JSON."""
        bpb: dict[str, dict[str, float]] = {}
        for (split, domain), value in self.bpb.items():
            bpb.setdefault(split, {})[domain] = value
        done, total = self.num_shards
        shards = {"shards": total, "shards_done": done}
        return {k: v for k, v in asdict(self).items() if k != "num_shards"} | shards | {"bpb": bpb}


def source_report(sources: Sequence[SourceFigures]) -> str:
    """Positions, speed, tail mass, bytes and bits per byte of each source, as text."""
    rows = [
        [
            source.name,
            "{}/{}".format(*source.num_shards),
            source.tokens,
            round(source.tokens_per_s),
            f"{source.tail_mass:.4f}",
            size_text(source.size_bytes),
            f"{source.size_bytes / max(source.tokens, 1):.1f}",
        ]
        for source in sources
    ]
    headers = ["source", "shards", "tokens", "scored/s", "mean tail", "on disk", "bytes/position"]
    keys = sorted({key for source in sources for key in source.bpb})
    bits = [
        [
            split,
            domain,
            *(f"{s.bpb[split, domain]:.4f}" if (split, domain) in s.bpb else "-" for s in sources),
        ]
        for split, domain in keys
    ]
    return "\n".join(
        [
            *table(headers, rows),
            "",
            "bits per byte of each source (a first token without context is not counted):",
            *table(["split", "domain", *(source.name for source in sources)], bits),
            *(
                source.bos.describe(source.name)
                + ("; THE OPPOSITE IS MUCH BETTER" if source.bos.wrong else "")
                for source in sources
                if source.bos is not None
            ),
            *(
                f"{source.name}: {source.unscored:,} of {source.segments:,} segments left unscored "
                "(extract.on_bad)"
                for source in sources
                if source.unscored
            ),
        ]
    )
