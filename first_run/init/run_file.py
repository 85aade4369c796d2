"""The run file as text: what was found, and why each value is what it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from extract.config import ExtractSection
from extract.estimate.costs import MOST_TOKENS_PER_S
from extract.estimate.models import ModelFacts
from first_run.init.findings import Findings
from first_run.init.tokenizers import TARGET, TokenizerFacts
from launch.quantities import count_text
from launch.visible import visible
from store_schema.config import ModelRef, RunConfig, parse_run
from store_schema.errors import ConfigError, StorageError
from store_schema.paths import written_path
from store_schema.yaml_file import OnceLoader

BATCH_TOKENS = 16_384
"""Tokens of a micro-batch of a large target, at most."""
_SMALL = 100_000_000
_HEAD = (
    "# Written by `logitfuse init` from a look at the models and first rows of the data. Every key:",
    "# docs/reference/configuration.md. Keys that are not here have the defaults of that page.",
)


def run_file_text(found: Findings) -> str:
    """The run file, with comments.

    Args:
        found: From `find_out`.
    """
    wanted = found.wanted
    lines = [*_HEAD, "", f"name: {_value(wanted.name)}"]
    if wanted.run_dir != f"runs/{wanted.name}":
        lines.append(f"run_dir: {_value(written_path(wanted.run_dir))}  # all outputs")
    lines += ["seed: 0", "", "sources:  # models whose distributions are fused"]
    for model in found.models[:-1]:
        word = wanted.sources[model.name] is wanted.target
        lines += _model(model, found.tokenizers[model.name], is_target=word, indent="  ")
    lines += ["", *_model(found.target, found.tokenizers[TARGET], indent="")]
    lines += ["", *_corpus(found), "", *_plan(found), "", *_stores(found), "", *_train(found)]
    lines += ["", "evaluate:", "  split: test  # bits per byte of target, control, fused, sources"]
    return "\n".join(lines) + "\n"


def _model(
    model: ModelFacts, tokenizer: TokenizerFacts, *, is_target: bool = False, indent: str
) -> list[str]:
    shape = [model.architecture]
    if model.parameters is not None:
        shape.append(f"{count_text(model.parameters)} parameters")
    if model.context is not None:
        shape.append(f"context {model.context:,}")
    known = ", ".join(part for part in shape if part)
    if is_target:
        return [f"{indent}{model.name}: target  # as it is before training"]
    lines = [f"{indent}{model.name}:" + (f"  # {visible(known)}" if known else "")]
    values: dict[str, Any] = model.ref.model_dump(mode="json", include=set(_OWN_KEYS))
    default = ModelRef(model="x").model_dump(mode="json")
    for key in _OWN_KEYS:
        if key == "model" or values[key] != default[key]:
            lines.append(f"{indent}  {key}: {_value(values[key])}")
    if model.place == "hub" and values["revision"] is None:
        lines.append(f"{indent}  # revision: the commit, so that a store stays of this model")
    if tokenizer.tokenizer is not None and not tokenizer.has_template:
        lines.append(f"{indent}  # template: {{file: chat.jinja}}  # it has none; chats need one")
    return lines


_OWN_KEYS = ("model", "gguf_file", "revision", "dtype")


def _corpus(found: Findings) -> list[str]:
    lines = ["corpus:", "  inputs:"]
    for facts in found.data:
        shown = ", ".join(f"{number:,} {name}" for name, number in facts.shapes.items())
        about = "" if facts.exact else "about "
        lines.append(f"    # {about}{facts.rows:,} rows; of the first {facts.rows_read:,}: {shown}")
        lines.append(f"    - path: {_value(written_path(facts.entry.path))}")
        entry = facts.entry.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)
        lines += [f"      {key}: {_value(value)}" for key, value in entry.items()]
        lines += [f"      # {visible(clause)}" for clause in facts.found]
    dropped = _sum(facts.dropped for facts in found.data) | found.tokens.dropped
    if dropped:
        shown = ", ".join(f"{reason} {number:,}" for reason, number in dropped.items())
        lines.append(f"  on_bad: drop  # counted; in the rows looked at: {shown}")
    else:
        lines.append(
            "  on_bad: error  # no such row was seen; drop leaves them out and counts them"
        )
    if any("reasoning" in key or "think" in key for facts in found.data for key in facts.keys):
        lines.append("  thoughts: context  # train: each is a response of its own; drop: left out")
    return lines


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for key, number in part.items():
            total[key] = total.get(key, 0) + number
    return total


def _plan(found: Findings) -> list[str]:
    tokens = found.tokens
    lines = ["plan:", f"  max_tokens: {tokens.max_tokens}  # of a segment with its context"]
    speeds = [s.tokens_per_s for s in found.costs.sources if s.tokens_per_s is not None]
    if speeds and min(speeds) < MOST_TOKENS_PER_S:
        speed = round(min(speeds))
        reason = f"the largest source at {found.assumed.tflops:g} TFLOP/s; an assumption"
        lines.append(f"  assumed_tokens_per_s: {speed}  # {reason}")
    return lines


def _stores(found: Findings) -> list[str]:
    section = ExtractSection()
    why = {
        "exact": "every model has the target's vocabulary: distributions are copied",
        "bytes": "the models have several tokenizers, or not all are known",
    }[found.method]
    return [
        "extract:",
        f"  engine: {section.engine}  # vLLM; on a machine without a GPU perhaps transformers",
        f"  top_k: {section.top_k}  # entries from the engine; section store says which are kept",
        "",
        "store:",
        f"  preset: {found.wanted.preset}  # exact, fine, compact, tiny: see `logitfuse store tune`",
        "",
        "align:",
        f"  method: {found.method}  # {why}",
    ]


def _train(found: Findings) -> list[str]:
    size, gpus = found.target.parameters, found.costs.train.gpus
    rate = "0.00001" if found.is_large else "0.001" if (size or 0) < _SMALL else "0.0001"
    lines = [
        "train:",
        "  selector: asn  # which source to trust where; `logitfuse train --help`",
        "  clm_weight: 0.3  # of ground truth; the rest is the fusion loss",
        f"  lr: {rate}  # for a target of this size; the control can have another one",
        "  epochs: 1",
        "  batch_segments: 32",
    ]
    if found.is_large:
        at_a_time = max(1, min(32, BATCH_TOKENS // found.tokens.max_tokens))
        lines.append(
            f"  micro_batch_segments: {at_a_time}  # {at_a_time * found.tokens.max_tokens:,} tokens"
        )
        lines.append("  gradient_checkpointing: true  # less memory, a third more time")
    if gpus is not None and gpus > 1:
        lines.append(f"  parallel: fsdp2  # its training fills at least {gpus} GPUs of 80 GB")
    return lines


def _value(value: object) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20)
    return text.removesuffix("...\n").strip()


def parsed(text: str, file: Path) -> RunConfig:
    """The run file's content, checked as every stage checks it.

    Raises:
        ConfigError: A value is refused.
    """
    return parse_run(OnceLoader(text).get_single_data(), where=file)


def write_run_file(text: str, file: Path) -> None:
    """Write the run file where there is none.

    Raises:
        ConfigError: There is one by now.
        StorageError: It cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise ConfigError(
            "there is a run file already, which stays as it is", where=file
        ) from error
    except OSError as error:
        raise StorageError("run file cannot be written", where=file, got=error.strerror) from error
