"""All error classes. An error that a user can cause ends in one line and exit code 2.

LogitfuseError                an Exception
|-- ConfigError             the run file, an option or the environment is wrong
|-- InputError              text or documents that cannot be used as they are
|-- ModelError              a model that cannot be loaded, or whose outputs are wrong
|-- TokenizerError          a tokenizer whose tokens' bytes are unknown or do not join to the text
|   |-- NoRowError          a text has a token that the model has no embedding row for
|   `-- NoSpanError         a chat template changes a response, so that it is not in the rendered text
|-- StoreError              a file on disk that is not as its format says
|   |-- MissingError        not there (yet): run the stage that makes it first
|   |-- MismatchError       made from another config, plan, model or tokenizer
|   |-- SchemaVersionError  written by a newer or an earlier logitfuse
|   `-- CorruptionError     bytes changed, missing or cut
`-- StorageError            the disk or the object store refused (full, denied, gone)

Stopped                       stopped by a signal; exit code 143, rerun to continue
`-- StoppedMidway             the same after some work was committed; exit code 75

Like KeyboardInterrupt, Stopped is not an Exception: raised by a signal inside a library's code, it must
not be caught by a handler of that library's errors.
"""

from __future__ import annotations


class OneLine(BaseException):
    """Base of exceptions with a message of one line: what, where, expected, got, what to do next.

    Args:
        what: What is wrong, as a short clause.
        where: File, store, shard, option or position.
        expected: The right value.
        got: The actual value.
        hint: What to do next.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        expected: object | None = None,
        got: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.hint = hint
        super().__init__(self.line())

    def line(self) -> str:
        """The whole message on one line (newlines in quoted input become spaces)."""
        text = self.what
        if self.where is not None:
            text += f" in {self.where}"
        facts = []
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if self.got is not None:
            facts.append(f"got {self.got}")
        if facts:
            text += ": " + ", ".join(facts)
        if self.hint is not None:
            text += f"; {self.hint}"
        return " ".join(text.split())


class LogitfuseError(OneLine, Exception):
    """An error that a user can cause or fix."""


class ConfigError(LogitfuseError):
    """The run file or an option is wrong."""


class InputError(LogitfuseError):
    """A document, a text or a column cannot be used."""


class ModelError(LogitfuseError):
    """A model cannot be loaded, or its outputs are wrong (NaN, another vocabulary)."""


class TokenizerError(LogitfuseError):
    """A tokenizer's bytes are unknown, or its tokens do not join to the text."""


class NoRowError(TokenizerError):
    """A text has a token that the model has no embedding row for."""


class NoSpanError(TokenizerError):
    """A chat template changes a response, so that it cannot be located in the rendered text."""


class StoreError(LogitfuseError):
    """A file on disk is not as its format says."""


class MissingError(StoreError):
    """A plan, store, shard or file is not there."""


class MismatchError(StoreError):
    """Two files that must be made from the same input are not."""


class SchemaVersionError(StoreError):
    """A file was written by a newer or an earlier version than this one."""


class CorruptionError(StoreError):
    """Bytes are changed, missing or cut."""


class StorageError(LogitfuseError):
    """The disk or object store refused: full, denied or gone."""


class Stopped(OneLine):
    """A signal asked the stage to stop: unfinished work is dropped, committed work stays."""

    exit_code = 143


class StoppedMidway(Stopped):
    """Stopped after some work was committed (EX_TEMPFAIL): run the command again.

    A scheduler's script may repeat it automatically: each repetition makes progress, so it ends.
    """

    exit_code = 75
