"""Small runs whose stores fit their plan: every token is one byte of the segments' real text.

Generated stores have two answers to each prompt, of every ending.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from store_schema.disk.location import Location, open_location
from store_schema.layout import Arrays, Finish, Form
from store_schema.plan.plan import Plan, Segment, ShardRecord, write_plan
from store_schema.presets import PRESETS, Preset
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from store_schema.text.vocabulary import Vocabulary
from tests import command, store_factory
from tests.run_file import write_run_file

VOCABULARY = Vocabulary(
    (b"<s>", *(bytes([byte]) for byte in range(256))), np.arange(257, dtype=np.int64) == 0
)
"""Id 0 is BOS, id b + 1 is byte b."""

TEXTS = (
    ("def add(a, b):\n\treturn a + b\n", "It wasn't amused.", ""),
    ("x = {'key': 1}  # \x00\x1b[31m", "<script>alert(1)</script> \u202e\u2028"),
    ("for i in range(3):\r\n    pass", "漢字かな e\u0301 😀 العربية"),
)
"""Of the segments of each shard; domains take turns."""

DOMAINS = ("code", "prose")

PROMPTS: dict[int, dict[str, Any]] = {
    0: {"prompt": "Write a function\nthat adds. \x1b[31m\u202e<script>"},
    4: {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    },
    5: {"prompt": "Loop"},
    6: {"prompt": "漢字"},
}
"""Contexts by row."""

ANSWERS: dict[int, tuple[tuple[bytes, Finish], tuple[bytes, Finish]]] = {
    0: ((b"It is.\n", Finish.STOP), (b"caf\xc3", Finish.LENGTH)),
    4: ((b"", Finish.EMPTY), (b"<b>\x1b[31m \xff END", Finish.STOP_TEXT)),
    5: ((b"", Finish.PROMPT_TOO_LONG), (b"", Finish.PROMPT_TOO_LONG)),
    6: ((b"\xe6\xbc", Finish.LENGTH), ("Go. 😀".encode(), Finish.STOP)),
}
"""Texts by row; one that ends with STOP or EMPTY has BOS for an end-of-sequence token."""

SETTINGS = MappingProxyType({"answers": 2})
"""Of every manifest; answers to each prompt of a generated store."""


def make_plan(folder: Path) -> Plan:
    """The plan of `TEXTS`."""
    assigned = []
    index = 0
    for texts in TEXTS:
        segments = []
        for text in texts:
            document, size = f"d{index}", len(text.encode())
            domain = DOMAINS[index % len(DOMAINS)]
            context = json.dumps(PROMPTS[index]) if index in PROMPTS else None
            segments.append(
                Segment(
                    index, f"{document}#0", document, domain, "train", 0, size, True, context, text
                )
            )
            index += 1
        tokens = sum(len(text.encode()) for text in texts)
        assigned.append((segments, {"s": tokens, "target": tokens}))
    return write_plan(
        open_location(folder),
        assigned,
        corpus_fingerprint="c" * 32,
        request_fingerprint="r" * 32,
        tokenizers={"s": store_factory.TOKENIZER, "target": store_factory.TOKENIZER},
        settings={"max_tokens": 64},
    )


def shard_arrays(
    plan: Plan,
    shard: int,
    kind: Form = "source",
    *,
    top_k: int = 8,
) -> Arrays:
    """Made-up distributions over the bytes of a shard's texts."""
    segments = plan.segments(plan.shards[shard])
    if kind == "generated":
        prompts = [segment.index for segment in segments if segment.index in ANSWERS]
        return _answer_arrays(prompts, shard)
    texts = [segment.text.encode() for segment in segments]
    made = store_factory.arrays(
        "source" if kind == "branched" else kind,
        [len(text) for text in texts],
        top_k=top_k,
        vocab_size=len(VOCABULARY),
        seed=shard,
    )
    made["segment_ids"] = np.array([segment.index for segment in segments], "<i8")
    made["token_ids"] = np.frombuffer(b"".join(texts), np.uint8).astype("<u4") + 1
    ends = [np.arange(1, len(text) + 1) for text in texts]
    made["byte_ends"] = np.concatenate(ends).astype("<u4")
    if kind == "branched":
        rng = np.random.default_rng(shard)
        made |= store_factory.branches(made, top_k, len(VOCABULARY), rng)
    return made


