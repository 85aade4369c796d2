"""What `logitfuse init` shows: tables for a terminal of 80 columns, or one JSON object."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from extract.config import ExtractSection
from extract.estimate.costs import ALIGNED_TOKENS_PER_S, MOST_TOKENS_PER_S
from extract.estimate.data import DataFacts
from extract.estimate.models import ModelFacts
from first_run.init.findings import Findings
from first_run.init.tokenizers import TARGET, TokenizerFacts
from launch.quantities import count_text, hours_text, money_text, size_text
from launch.visible import cut, table, visible

COLUMNS = 78
"""Of a line that is indented by two in a terminal of 80."""


def report(found: Findings) -> str:
    """Models, tokenizers, data, costs and warnings."""
    parts = [
        ["models", *_indented(_models(found))],
        ["tokenizers", *_indented(_tokenizers(found))],
        ["data", *_indented(line for facts in found.data for line in _data(facts))],
        ["cost", *_indented(_costs(found))],
    ]
    lines = [line for part in parts for line in [*part, ""]]
    for warning in found.warnings():
        lines += wrapped(f"warning: {visible(warning)}")
    return "\n".join(lines).rstrip("\n")


def wrapped(text: str, indent: str = "  ") -> list[str]:
    """A text in lines of 78 columns, those after the first indented; long words stay whole."""
    return textwrap.wrap(
        text, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _indented(lines: Any) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]


def _models(found: Findings) -> list[str]:
    head = ("name", "architecture", "params", "rows", "dtype", "context", "weights")
    return table(head, [_model_row(model) for model in found.models], left=(0, 1, 4))


def _model_row(model: ModelFacts) -> tuple[object, ...]:
    size = "on the hub" if model.place == "hub" else "not here"
    return (
        cut(model.name, 14),
        cut(visible(model.architecture or "?"), 20),
        "?" if model.parameters is None else count_text(model.parameters),
        "?" if model.rows is None else model.rows,
        (model.dtype or "?").replace("bfloat", "bf").replace("float", "fp"),
        "?" if model.context is None else model.context,
        size if model.size_bytes is None else size_text(model.size_bytes),
    )


def _tokenizers(found: Findings) -> list[str]:
    head = ("name", "tokens", "before a text", "chat template", "as the target's")
    rows = [_tokenizer_row(facts) for facts in found.tokenizers.values()]
    said = {
        "exact": "one vocabulary: align.method exact copies distributions",
        "bytes": "several tokenizers, or unknown ones: align.method bytes moves mass by bytes",
    }
    return [*table(head, rows, left=(0, 2, 3, 4)), said[found.method]]


def _tokenizer_row(facts: TokenizerFacts) -> tuple[object, ...]:
    if facts.tokenizer is None:
        return (cut(facts.name, 14), "?", "?", "?", "?")
    same = {True: "yes", False: "no", None: "?"}[facts.is_targets]
    return (
        cut(facts.name, 14),
        facts.size or 0,
        cut(" ".join(facts.bos), 20) or "nothing",
        "yes" if facts.has_template else "none",
        "-" if facts.name == TARGET else same,
    )


def _data(facts: DataFacts) -> list[str]:
    packed = f", {facts.packed}" if facts.packed else ""
    files = "" if facts.files == 1 else f"{facts.files:,} files, "
    about = "" if facts.exact else "about "
    lines = [
        cut(visible(facts.entry.path), COLUMNS),
        f"  {files}{size_text(facts.size_bytes)} of {facts.format}{packed}; {about}{facts.rows:,} rows",
    ]
    shapes = ", ".join(f"{number:,} as {name}" for name, number in facts.shapes.items())
    read = f"first {facts.rows_read:,} rows: {shapes}; {facts.documents:,} documents of "
    lines += wrapped(f"  {read}{size_text(facts.text_bytes)}", "    ")
    columns = ", ".join(facts.columns)
    keys = f" (fields {', '.join(facts.keys)})" if facts.keys else ""
    lines += wrapped(visible(f"  columns read: {columns}{keys}"), "    ")
    if facts.unread:
        unread = ", ".join(f"{name} {number:,}" for name, number in facts.unread.items())
        lines += wrapped(visible(f"  not read: {unread}"), "    ")
    if facts.notes:
        notes = ", ".join(f"{number:,} {what}" for what, number in facts.notes.items())
        lines += wrapped(f"  of chats: {notes}", "    ")
    for clause in facts.found:
        lines += wrapped(visible(f"  {clause}"), "    ")
    return lines


def _costs(found: Findings) -> list[str]:
    costs, rate = found.costs, found.assumed.rate
    head = ("", "tokens", "on disk", "at most", "GPU-hours", "money")
    rows: list[tuple[object, ...]] = [
        (
            f"extract {cut(source.name, 14)}",
            count_text(source.tokens_read),
            size_text(source.bytes),
            size_text(source.most_bytes),
            hours_text(source.gpu_hours),
            money_text(source.gpu_hours, rate),
        )
        for source in costs.sources
    ]
    rows.append(
        ("align", count_text(found.tokens.positions[TARGET]), size_text(costs.aligned_bytes),
         "", "0", "0")
    )  # fmt: skip
    train = costs.train
    rows.append(
        ("train, 2 times", count_text(train.tokens), size_text(train.bytes), "",
         hours_text(train.gpu_hours), money_text(train.gpu_hours, rate))
    )  # fmt: skip
    rows.append(
        ("all", "", size_text(costs.disk_bytes), "", hours_text(costs.gpu_hours),
         money_text(costs.gpu_hours, rate))
    )  # fmt: skip
    free = costs.disk_free_bytes
    lines = table(head, rows)
    if free is not None:
        lines.append(f"free on that disk: {size_text(free)}")
    for text in assumptions(found):
        lines += wrapped(text)
    return lines


def assumptions(found: Findings) -> list[str]:
    """What the costs go by, a sentence each."""
    tokens, costs = found.tokens, found.costs
    unmeasured = [name for name in tokens.positions if name not in tokens.measured]
    entries = ExtractSection().max_entries
    lines = [
        f"Assumed: GPUs that sustain {found.assumed.tflops:g} TFLOP/s (--tflops), at most "
        f"{MOST_TOKENS_PER_S:,.0f} scored tokens/s each; {found.assumed.rate:g} for a GPU-hour "
        "(--rate); 2 FLOP for a parameter and token scored, "
        f"{8 if found.is_large else 6} trained; one pass, fused and control.",
        f"Stores: preset {found.wanted.preset} at {entries} entries as measured in docs/store.md; at "
        "most is before anything is left out or compressed. Training: 3 checkpoints and 2 sets of "
        "weights each.",
        f"Alignment: about {costs.aligned_cpu_hours:.2g} hours of two CPU cores "
        f"({ALIGNED_TOKENS_PER_S:,.0f} tokens/s).",
        f"Tokens: of {tokens.documents:,} documents of the first rows, times the rows of the data.",
    ]
    if unmeasured:
        lines.append(f"4 bytes a token for {', '.join(unmeasured)}: its tokenizer was not used.")
    if costs.train.gpus is not None and costs.train.gpus > 1:
        lines.append(f"The target's training fills at least {costs.train.gpus} GPUs of 80 GB.")
    return lines


def next_steps(found: Findings) -> list[str]:
    """The commands to give next, each with what it does."""
    file = found.wanted.file
    first = found.models[0].name
    train = f"logitfuse train run {file}"
    if (found.costs.train.gpus or 1) > 1:
        count = 1 << (found.costs.train.gpus or 1).bit_length()
        train = f"torchrun --nproc-per-node {min(count, 8)} -m fuse_train run {file}"
    return [
        f"logitfuse doctor {file}  # what would stop it here",
        f"logitfuse corpus build {file}",
        f"logitfuse extract plan {file}  # exact tokens and bytes",
        f"logitfuse store tune {file} --source {first}  # or keep the preset",
        f"logitfuse extract run {file}  # or submit extract, on a cluster",
        f"logitfuse align run {file}",
        train,
    ]


def facts(found: Findings, *, written: bool) -> dict[str, Any]:
    """Everything that was found, for --json.

    Args:
        found: From `find_out`.
        written: Whether the run file was written.
    """
    models = {}
    for model in found.models:
        tokenizer = found.tokenizers[model.name]
        models[model.name] = {
            "model": model.ref.model,
            "revision": model.ref.revision,
            "place": model.place,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "active_parameters": model.active,
            "rows": model.rows,
            "dtype": model.dtype,
            "context": model.context,
            "weights_bytes": model.size_bytes,
            "problem": model.problem,
            "tokenizer": {
                "tokens": tokenizer.size,
                "bos": list(tokenizer.bos),
                "chat_template": tokenizer.has_template,
                "as_target": tokenizer.is_targets,
                "composes_unicode": tokenizer.composes,
                "problem": tokenizer.problem,
            },
        }
    data = []
    for item in found.data:
        values = asdict(item) | {"entry": item.entry.model_dump(mode="json", exclude_defaults=True)}
        data.append({"path": item.entry.path} | values)
    costs = asdict(found.costs) | {
        "disk_bytes": found.costs.disk_bytes,
        "gpu_hours": found.costs.gpu_hours,
        "money": None
        if found.costs.gpu_hours is None
        else found.costs.gpu_hours * found.assumed.rate,
    }
    return {
        "run_file": str(found.wanted.file),
        "written": written,
        "run_dir": found.wanted.run_dir,
        "models": models,
        "align_method": found.method,
        "data": data,
        "tokens": asdict(found.tokens),
        "costs": costs,
        "assumed": asdict(found.assumed),
        "assumptions": assumptions(found),
        "warnings": found.warnings(),
        "next": [step.partition("  #")[0].rstrip() for step in next_steps(found)],
    }
