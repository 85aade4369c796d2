"""The `train` section of the run file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from fuse_train.divergences import DIVERGENCES
from fuse_train.gate_config import FusionGateSection
from fuse_train.loss_config import LossSection
from fuse_train.pairwise_config import PairwiseSection
from fuse_train.selectors import SELECTORS
from fuse_train.selectors.kind import LearnedOptions, SelectorKind
from fuse_train.stages_config import StageSection
from store_schema.config import SectionModel, StrictModel
from store_schema.fingerprint import canonical_json
from store_schema.presets import TailPolicy

OptimizerName = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"
]
ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
    "warmup_stable_decay",
]
TrackerName = Literal["tensorboard", "trackio", "wandb"]


if TYPE_CHECKING:
    SelectorOptions = SectionModel
else:
    SelectorOptions = SELECTORS.with_options(SectionModel)


class LoraSection(StrictModel):
    """Low-rank adapters (peft) are trained instead of the weights, which stay as they are."""

    r: int = Field(default=16, gt=0, le=4096)
    """Rank."""
    alpha: float = Field(default=32.0, gt=0)
    """The product of the two matrices is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of an adapter's input."""
    targets: Literal["all-linear"] | tuple[str, ...] = Field(default="all-linear", min_length=1)
    """Layers by the end of their names, such as [q_proj, v_proj]; never the head."""
    four_bit: bool = False
    """QLoRA: the frozen weights are kept in 4 bits (NF4). Needs bitsandbytes and a CUDA device."""


class ControlSection(StrictModel):
    """Options of the CLM control that differ from the run's, so that both can be tuned equally well."""

    lr: float | None = Field(default=None, gt=0)
    """Its own peak learning rate; None takes the run's."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Its own weight decay; None takes the run's."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Its own warm-up; None takes the run's."""


