"""The one error tree. Each error a user can cause ends in one clear line and exit code 2.

LogitfuseError                an Exception
|-- ConfigError             the run file, an option, or an environment that cannot work
|-- InputError              text or documents that cannot be used as they are
|-- ModelError              a model folder or hub name that cannot be loaded, or that misbehaves
|-- TokenizerError          a tokenizer whose bytes are unknown or do not join to the text
|   |-- NoRowError          a text reaches a token that the model has no row for
|   `-- NoSpanError         a chat template does not write a response as it stands
|-- StoreError              anything on disk that is not what the contract says
|   |-- MissingError        not there (yet): run the stage before
|   |-- MismatchError       made from another config, plan, model or tokenizer
|   |-- SchemaVersionError  written by a newer or an earlier logitfuse
|   `-- CorruptionError     bytes changed, missing or cut
`-- StorageError            the disk or the object store refused (full, denied, gone)

Stopped                       asked to stop by a signal; exit code 143, rerun to go on
`-- StoppedMidway             the same after something was finished; exit code 75

A stop is no Exception, as KeyboardInterrupt is none: a signal that comes while a library's code runs
must not be taken for whatever that code raises when a file is damaged.
"""

from __future__ import annotations


class OneLine(BaseException):
    """What is told in one line: what, where, expected, got, what to do next.

    Args:
        what: The fact that is wrong, as a short clause.
        where: File, store, shard, option or position.
        expected: What would have been right.
        got: What was found.
        hint: The next thing to do.
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
    """An error that a user can cause or mend."""


class ConfigError(LogitfuseError):
    """The run file or an option is wrong."""


class InputError(LogitfuseError):
    """A document, a text or a column cannot be used."""


class ModelError(LogitfuseError):
    """A model cannot be loaded, or gives what a model must not give (NaN, wrong vocabulary)."""


class TokenizerError(LogitfuseError):
    """A tokenizer's bytes are unknown, or its tokens do not join to the text."""


class NoRowError(TokenizerError):
    """A text reaches a token of the tokenizer's that the model has no row for."""


class NoSpanError(TokenizerError):
    """What a chat template writes does not hold a response as it stands."""


class StoreError(LogitfuseError):
    """Something on disk is not what the contract says."""


class MissingError(StoreError):
    """A plan, store, shard or file is not there."""


class MismatchError(StoreError):
    """Two things that must be made from the same input are not."""


class SchemaVersionError(StoreError):
    """Written by a newer or an earlier version than this reader's."""


class CorruptionError(StoreError):
    """Bytes are changed, missing or cut."""


class StorageError(LogitfuseError):
    """The disk or object store refused: full, denied or gone."""


class Stopped(OneLine):
    """A signal asked the stage to stop; what was in hand is dropped, what is committed stays."""

    exit_code = 143


class StoppedMidway(Stopped):
    """Stopped after something was finished in this run: run again, as EX_TEMPFAIL says.

    A scheduler's script may do so by itself: each run gets further, so it comes to an end.
    """

    exit_code = 75