def _answer_arrays(prompts: list[int], shard: int) -> Arrays:
    ids: list[list[int]] = []
    ends: list[list[int]] = []
    finishes: list[Finish] = []
    for text, finish in [answer for row in prompts for answer in ANSWERS[row]]:
        ended = [0] if finish in (Finish.STOP, Finish.EMPTY) else []
        ids.append([byte + 1 for byte in text] + ended)
        ends.append([*range(1, len(text) + 1), *([len(text)] * len(ended))])
        finishes.append(finish)
    made = store_factory.arrays(
        "generated", [len(part) for part in ids], vocab_size=len(VOCABULARY), seed=shard
    )
    return made | {
        "segment_ids": np.repeat(np.array(prompts, "<i8"), 2),
        "answer_index": np.tile(np.arange(2, dtype="<u4"), len(prompts)),
        "finish": np.array(finishes, "|u1"),
        "token_ids": np.array([token for part in ids for token in part], "<u4"),
        "byte_ends": np.array([end for part in ends for end in part], "<u4"),
    }


def make_writer(
    location: Location,
    plan: Plan,
    kind: Form = "source",
    *,
    preset: Preset = "exact",
    settings: Mapping[str, Any] = SETTINGS,
) -> StoreWriter:
    """A writer of a store of the plan."""
    made = store_factory.manifest(
        kind, vocab_size=len(VOCABULARY), top_k=8, encoding=PRESETS[preset]
    )
    manifest = made.model_copy(
        update={
            "plan_fingerprint": plan.fingerprint,
            "num_shards": len(plan.shards),
            "settings": made.settings | settings,
            "vocabulary_fingerprint": VOCABULARY.fingerprint,
        }
    )
    return StoreWriter.open(location, manifest, VOCABULARY)


def make_run(
    folder: Path,
    *,
    kinds: Collection[Form] = ("source",),
    preset: Preset = "exact",
    settings: Mapping[str, Any] = SETTINGS,
    leave_out: Collection[int] = (),
    change: Mapping[int, Any] | None = None,
    records: Mapping[int, ShardRecord] | None = None,
) -> Path:
    """A run with its plan and stores.

    Args:
        folder: Everything goes below it.
        kinds: Which stores.
        preset: Of their encoding.
        settings: Of their manifests.
        leave_out: Shards that are not written.
        change: By shard, a function that changes its arrays before they are written.
        records: By shard, a record to write it under instead of the plan's.

    Returns:
        The run file.
    """
    plan = make_plan(folder / "run/plan")
    for kind in kinds:
        location = open_location(store_folder(folder, kind))
        writer = make_writer(location, plan, kind, preset=preset, settings=settings)
        for record in plan.shards:
            if record.index in leave_out:
                continue
            arrays = shard_arrays(plan, record.index, kind)
            (change or {}).get(record.index, lambda _: None)(arrays)
            writer.write((records or {}).get(record.index, record), arrays)
    return write_run_file(folder, {"s": "made/s", "target": "made/target"})


def store_folder(folder: Path, kind: Form = "source") -> Path:
    """Where `make_run` puts a store."""
    folders = {"generated": "generated", "aligned": "aligned"}
    return folder / "run" / folders.get(kind, "stores") / "s"


def reader_of(folder: Path, kind: Form = "source") -> StoreReader:
    """The store of a run, read afresh."""
    return StoreReader.open(open_location(store_folder(folder, kind)))


def data_file(folder: Path, shard: int, array: str, kind: Form = "source") -> Path:
    """The chunks of one array of a shard."""
    path = reader_of(folder, kind).commits[shard].path
    return store_folder(folder, kind) / path / array / "c/0"


def flip(path: Path, at: int = 0) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


call = partial(command.call, "store")
ok = partial(command.ok, "store")
refused = partial(command.refused, "store")


def found_wrong(*arguments: object) -> str:
    """Output of a command that must end with exit code 2 after its report."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "error: " not in result.output
    return result.stdout
