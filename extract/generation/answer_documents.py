"""`extract answers`: write generated stores as a JSON lines file for `corpus.inputs`."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from extract.generation.answers import answer_text
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import MismatchError, MissingError, StorageError
from store_schema.layout import Finish
from store_schema.plan.plan import Plan, Segment, ShardRecord
from store_schema.plan.run_plan import open_plan
from store_schema.store.answers import TEXT_ARRAYS, StoredAnswer, read_answers
from store_schema.store.reader import MANIFEST_FILE, StoreReader
from store_schema.store.same_source import require_same_source
from store_schema.text.tokenizer import SegmentTokenizer

WRITTEN = "written"


def write_answers(
    run: RunConfig, names: Sequence[str], out: Path, *, keep_cut: bool
) -> dict[str, Counter[str]]:
    """Write the answers of sources as documents, one JSON object per line; the file is written
    atomically.

    Fields: id, prompt or messages, response, domain, split, source, answer, finish.

    Args:
        run: The run file.
        names: Sources, in order.
        out: The file.
        keep_cut: Whether answers that were cut at `generate.max_tokens` are written too.

    Returns:
        For each source the number of answers written, and of those left out by reason.

    Raises:
        MissingError: A source has no generated store, or not all of its shards.
        MismatchError: A store was made with another plan or tokenizer.
        StorageError: The disk refused.
    """
    plan = open_plan(run)
    stores = [AnswerStore.open(run, name, plan) for name in names]
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    part = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=out.parent, prefix=f".{out.name}-", delete=False
        ) as file:
            part = Path(file.name)
            for store in stores:
                for shard in plan.shards:
                    for line in _documents(store, plan, shard, keep_cut, counts[store.source]):
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(part, out)
    except OSError as error:
        raise StorageError("answers cannot be written", where=out, got=error.strerror) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return counts


@dataclass(frozen=True, slots=True)
class AnswerStore:
    """A source's finished generated store.

    Args:
        source: Name of the source.
        reader: Reader of the store.
        drops_space: Whether the source's tokenizer puts a space before every text, which is not part of
            the answer.
    """

    source: str
    reader: StoreReader
    drops_space: bool

    @classmethod
    def open(cls, run: RunConfig, name: str, plan: Plan) -> Self:
        """The store of a source of the run.

        Raises:
            MissingError: It is not there, or not all of its shards.
            MismatchError: It was made with another plan or tokenizer.
        """
        location = open_location(run.generated_url(name))
        if not location.exists(MANIFEST_FILE):
            raise MissingError(
                f"no store of answers of {name}",
                where=location.url,
                hint="run `logitfuse extract generate` first",
            )
        reader = StoreReader.open(location)
        reader.require_plan(plan)
        require_same_source(run, name, reader, plan)
        reader.require_shards(plan.shards)
        tokenizer = SegmentTokenizer.load(run.sources[name], name=name)
        stored = reader.manifest.model.tokenizer_fingerprint
        if stored != tokenizer.fingerprint:
            raise MismatchError(
                "the store was made with another tokenizer",
                where=reader.location.url,
                expected=tokenizer.fingerprint,
                got=stored,
            )
        return cls(name, reader, tokenizer.puts_space)

    def answers(self, shard: ShardRecord) -> Iterator[tuple[StoredAnswer, str | None]]:
        """Every answer of a shard with its text; None for one that is not valid UTF-8."""
        arrays = self.reader.read(shard.index, TEXT_ARRAYS)
        for answer in read_answers(arrays, self.reader.vocabulary):
            text = answer_text(answer.text, answer.finish)
            if self.drops_space and text is not None:
                text = text.removeprefix(" ")
            yield answer, text


def _documents(
    store: AnswerStore, plan: Plan, shard: ShardRecord, keep_cut: bool, counts: Counter[str]
) -> Iterator[dict[str, object]]:
    segments = plan.segments(shard)
    for answer, text in store.answers(shard):
        reason = left_out(text, answer.finish, keep_cut=keep_cut)
        counts[reason or WRITTEN] += 1
        if reason is None:
            yield _document(segments[answer.row - shard.start], store.source, answer, text)


def left_out(text: str | None, finish: Finish, *, keep_cut: bool) -> str | None:
    """Why no document is made from an answer; None if one is."""
    if finish == Finish.PROMPT_TOO_LONG:
        return "prompt too long"
    if finish == Finish.LENGTH and not keep_cut:
        return "cut"
    if text is None:
        return "no UTF-8"
    if not text.strip():
        return "empty"
    return "NUL" if "\0" in text else None


def _document(
    segment: Segment, source: str, answer: StoredAnswer, text: str | None
) -> dict[str, object]:
    context = json.loads(segment.context or "{}")
    return {
        "id": f"{segment.document_id}/{source}/{answer.number}",
        **{key: context[key] for key in ("prompt", "messages", "tools") if key in context},
        "response": text,
        "domain": segment.domain,
        "split": segment.split,
        "source": source,
        "answer": answer.number,
        "finish": answer.finish.name.lower(),
    }


def answers_report(counts: dict[str, Counter[str]], out: Path) -> str:
    """Lines on the answers written and left out, by source."""
    lines = []
    for name, own in counts.items():
        reasons = [f"{key} {number:,}" for key, number in sorted(own.items()) if key != WRITTEN]
        rest = f"; left out: {', '.join(reasons)}" if reasons else ""
        lines.append(f"{name}: {own[WRITTEN]:,} answers written{rest}")
    total = sum(own[WRITTEN] for own in counts.values())
    return "\n".join([*lines, f"{out}: {total:,} documents"])
