"""The two JSON records of a store: what it holds (manifest.json) and what is finished (commits)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from store_schema import SCHEMA_VERSION, __version__
from store_schema.config import BosRule, StrictModel
from store_schema.fingerprint import fingerprint
from store_schema.layout import EXTRAS, Arrays, Extra, Kind, check_shard
from store_schema.plan.plan import ShardRecord
from store_schema.presets import Encoding

_LAST_VERSION = {
    **{"top_p": 1, "logprob_codec": 1},
    # Since version 4 each commit says which segments it is of: a plan may grow, and be used for other
    # models, without a store becoming another one.
    **{"corpus_fingerprint": 3, "plan_fingerprint": 3, "num_shards": 3},
}
"""Last versions in which a field is part of what makes a store this one."""
_FIRST_VERSION = {"num_shards": 2, "encoding": 2, "ranking_fingerprint": 2, "extras": 3}

_AS_WRITTEN = ("name", "revision", "gguf_file", "bos", "by_offsets")
"""What a model's identity says of the run file: no part of what makes a store this one."""

COMMIT_PATH = r"^data/\d{5,}-[0-9a-f]{16}$"
"""Data paths are relative and never '..': a hostile commit cannot point elsewhere."""


class ModelIdentity(StrictModel):
    """Which model and tokenizer, in a way that a copy elsewhere has too."""

    name: str
    """Folder or hub name as the config gave it: no part of the store's identity, nor are the next
    four. `same_source` compares them where the model itself is not at hand."""
    revision: str | None = None
    gguf_file: str | None = None
    bos: BosRule | None = None
    """None in stores that were made before these four were kept."""
    by_offsets: bool | None = None
    """Written as False; a store that says True is refused (`StoreReader.open`)."""
    model_fingerprint: str | None
    """Config and weights; None where only the tokenizer matters (the target of an alignment)."""
    tokenizer_fingerprint: str
    vocab_size: int = Field(gt=0)
    """Number of ids of the tokenizer; entries lie below it."""


class LogprobCodec(StrictModel):
    """How entry_logprobs are kept, and what that costs."""

    name: Literal["float32"] = "float32"
    error_bound_nats: float = Field(default=0.0, ge=0)
    """Largest difference between a stored and a computed log-probability."""


