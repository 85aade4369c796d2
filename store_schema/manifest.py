"""The JSON records of a store: manifest.json, which describes it, and one commit for each shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from store_schema import SCHEMA_VERSION, __version__
from store_schema.config import BosRule, StrictModel
from store_schema.fingerprint import fingerprint
from store_schema.layout import Arrays, Form, Kind, check_shard
from store_schema.plan.plan import ShardRecord
from store_schema.presets import Encoding

_OF_THE_PLAN = ("corpus_fingerprint", "plan_fingerprint", "num_shards")
"""No part of a store's identity: each commit says which segments it is of, so the same store stays
valid when the plan grows, or is made for other models too."""
_ALWAYS_NULL = ("top_p", "logprob_codec")
_AS_WRITTEN = ("name", "revision", "gguf_file", "bos", "by_offsets")
"""Fields of `ModelIdentity` copied from the run file: no part of a store's identity."""

BRANCHES_SETTING = "branches"
"""Key in a manifest's `settings` of a store with branches: how they were chosen, and for which
target's tokenizer."""

COMMIT_PATH = r"^data/\d{5,}-[0-9a-f]{16}$"
"""Data paths are relative and without '..', so a hostile commit cannot point outside the store."""


class ModelIdentity(StrictModel):
    """A model and its tokenizer, by fingerprints that any copy of the model has too."""

    name: str
    """Folder or hub name in the run file: no part of the store's identity, nor are the next four.
    `same_source` compares them where the model itself is not on this machine."""
    revision: str | None = None
    gguf_file: str | None = None
    bos: BosRule | None = None
    """None in stores of versions that did not record it."""
    by_offsets: bool | None = None
    """Of a removed option, in the manifests of existing stores: False or null. A store with True is
    refused (`StoreReader.open`)."""
    model_fingerprint: str | None
    """Of config and weights; None where only the tokenizer matters (the target of an alignment)."""
    tokenizer_fingerprint: str
    vocab_size: int = Field(gt=0)
    """Number of ids of the tokenizer; all ids of entries are below it."""


class Manifest(StrictModel):
    """manifest.json: what all shards of a store have in common. Every commit has its fingerprint."""

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    source: str
    """Name of the source in the run."""
    model: ModelIdentity
    """The model the distributions came from."""
    target: ModelIdentity | None = None
    """The target whose tokens an aligned store has; None in stores of other kinds."""
    corpus_fingerprint: str
    """Of the corpus that the plan was made from."""
    plan_fingerprint: str
    """Of the plan when the store was last opened for writing."""
    num_shards: int | None = Field(default=None, ge=0)
    """Shards of that plan, so that commits are found without a listing; None: not known."""
    extras: tuple[str, ...] = ()
    """Of a removed option, in the manifests of existing stores: always empty. A store that lists extra
    arrays is refused (`require_present_form`)."""
    estimator: Literal["topk", "sampled"] = "topk"
    """topk: the most probable entries; sampled: an unbiased random sample, tail mass 0."""
    top_k: int | None = Field(gt=0)
    """Entries at each position before selection, at most; None in generated stores, which have none."""
    top_p: None = None
    """Always null, like `logprob_codec`: replaced by `encoding`."""
    temperature: float = Field(default=1.0, gt=0)
    logprob_codec: None = None
    encoding: Encoding = Encoding()
    """Which entries are kept at each position, and how precisely."""
    ranking_fingerprint: str | None = None
    """Of ids_by_rank.npy; set by the writer."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """All other settings that determine the content, such as engine and dtype, or the method."""
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
        """Size of the vocabulary of the store's ids: the target's, or the model's own."""
        return (self.target or self.model).vocab_size

    @property
    def form(self) -> Form:
        """Which arrays its shards have."""
        if self.kind == "source" and self.settings.get(BRANCHES_SETTING) is not None:
            return "branched"
        return self.kind

    @property
    def max_entries(self) -> int:
        """Entries at a position, at most; 0 in a generated store."""
        return self.top_k or 0

    def check_shard(self, arrays: Arrays, *, where: str) -> None:
        """Check the decoded arrays of one of the store's shards: see `layout.check_shard`."""
        check_shard(self.form, arrays, vocab_size=self.vocab_size, where=where)

    def identity(self) -> dict[str, Any]:
        """The fields that two manifests of the same store have in common, as JSON-like values."""
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
        """`identity` without the rank table, which the first writer of a store makes."""
        return {k: v for k, v in self.identity().items() if k != "ranking_fingerprint"}


class FileRecord(StrictModel):
    """Size and checksum of one file of a shard, as it was written."""

    size: int = Field(ge=0, le=1 << 40)
    """Bytes."""
    crc32c: int = Field(ge=0, lt=1 << 32)


_COUNT_OF_AXIS = {
    "D": "segments",
    "N": "positions",
    "E": "entries",
    "S": "spans",
    "B": "branches",
    "F": "branch_entries",
}


class Counts(StrictModel):
    """Lengths of a shard's axes, which a reader checks before it allocates memory."""

    segments: int = Field(ge=0)
    positions: int = Field(ge=0)
    entries: int = Field(ge=0)
    spans: int = Field(default=0, ge=0)
    branches: int = Field(default=0, ge=0)
    branch_entries: int = Field(default=0, ge=0)

    @model_serializer(mode="wrap")
    def _without_branches(self, handler: SerializerFunctionWrapHandler) -> dict[str, int]:
        """Commits of stores without branches stay as they were."""
        content: dict[str, int] = handler(self)
        return {k: v for k, v in content.items() if v or not k.startswith("branch")}

    @classmethod
    def of(cls, lengths: Mapping[str, int]) -> Self:
        """From the lengths of axes (`layout.axis_lengths`)."""
        return cls(**{name: lengths.get(axis, 0) for axis, name in _COUNT_OF_AXIS.items()})

    def length(self, axis: str) -> int:
        """Length of an axis of the layout (a letter, with "+1" for offsets)."""
        count: int = getattr(self, _COUNT_OF_AXIS[axis[0]])
        return count + (1 if axis.endswith("+1") else 0)


class Commit(StrictModel):
    """commits/00012.json: a shard is part of its store once it has this file, which is written last and
    atomically."""

    schema_version: int = SCHEMA_VERSION
    shard: int = Field(ge=0)
    path: str = Field(pattern=COMMIT_PATH)
    """Folder of the data, relative to the store."""
    store_fingerprint: str
    """Fingerprint of the store's manifest."""
    shard_fingerprint: str
    """The plan's fingerprint of the shard: its segments and their text."""
    first_segment: int = Field(ge=0)
    """The shard's first row of the plan's segment table."""
    content_sha256: str
    """Digest of the encoded arrays before compression."""
    files: dict[str, FileRecord]
    counts: Counts
    stats: dict[str, float] = Field(default_factory=dict)
    """Figures of the shard for reports (nats, tokens/s); never compared."""
    created_by: str = f"logitfuse {__version__}"

    def matches(self, shard: ShardRecord) -> bool:
        """Whether it was written from the same segments that the plan has for this shard."""
        same = (self.shard_fingerprint, self.first_segment)
        return same == (shard.fingerprint, shard.start)
