"""The two JSON records of a store: what it holds (manifest.json) and what is finished (commits)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from store_schema import SCHEMA_VERSION, __version__
from store_schema.config import BosRule, StrictModel
from store_schema.fingerprint import fingerprint
from store_schema.layout import Arrays, Kind, check_shard
from store_schema.plan.plan import ShardRecord
from store_schema.presets import Encoding

_OF_THE_PLAN = ("corpus_fingerprint", "plan_fingerprint", "num_shards")
"""No part of what makes a store this one: each commit says which segments it is of, so a plan may grow,
and be used for other models, without a store becoming another one."""
_ALWAYS_NULL = ("top_p", "logprob_codec")
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
    """Of the plan when the store was last opened for writing."""
    num_shards: int | None = Field(default=None, ge=0)
    """Shards of that plan, so that commits are found without a listing; None: not known."""
    extras: tuple[str, ...] = ()
    """Always empty: figures beside entries that stores may have had once, which the reader refuses."""
    estimator: Literal["topk", "sampled"] = "topk"
    """topk: the most probable entries; sampled: an unbiased draw, tail mass 0."""
    top_k: int | None = Field(gt=0)
    """Entries the engine gave at each position, at most; None in generated stores, which have none."""
    top_p: None = None
    """Always null, like `logprob_codec`: what they said stands in `encoding`."""
    temperature: float = Field(default=1.0, gt=0)
    logprob_codec: None = None
    encoding: Encoding = Encoding()
    """What is kept of each position."""
    ranking_fingerprint: str | None = None
    """Of ids_by_rank.npy; the writer fills it in."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What else shaped the content: engine and dtype, or method and the map's fingerprint."""
    vocabulary_fingerprint: str
    """Of vocabulary.parquet, the byte table of the store's own tokens."""
    created_by: str = f"logitfuse {__version__}"

    @model_validator(mode="after")
    def _entries_of_kind(self) -> Self:
        if self.top_k is None and self.kind != "generated":
            raise ValueError("top_k is null in generated stores alone")
        return self

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary that the store's ids live in."""
        return (self.target or self.model).vocab_size

    @property
    def max_entries(self) -> int:
        """Entries of a position, at most."""
        return self.top_k or 0

    def check_shard(self, arrays: Arrays, *, where: str) -> None:
        """Check every invariant of the layout on the decoded arrays of one of the store's shards.

        Raises:
            CorruptionError: The first that does not hold, with its array.
        """
        check_shard(self.kind, arrays, vocab_size=self.vocab_size, where=where)

    def identity(self) -> dict[str, Any]:
        """What two manifests must share to be the same store (all but names and versions)."""
        left_out = {"created_by", *_OF_THE_PLAN, *_ALWAYS_NULL}
        content = self.model_dump(mode="json", exclude=left_out)
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
    first_segment: int = Field(ge=0)
    """Row of the plan's segment table where the shard begins."""
    content_sha256: str
    """Digest of the arrays on disk before compression: equal for equal content, however it was
    compressed."""
    files: dict[str, FileRecord]
    counts: Counts
    stats: dict[str, float] = Field(default_factory=dict)
    """Figures of the shard for people and reports (nats, tokens/s); never compared."""
    created_by: str = f"logitfuse {__version__}"

    def is_of(self, shard: ShardRecord) -> bool:
        """Whether it was written from the segments that the plan has for this shard."""
        same = (self.shard_fingerprint, self.first_segment)
        return same == (shard.fingerprint, shard.start)
