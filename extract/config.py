"""The sections `corpus`, `plan` and `extract` of the run file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from extract.branch_config import BranchOptions
from extract.chat_config import ChatInput
from extract.engine_kinds import ENGINES
from extract.engine_kinds.kind import Device
from store_schema.config import SectionModel, StrictModel
from store_schema.model.model_check import Loader
from store_schema.paths import PathText

CPU_STEP_TOKENS, GPU_STEP_TOKENS = 256, 2_048
"""Defaults of tokens in one step of vLLM."""
CPU_HEAD_ROWS, GPU_HEAD_ROWS = 256, 1_024
"""Defaults of logit rows at a time in the transformers engine."""
CPU_BATCH_TOKENS, BATCH_TOKENS = 1_024, 4_096
"""Defaults of tokens in one forward pass of it, to score on a CPU and else."""
LEAST_TEMPERATURE = 0.01
"""Lowest sampling temperature; below it sampling is the same as taking the most probable token."""

MIN_TEXT_TOKENS = 8
"""Tokens that a context must leave for text: enough for any character in any byte-complete
tokenizer."""

Thoughts = Literal["context", "train", "drop"]
UnicodeForm = Literal["nfc", "keep"]


class Columns(StrictModel):
    """Columns of an input. A column named here must exist; a default column may be missing."""

    id: str | None = None
    """Document id. None: column "id" when there is one, else file name and row."""
    text: str | None = None
    """Plain text. None: column "text", unless messages or prompt and response are given."""
    messages: str | None = None
    """List of messages, in any format that docs/extraction.md lists. Each assistant turn becomes a
    document; but if the last turn is not the assistant's and there is a column "response", only that
    does. None: column "messages", "conversations" and others."""
    prompt: str | None = None
    """Context of the response: text or messages. None: column "prompt"."""
    response: str | None = None
    """Text after the prompt, or one message. None: column "response" or "completion"."""
    system: str | None = None
    """System turn before the messages. None: column "system", "system_prompt" or Gemini's
    "systemInstruction"."""
    tools: str | None = None
    """Schemas of the tools that a chat may call. None: column "tools" or "functions"."""
    domain: str | None = None
    """Domain. None: column "domain", unless the input has a constant one."""
    author: str | None = None
    """Name of the source that wrote the text as an answer (selector author), such as column "author" of
    `judge`'s best.parquet. None: no author."""
    split: str | None = None
    """Split. None: column "split" when there is one, else assigned by `split_fractions`."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response must be mapped together or not at all")
        forms = [self.text, self.messages, self.prompt]
        if sum(form is not None for form in forms) > 1:
            raise ValueError("map one of text, messages, or prompt and response")
        return self


class CorpusInput(StrictModel):
    """One file, glob of files, or saved `datasets` folder."""

    path: PathText = Field(min_length=1)
    """File, glob ("data/**/*.jsonl") or folder of `Dataset.save_to_disk`."""
    format: Literal["auto", "jsonl", "parquet", "text", "datasets"] = "auto"
    """How to read it; auto goes by the name's ending."""
    columns: Columns = Columns()
    """Names of the columns where they differ from the defaults."""
    corpus: str | None = Field(default=None, min_length=1)
    """Name of its documents for stages of training (`train.stages`); inputs may have the same name."""
    domain: str | None = Field(default=None, min_length=1)
    """Domain of every document of this input, instead of a column."""
    split: str | None = Field(default=None, min_length=1)
    """Split of every document of this input, instead of a column."""
    ids: Literal["column", "file", "place"] = "column"
    """Ids of documents: the id column; file: the file's name and the id column, for files that each
    count from 0; place: file name and row number."""
    prompt_as: Literal["text", "chat"] = "text"
    """Whether a prompt is plain text before the response, or a user turn in each model's chat
    template."""
    chat: ChatInput = ChatInput()
    """How chats are read, for formats that are not recognised."""

    def content(self) -> dict[str, Any]:
        """The fields that determine its documents, for fingerprints. Fields of later versions are
        included only if they are set."""
        content = self.model_dump(mode="json", exclude={"path"})
        if self.corpus is None:
            del content["corpus"]
        if self.columns.author is None:
            del content["columns"]["author"]
        return content

    @model_validator(mode="after")
    def _constant_or_column(self) -> Self:
        for name in ("domain", "split"):
            if getattr(self, name) is not None and getattr(self.columns, name) is not None:
                raise ValueError(f"{name} is given both as a constant and as a column")
        if self.ids == "place" and self.columns.id is not None:
            raise ValueError("ids: place does not use the id column: remove columns.id")
        return self