class TrainSection(SelectorOptions):
    """How the target is trained.

    Besides the fields below it has one for the options of each selector that has some, by the
    selector's name: `asn`, `hedge`, ... (fuse_train/selectors/kinds/).
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "parallel",
            "micro_batch_segments",
            "head_chunk_rows",
            "gradient_checkpointing",
            "cache_gib",
            "prefetch_batches",
            "log_every",
            "checkpoint_every",
            "save_total_limit",
            "control",
            "control_overrides",
            "pack_tokens",
            "torch_compile",
            "trackers",
            "push_to_hub",
            "hub_private",
            "allow_partial",
        }
    )

    clm_weight: float = Field(default=0.3, ge=0, le=1)
    """lambda: weight of the ground truth's cross-entropy; the rest is the weight of the fusion loss, of
    which `fusion_gate` may give more to ground truth."""
    selector: Annotated[str, SELECTORS.choice] = "asn"
    """What gives the sources their weights: a name of fuse_train/selectors/__init__.py."""
    tail: TailPolicy = "bucket"
    """Mass outside the entries: a bucket of its own, ignored, or spread over the entries."""
    feedback_weight: float = Field(default=0.01, ge=0)
    """alpha: weight of the load-balancing loss (CV^2 of importance), for selectors that learn."""
    pool_weight: float = Field(default=1.0, ge=0)
    """Weight of the pool's NLL in the loss, for selectors that learn."""
    fusion_gate: FusionGateSection = FusionGateSection()
    """How much of its weight the fusion loss keeps in each domain; ground truth gets the rest."""
    loss: LossSection = LossSection()
    """Options of the fusion loss: divergence, temperatures, schedules, which rows, spans."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Last rate of cosine_with_min_lr and warmup_stable_decay, as a share of the peak."""
    lr_scheduler_type: ScheduleName = "cosine_with_min_lr"
    """Schedule of the learning rate after the warm-up, by its name in transformers."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of that schedule, such as {num_decay_steps: 100}."""
    optim: OptimizerName = "adamw_torch_fused"
    """Optimizer by its name in transformers."""
    optim_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments that replace its defaults, such as {betas: [0.9, 0.99]} or {momentum: 0.9}."""
    lora: LoraSection | None = None
    """None trains all weights."""
    warmup_ratio: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.1, ge=0)
    """On the target's matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training split."""
    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps in all; None means as many as `epochs` or `stages` take."""
    stages: tuple[StageSection, ...] = ()
    """Stages in order, each with a weight for every corpus; () is one stage of all texts, `epochs`
    long."""
    pairwise: PairwiseSection | None = None
    """One training for each pair of the pivot and another source, in `pairs/<source>` of the run's
    folder; the trained models are merged. None trains once, with all sources."""
    batch_segments: int = Field(default=32, gt=0)
    """Segments of one optimizer step, over all processes."""
    micro_batch_segments: int = Field(default=32, gt=0)
    """Segments one process holds on its device at a time."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """What the processes of a training share: with ddp each has the whole model, with fsdp2 a part of
    its weights, gradients and optimizer state (torch's `fully_shard`)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of matrix products; weights and sums are float32 either way. auto measures once for all
    trainings of the run (`precision.json`), and takes bfloat16 if the device is faster in it."""
    append_eos: bool = False
    """Train the end-of-sequence token, on ground truth alone, at the end of documents that are not chat
    turns. Turns end with the token of the target's chat template, which is always trained."""

    train_split: str = Field(default="train", min_length=1)
    """Split that is trained on."""
    text_share: float = Field(default=1.0, gt=0, le=1)
    """Share of its text that is used: of each domain, whole documents in a fixed order until they are
    this share of its bytes. A smaller share is a part of a larger one."""
    valid_split: str = Field(default="valid", min_length=1)
    """Split of the evaluations during training."""
    eval_every: int | None = Field(default=50, gt=0)
    """Steps between evaluations of bits per byte; None evaluates at the end only."""
    eval_segments: int | None = Field(default=256, gt=0)
    """At most so many segments are evaluated, spread evenly over the split; None takes all."""
    keep_best: bool = True
    """Whether the final weights are those of the best evaluation instead of the last step."""
    early_stopping_patience: int | None = Field(default=None, gt=0)
    """End after this many evaluations in a row without a new best; None never ends early."""

    control: bool = True
    """Also train the CLM control: same start, tokens, order and optimizer, no sources."""
    control_overrides: ControlSection = ControlSection()
    """Options of the control that differ from the run's."""

    shuffle_shards: int = Field(default=4, gt=0)
    """Segments are shuffled within windows of this many shards; memory grows with it."""
    chats: Literal["turns", "whole"] = "turns"
    """turns shuffles the turns of a chat like all segments; whole keeps them together, so that one
    forward pass over the chat serves all its turns in a micro-batch."""
    cache_gib: float = Field(default=2.0, ge=0)
    """Decoded shards kept in memory for later passes, in GiB; one window is always kept."""
    prefetch_batches: int = Field(default=2, ge=0)
    """Batches prepared ahead in a thread; 0 prepares them in the loop."""
    head_chunk_rows: int | None = Field(default=None, gt=0)
    """Rows whose logits are in memory at one time; None chooses by vocabulary size and device."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    pack_tokens: int | None = Field(default=None, gt=0)
    """Segments of a micro-batch share rows of at most this many tokens instead of being padded; none
    attends to another. A longer segment has a row of its own. None pads."""
    torch_compile: Literal["inductor", "aot_eager", "eager"] | None = None
    """torch.compile backend for the model without its head; None does not compile."""
    log_every: int = Field(default=10, gt=0)
    """Steps between printed lines; the step log has every step."""
    checkpoint_every: int | None = Field(default=None, gt=0)
    """Steps between checkpoints: what a killed run loses at most. None saves at each tenth of the
    training, but at least every 100 steps."""
    save_total_limit: int = Field(default=2, gt=0)
    """Checkpoints kept, newest first."""
    trackers: tuple[TrackerName, ...] | None = None
    """Trackers besides the step log; None is TensorBoard if it is installed, [] is none."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Hugging Face Hub repository to upload the fused model's final folder to; None uploads nothing."""
    hub_private: bool = True
    """Whether that repository is created private."""
    allow_partial: bool = False
    """Train although shards of a source, or text of a domain, are missing (docs/training.md)."""

    @property
    def selector_kind(self) -> SelectorKind:
        """The chosen selector's entry in the registry."""
        return SELECTORS[self.selector]

    def options_of(self, kind: SelectorKind) -> Any:
        """Options of a selector, chosen or not; None where it has none."""
        return None if kind.section is None else getattr(self, kind.field)

    @property
    def learned(self) -> LearnedOptions | None:
        """Options of the chosen selector if it is one that learns."""
        kind = self.selector_kind
        return self.options_of(kind) if kind.learns else None

    @property
    def needs_features(self) -> bool:
        """Whether the chosen selector reads features of the sources' rows."""
        return self.selector_kind.needs_features(self.options_of(self.selector_kind))

    def content(self) -> dict[str, Any]:
        """See `SectionModel.content`; without options that the chosen selector and loss ignore."""
        content = super().content()
        for name in SELECTORS.left_out(self.selector):
            del content[name]
        for name in DIVERGENCES.left_out(self.loss.divergence):
            del content["loss"][name]
        if self.chats == "turns":  # keeps fingerprints from before this option existed
            del content["chats"]
        if not self.stages:
            del content["stages"]
        if self.pairwise is None:
            del content["pairwise"]
        if self.text_share == 1:
            del content["text_share"]
        return content

    def splits_needed(self) -> dict[str, str]:
        """Splits that must exist, by the option that names them."""
        needed = {"train.train_split": self.train_split}
        if self.keep_best or self.fusion_gate.measures or self.early_stopping_patience is not None:
            needed["train.valid_split"] = self.valid_split
        return needed

    def split_of_all_domains(self) -> str | None:
        """The split that must have text of every domain; None if text may be missing."""
        return None if self.allow_partial else self.train_split

    @field_validator("optim_kwargs", "lr_scheduler_kwargs")
    @classmethod
    def _plain_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        canonical_json(values)  # ValueError for numbers that are not finite
        return values

    @model_validator(mode="after")
    def _selector_has_what_it_needs(self) -> Self:
        self.selector_kind.check(self.options_of(self.selector_kind))
        return self

    @model_validator(mode="after")
    def _stages_count_rows(self) -> Self:
        if self.stages and self.loss.span_weight:
            raise ValueError("stages and loss.span_weight do not go together")
        scheduled = self.loss.clm_weight_schedule is not None
        if scheduled and any(stage.clm_weight is not None for stage in self.stages):
            raise ValueError("clm_weight of a stage and loss.clm_weight_schedule: give one of them")
        if self.stages and self.epochs != 1.0:
            raise ValueError("each of train.stages has epochs of its own: leave train.epochs at 1")
        return self

    @model_validator(mode="after")
    def _divergence_has_its_tail(self) -> Self:
        if DIVERGENCES[self.loss.divergence].needs_tail_bucket and self.tail != "bucket":
            raise ValueError(f"divergence {self.loss.divergence} needs tail: bucket")
        return self

    def control_section(self) -> TrainSection:
        """The section of the CLM control: what concerns the sources is at its default."""
        plain = TrainSection()
        overrides = self.control_overrides.model_dump(exclude_none=True)
        fusion = (
            *("tail", "feedback_weight", "pool_weight", "loss", "fusion_gate"),
            *SELECTORS.fields(),
        )
        neutral = {name: getattr(plain, name) for name in fusion}
        return self.model_copy(
            update=neutral
            | {"clm_weight": 1.0, "selector": "uniform", "control": False, "push_to_hub": None}
            | {"pairwise": None}
            | overrides
        )
