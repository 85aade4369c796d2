"""The figures of `store stats` as text tables."""

from __future__ import annotations

from typing import Any

from launch.visible import table, visible

BAR_COLUMNS = 40
UNKNOWN = "-"


def stats_text(stats: dict[str, Any]) -> str:
    """All figures of one store."""
    parts = [_head(stats), _array_table(stats)]
    if stats["kind"] == "generated":
        parts += [_answer_table(stats), _finish_line(stats["finishes"])]
    else:
        parts += [_entry_bars(stats), _mass_lines(stats), _domain_table(stats)]
    if "origins" in stats:
        parts.append(_origin_line(stats["origins"]))
    return "\n\n".join(filter(None, parts))


def _head(stats: dict[str, Any]) -> str:
    planned = stats["shards_planned"]
    shards = f"{stats['shards']:,}" + ("" if planned is None else f" of {planned:,}")
    entries = "" if stats["kind"] == "generated" else f"{stats['entries']:,} entries, "
    bits = [
        f"{visible(stats['name'])}: {stats['kind']} store of {visible(stats['source'])}, "
        f"schema version {stats['schema_version']}, vocabulary of {stats['vocab_size']:,}",
        f"{shards} shards, {stats['segments']:,} segments, {stats['positions']:,} positions, "
        f"{entries}{stats['size_bytes'] / 1e6:,.1f} MB",
    ]
    if stats["shards_read"] < stats["shards"]:
        bits.append(
            f"sizes are of all shards; what follows them was read from {stats['shards_read']} "
            f"({stats['positions_read']:,} positions)"
        )
    return "\n".join(bits)


def _array_table(stats: dict[str, Any]) -> str:
    positions, total = stats["positions"], stats["size_bytes"]
    rows = [
        (
            name,
            f"{size:,}",
            _number(size / positions if positions else None, 3),
            _percent(size / total if total else None),
        )
        for name, size in [*stats["array_bytes"].items(), ("all", total)]
    ]
    return "\n".join(table(("array", "bytes", "bytes/position", "share"), rows))


def _entry_bars(stats: dict[str, Any]) -> str:
    entries = stats["entries_per_position"]
    buckets = entries["histogram"]
    total = max(stats["positions_read"], 1)
    most = max((bucket["positions"] for bucket in buckets), default=1) or 1
    rows = []
    for bucket in buckets:
        first, last = bucket["from"], bucket["to"]
        label = f"{first}" if first == last else f"{first}-{last}"
        share = _percent(bucket["positions"] / total)
        rows.append((label, share, "#" * -(-bucket["positions"] * BAR_COLUMNS // most)))
    bars = table(("entries", "share", ""), rows, left=(2,))
    return "\n".join([f"entries per position: {_number(entries['mean'], 2)} on average", *bars])


def _mass_lines(stats: dict[str, Any]) -> str:
    kept = stats["kept_mass"]
    return (
        f"kept mass, of positions with entries: {_number(kept['mean'], 4)} on average; "
        f"percentiles 5: {_number(kept['p5'], 4)}, 50: {_number(kept['p50'], 4)}, "
        f"95: {_number(kept['p95'], 4)}"
    )


def _answer_table(stats: dict[str, Any]) -> str:
    rows = [
        (visible(name), f"{figures['positions']:,}", f"{figures['bytes']:,}")
        for name, figures in stats["domains"].items()
    ]
    return "\n".join(table(("domain", "positions", "bytes"), rows))


def _domain_table(stats: dict[str, Any]) -> str:
    aligned = stats["kind"] == "aligned"
    head = ["domain", "positions", "with entries", "entropy", "label bpb", "of bytes"]
    more = {"source_bpb": "source bpb"} if aligned else {}
    head += more.values()
    rows = []
    for name, figures in stats["domains"].items():
        bpb = "inf" if figures["impossible_labels"] else _number(figures["label_bpb"], 4)
        row = [
            visible(name),
            f"{figures['positions']:,}",
            _percent(figures["covered"]),
            _number(figures["entropy_nats_per_position"], 3),
            bpb,
            _percent(figures["label_bytes_share"]),
        ]
        rows.append(row + [_number(figures[column], 4) for column in more])
    notes = (
        "entropy: nats per position with entries, the tail taken as one token, so a lower bound; "
        "not\ncomparable across tokenizers. label bpb: bits per byte of the labels whose "
        "probability is known,\nwhich cover that share of the bytes"
    )
    notes += ". source bpb: the source's own, on its own tokens." if aligned else "."
    if any(figures["impossible_labels"] for figures in stats["domains"].values()):
        notes += "\ninf: a label has probability 0."
    return "\n".join([*table(head, rows), notes])


def _finish_line(finishes: dict[str, int]) -> str:
    total = sum(finishes.values())
    if not total:
        return ""
    parts = [
        f"{count:,} {name.replace('_', ' ')} ({_percent(count / total)})"
        for name, count in finishes.items()
        if count
    ]
    return f"{total:,} answers ended: {', '.join(parts)}"


def _origin_line(origins: dict[str, float]) -> str:
    covered = 1 - origins["none"]
    return (
        f"coverage: {_percent(covered)} of positions, {_percent(origins['boundary'])} start where "
        f"a source token starts, {_percent(origins['inside'])} inside one"
    )


def _number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"