class Manifest(StrictModel):
    """manifest.json: everything that all shards of a store share. Its fingerprint ties them."""

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    source: str
    """Name of the source in the run."""
    model: ModelIdentity
    """The model the distributions came from."""
    target: ModelIdentity | None = None
    """The target whose tokens an aligned store speaks; None in stores of other kinds."""
    corpus_fingerprint: str
    """Of the corpus that the plan was made from."""
    plan_fingerprint: str
    """Of the plan when the store was last opened for writing; up to version 3 of its only one."""
    num_shards: int | None = Field(default=None, ge=0)
    """Shards of that plan, so that commits are found without a listing; None in version 1."""
    extras: tuple[Extra, ...] = ()
    """Figures kept beside each position, in layout order; none before version 3."""
    estimator: Literal["topk", "sampled"] = "topk"
    """topk: the most probable entries; sampled: an unbiased draw, tail mass 0."""
    top_k: int = Field(gt=0)
    """Entries the engine gave at each position, at most."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Version 1: mass at which entries stop. Later: in `encoding`."""
    temperature: float = Field(default=1.0, gt=0)
    logprob_codec: LogprobCodec | None = None
    """Version 1: float32. Later: in `encoding`."""
    encoding: Encoding | None = None
    """What is kept of each position; exact when not given, None in version 1, which keeps all."""
    ranking_fingerprint: str | None = None
    """Of ids_by_rank.npy; the writer fills it in. None in version 1."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What else shaped the content: engine and dtype, or method and the map's fingerprint."""
    vocabulary_fingerprint: str
    """Of vocabulary.parquet, the byte table of the store's own tokens."""
    created_by: str = f"logitfuse {__version__}"

    @model_validator(mode="before")
    @classmethod
    def _encoding_since_version_2(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("schema_version", SCHEMA_VERSION) != 1:
            return {"encoding": Encoding(), **fields}
        return fields

    @model_validator(mode="after")
    def _content_of_version(self) -> Self:
        if self.extras != tuple(name for name in EXTRAS if name in self.extras):
            raise ValueError(f"extras must stand in this order, each once: {', '.join(EXTRAS)}")
        if self.extras and self.kind == "aligned":
            raise ValueError("aligned stores have no extras")
        if self.schema_version < 3 and (self.extras or self.kind == "generated"):
            raise ValueError("generated stores and extras need schema version 3")
        return self

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary that the store's ids live in."""
        return (self.target or self.model).vocab_size

    def check_shard(self, arrays: Arrays, *, where: str) -> None:
        """Check every invariant of the layout on the decoded arrays of one of the store's shards.

        Raises:
            CorruptionError: The first that does not hold, with its array.
        """
        vocab_size, extras = self.vocab_size, self.extras
        check_shard(self.kind, arrays, vocab_size=vocab_size, where=where, extras=extras)

    def identity(self) -> dict[str, Any]:
        """What two manifests must share to be the same store (all but names and versions)."""
        # Fields that the version does not have stay out, so fingerprints never change.
        foreign = {name for name, last in _LAST_VERSION.items() if self.schema_version > last}
        foreign |= {name for name, first in _FIRST_VERSION.items() if self.schema_version < first}
        content = self.model_dump(mode="json", exclude={"created_by", *foreign})
        for key in ("model", "target"):
            if content[key] is not None:
                content[key] = {k: v for k, v in content[key].items() if k not in _AS_WRITTEN}
        return content

    def fingerprint(self) -> str:
        """Fingerprint of `identity`."""
        return fingerprint(self.identity())

    def request(self) -> dict[str, Any]:
        """`identity` without what the first writer of a store decides: the rank table."""
        return {k: v for k, v in self.identity().items() if k != "ranking_fingerprint"}


class FileRecord(StrictModel):
    """One file of a shard's data as it was written."""

    size: int = Field(ge=0, le=1 << 40)
    """Bytes."""
    crc32c: int = Field(ge=0, lt=1 << 32)


class Counts(StrictModel):
    """Lengths of a shard's axes: what a reader expects before it allocates."""

    segments: int = Field(ge=0)
    positions: int = Field(ge=0)
    entries: int = Field(ge=0)
    spans: int = Field(default=0, ge=0)

    def length(self, axis: str) -> int:
        """Length of an axis of the layout ("D", "N", "E", "S", with "+1" for offsets)."""
        by_letter = {
            "D": self.segments,
            "N": self.positions,
            "E": self.entries,
            "S": self.spans,
        }
        return by_letter[axis[0]] + (1 if axis.endswith("+1") else 0)


class Commit(StrictModel):
    """commits/00012.json: the shard exists because this does. Written last, in one atomic step."""

    schema_version: int = SCHEMA_VERSION
    shard: int = Field(ge=0)
    path: str = Field(pattern=COMMIT_PATH)
    """Folder of the data, relative to the store."""
    store_fingerprint: str
    """The manifest's fingerprint when the shard was written."""
    shard_fingerprint: str
    """The plan's fingerprint of the shard: its segments and their text."""
    first_segment: int | None = Field(default=None, ge=0)
    """Row of the plan's segment table where the shard begins; None before version 4."""
    content_sha256: str
    """Digest of the arrays on disk before compression (version 1: of the arrays of the layout):
    equal for equal content, however it was compressed."""
    files: dict[str, FileRecord]
    counts: Counts
    stats: dict[str, float] = Field(default_factory=dict)
    """Figures of the shard for people and reports (nats, tokens/s); never compared."""
    created_by: str = f"logitfuse {__version__}"

    def is_of(self, shard: ShardRecord) -> bool:
        """Whether it was written from the segments that the plan has for this shard."""
        begins = self.first_segment in (None, shard.start)
        return self.shard_fingerprint == shard.fingerprint and begins