KNOWN_SPLITS = {
    "training": "train",
    **dict.fromkeys(("validation", "val", "dev", "eval"), "valid"),
}
"""Names of the splits train and valid in published datasets."""


class CorpusSection(SectionModel):
    """How text becomes documents."""

    inputs: tuple[CorpusInput, ...] = ()
    """Inputs, read in this order."""
    splits: tuple[str, ...] = Field(default=("train", "valid", "test"), min_length=1)
    """Splits of the corpus. Documents of other splits are left out and counted."""
    split_names: dict[str, str] = Field(default=KNOWN_SPLITS)
    """Renames splits, in the data and in this section; renamed documents are counted and reported. {}
    renames none."""
    split_fractions: dict[str, float] = Field(
        default={"train": 0.9, "valid": 0.05, "test": 0.05}, min_length=1
    )
    """Shares of the splits for documents without one, which are assigned by a seeded hash of their
    id."""
    on_bad: Literal["error", "drop"] = "error"
    """What to do with a document that cannot be used: stop, or drop it and count the reason."""
    unicode: UnicodeForm | None = None
    """nfc: text is converted to Unicode's composed normal form (NFC) for all models. keep: it is not.
    None: nfc if a tokenizer of the run converts text itself (Qwen's), else keep."""

    thoughts: Thoughts = "context"
    """What is done with reasoning that messages have in a field of its own. context: it is context of
    the answer, if a model's template renders it; train: it is also a response of its own; drop: it is
    left out."""

    def split_name(self, name: str) -> str:
        """The split's name in the corpus."""
        return self.split_names.get(name, name)

    @property
    def wanted_splits(self) -> frozenset[str]:
        """The splits of the corpus."""
        return frozenset(map(self.split_name, self.splits))

    @field_validator("split_fractions")
    @classmethod
    def _shares(cls, fractions: dict[str, float]) -> dict[str, float]:
        if any(not 0 <= share <= 1 for share in fractions.values()):
            raise ValueError("each share must be in [0, 1]")
        if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"shares must sum to 1, not {sum(fractions.values()):g}")
        return fractions


class PlanSection(SectionModel):
    """How documents are split into segments, and segments assigned to shards."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"assumed_tokens_per_s"})

    max_tokens: int = Field(default=1024, ge=2 * MIN_TEXT_TOKENS, le=1 << 20)
    """Largest segment in tokens of any model, with its context (BOS, prompt)."""
    shard_tokens: int = Field(default=131_072, ge=1)
    """Approximate target tokens in a shard, the unit of work, commit and shuffling."""
    assumed_tokens_per_s: float = Field(default=5000.0, gt=0, allow_inf_nan=False)
    """Scoring speed of one worker, for the hours in the cost estimate."""


if TYPE_CHECKING:
    EngineOptions = SectionModel
else:
    EngineOptions = ENGINES.with_options(SectionModel)


class ExtractSection(EngineOptions):
    """How sources are scored.

    An engine with options (extract/engine_kinds/) has a field here, named like the engine.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "device",
            "head_rows",
            "batch_tokens",
            "max_num_batched_tokens",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "gpu_memory_utilization",
            "tap",
            "queue_mib",
            "kv_cache_gib",
            "threads",
            "on_bad",
        }
    )

    engine: Annotated[str, ENGINES.choice_or("auto")] = "auto"
    """What runs the model: an engine listed in extract/engine_kinds/__init__.py. vllm and transformers
    give the same to about 1e-5 nats. auto: the engine that the store was begun with; else transformers
    where only it can do the work (sampled, `device: cpu`) and for bf16 and fp16 models with a float32
    head on a machine without a GPU, and vLLM for all others."""
    top_k: int = Field(default=64, ge=1, le=1 << 17)
    """topk: entries that the engine returns at each position; section `store` says which are kept."""
    estimator: Literal["topk", "sampled"] = "topk"
    """topk: the most probable entries, the rest in the tail. sampled: an unbiased random sample of the
    whole distribution, no tail; needs the transformers engine."""
    draws: int = Field(default=12, ge=1, le=1024)
    """sampled: draws at each position; equal draws are one entry."""
    sampled_head: int = Field(default=0, ge=0, le=1 << 17)
    """sampled: the most probable entries that are kept exactly; draws are then from the others."""
    branches: BranchOptions | None = None
    """Rows after entries that are not the real token, for alignment; needs the transformers engine.
    None: none."""
    fp32_head: bool = True
    """Compute the logits of bf16 and fp16 models in float32: in bf16 about 30 logits of a row are
    equal."""
    quantization: str | None = Field(default=None, min_length=1)
    """vllm: how weights are quantised on loading, by vLLM's name ("fp8", "bitsandbytes"). None
    follows the checkpoint."""
    device: Device = "auto"
    """Device of the transformers engine (vLLM's device is that of its installed build)."""
    head_rows: int | None = Field(default=None, ge=1)
    """transformers: rows of logits in memory at a time. A row takes 8 bytes per id, 16 if it is
    sampled. None: 256 on a CPU, 1,024 on a GPU."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """transformers: tokens of one forward pass, with padding. None: 4,096; 1,024 to score on a CPU,
    where what is computed between two layers then stays in its cache."""
    tap: bool = True
    """vllm: take prompt log-probabilities as arrays from inside vLLM, if its internals are as expected;
    otherwise, or if false, as the lists of its public interface. The values are identical."""
    queue_mib: int = Field(default=256, ge=1)
    """MiB of scored rows that may wait to be encoded and written; scoring waits when it is full."""
    max_num_batched_tokens: int | None = Field(default=None, ge=16)
    """vllm: tokens of one step, whose logits are all in memory at once. None: 256 on a CPU, 2,048 on
    a GPU (3 GiB at 128k ids)."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """vllm: GPUs that share one model."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """vllm: groups of layers that a model is split into, on `tensor_parallel_size` GPUs each."""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, lt=1)
    """vllm: share of the GPU's memory for weights and KV cache; prompt log-probabilities need more."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """vllm on a CPU: GiB of its KV cache."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads. None: the libraries' default."""
    on_bad: Literal["error", "record"] = "error"
    """What happens to a segment that cannot be scored: the model gives NaN, or it is longer than the
    model can read. error: the run ends. record: it is kept without a distribution and counted."""

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        if self.branches is not None and self.estimator == "sampled":
            raise ValueError("branches need the most probable entries, not estimator sampled")
        if self.branches is not None and self.branches.per_position > self.top_k:
            raise ValueError(
                f"branches.per_position is {self.branches.per_position:g}, but a position has at "
                f"most top_k: {self.top_k} entries"
            )
        if self.engine != "auto":
            ENGINES[self.engine].check(self)
        elif self.needs_one:
            next(kind for kind in ENGINES if kind.can_serve(self)).check(self)
        return self

    def content(self) -> dict[str, Any]:
        """See `SectionModel.content`. Has `extras: []` too, so that existing stores keep their
        fingerprints; in a run file this removed option is refused."""
        left_out = ENGINES.left_out(self.engine)
        kept = {name: value for name, value in super().content().items() if name not in left_out}
        if self.branches is None:
            del kept["branches"]  # as before there were any
        return kept | {"extras": []}

    @property
    def needs_all(self) -> bool:
        """Whether whole distributions are needed, which only the transformers engine has."""
        return self.estimator == "sampled"

    @property
    def needs_one(self) -> bool:
        """Whether the work needs something that not every engine has."""
        return self.needs_all or self.branches is not None

    def answering(self) -> Self:
        """The same section for generating answers, where no entries are needed."""
        return self.model_copy(update={"top_k": 1, "estimator": "topk", "branches": None})

    def settled(self, *, on_cpu: bool, fp32_head: bool) -> Self:
        """The same section with `engine: auto` replaced by an engine.

        Args:
            on_cpu: Whether the machine has no GPU.
            fp32_head: Whether logits are computed in float32 for a model in another dtype.
        """
        if self.engine != "auto":
            return self
        serving = (k for k in ENGINES if k.serves(self, on_cpu=on_cpu, fp32_head=fp32_head))
        return self.model_copy(update={"engine": next(serving).name})

    @property
    def loader(self) -> Loader:
        """What loads a model, by the run file alone; auto if it depends on the machine."""
        if self.engine != "auto":
            return ENGINES[self.engine].loader
        if self.quantization is None and self.needs_one:
            return next(kind for kind in ENGINES if kind.can_serve(self)).loader
        return "auto"

    def step_tokens(self, *, on_cpu: bool) -> int:
        """vllm: tokens of one step, at most."""
        default = CPU_STEP_TOKENS if on_cpu else GPU_STEP_TOKENS
        return self.max_num_batched_tokens or default

    def logit_rows(self, *, on_cpu: bool) -> int:
        """transformers: rows of logits at a time, at most."""
        return self.head_rows or (CPU_HEAD_ROWS if on_cpu else GPU_HEAD_ROWS)

    def scored_tokens(self, *, on_cpu: bool) -> int:
        """transformers: tokens of one forward pass that scores, at most."""
        return self.batch_tokens or (CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS)

    @property
    def answered_tokens(self) -> int:
        """transformers: tokens of prompts that are answered together, at most."""
        return self.batch_tokens or BATCH_TOKENS

    @property
    def max_entries(self) -> int:
        """Entries at a position, at most."""
        return self.top_k if self.estimator == "topk" else self.draws + self.sampled_head

    def sampling_settings(self, seed: int) -> dict[str, Any]:
        """The settings that determine a sampled store's draws, for its manifest; empty for topk.

        Args:
            seed: The run's seed.
        """
        if self.estimator == "topk":
            return {}
        return {
            "draws": self.draws,
            "draws_are": "systematic",
            "sampled_head": self.sampled_head,
            "seed": seed,
        }


class GenerateSection(SectionModel):
    """How sources answer the prompts of the corpus (`logitfuse extract generate`)."""

    answers: int = Field(default=1, ge=1, le=1024)
    """Answers to each prompt."""
    temperature: float = Field(default=0.7, ge=0, le=2, allow_inf_nan=False)
    """Sampling temperature; 0 takes the most probable token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Tokens are sampled from the smallest set of most probable tokens with at least this mass."""
    max_tokens: int = Field(default=512, ge=1, le=1 << 20)
    """Tokens of an answer, at most; a longer answer is cut, marked as such and counted."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are kept in it."""

    @field_validator("temperature")
    @classmethod
    def _engines_agree(cls, temperature: float) -> float:
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"must be 0, or at least {LEAST_TEMPERATURE}: vLLM raises values between to that"
            )
        return temperature

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError("an empty text would end every answer before its first token")
        if any("\ud800" <= character <= "\udfff" for text in stop for character in text):
            raise ValueError("a lone surrogate never occurs in a text")
        return stop

    @model_validator(mode="after")
    def _answers_differ(self) -> Self:
        if self.answers > 1 and self.temperature == 0:
            raise ValueError(
                "without a temperature all answers to a prompt are the same: ask for 1"
            )
        return self
