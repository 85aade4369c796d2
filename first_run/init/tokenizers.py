"""What the stages will do with each model's tokenizer: BOS, chat template, and whether it is the
target's."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from align.methods.exact import require_same_vocabulary
from extract.corpus.normal_form import reads_nfc
from extract.estimate.models import ModelFacts
from launch.visible import visible
from store_schema.errors import LogitfuseError, MismatchError
from store_schema.text.tokenizer import SegmentTokenizer

TARGET = "target"


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """A model's tokenizer.

    Args:
        name: The model's name in the run.
        tokenizer: The tokenizer; None where it could not be read.
        bos: Tokens put before every text, as text.
        has_template: Whether it has a chat template.
        is_targets: Whether every id stands for the same bytes as in the target; None if not known.
        composes: Whether it converts text to Unicode's composed form (NFC).
        problem: Why it could not be read, as a line.
        notes: What to know about it, a line each.
    """

    name: str
    tokenizer: SegmentTokenizer | None = None
    bos: tuple[str, ...] = ()
    has_template: bool = False
    is_targets: bool | None = None
    composes: bool = False
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int | None:
        """Number of its tokens."""
        return None if self.tokenizer is None else self.tokenizer.vocab_size


def look_at_tokenizers(models: Sequence[ModelFacts]) -> dict[str, TokenizerFacts]:
    """The facts of all tokenizers, by model. Of a hub model only tokenizer files are downloaded.

    Args:
        models: The sources and, under the name "target", the target.
    """
    loaded: dict[str, SegmentTokenizer] = {}
    problems: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    for model in models:
        if model.problem is not None or model.place == "GGUF file":
            continue
        with _warnings() as notes[model.name]:
            try:
                tokenizer = SegmentTokenizer.load(model.ref, name=model.name)
                tokenizer.warn_of_class()
                tokenizer.warn_of_missing_bos()
            except LogitfuseError as error:
                problems[model.name] = error.line()
                continue
        loaded[model.name] = tokenizer
    return {
        model.name: _facts(model, loaded, problems.get(model.name), notes.get(model.name, []))
        for model in models
    }


def _facts(
    model: ModelFacts,
    loaded: Mapping[str, SegmentTokenizer],
    problem: str | None,
    notes: Sequence[str],
) -> TokenizerFacts:
    tokenizer = loaded.get(model.name)
    if tokenizer is None:
        return TokenizerFacts(model.name, problem=problem, notes=tuple(notes))
    bos = tuple(visible(tokenizer.vocabulary.spelling(index)) for index in tokenizer.bos_ids)
    beyond = tokenizer.beyond_rows
    if beyond:
        notes = [
            *notes,
            f"{len(beyond):,} of its tokens have no row in the model: {beyond[0]}, ...",
        ]
    return TokenizerFacts(
        model.name,
        tokenizer,
        bos=bos,
        has_template=tokenizer.chat.text is not None,
        is_targets=_same(tokenizer, loaded.get(TARGET)),
        composes=bool(reads_nfc(model.ref)),
        notes=tuple(notes),
    )


def _same(own: SegmentTokenizer, target: SegmentTokenizer | None) -> bool | None:
    if target is None:
        return None
    try:
        require_same_vocabulary(own.vocabulary, target.vocabulary, where=own.name)
    except MismatchError:
        return False
    return True


def method_for(tokenizers: Mapping[str, TokenizerFacts]) -> str:
    """The alignment that the tokenizers need: `exact` where all are known to have one vocabulary."""
    same = all(t.is_targets is True for t in tokenizers.values())
    return "exact" if same else "bytes"


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(" ".join(record.getMessage().split()))


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Warnings of our own packages while the block runs, instead of on stderr."""
    lines: list[str] = []
    handler = _Lines(lines)
    loggers = [logging.getLogger(name) for name in ("store_schema", "extract")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield lines
    finally:
        for logger, propagates in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagates
