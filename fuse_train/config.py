"""The `train` section of the run file."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from store_schema.config import SectionModel, StrictModel

SelectorName = Literal["uniform", "static", "min_ce", "asn"]
TailPolicy = Literal["bucket", "drop", "renormalise"]


class AsnSection(StrictModel):
    """The adaptive selection network: who is heard, position by position."""

    hidden_size: int = Field(default=32, gt=0, le=4096)
    """Width of the scorer's two hidden layers."""
    threshold: float = Field(default=0.02, ge=0, lt=1)
    """Sources whose gate is not above it are dropped at that position (the best one never is)."""
    granularity: Literal["position", "segment"] = "position"
    """One choice per position from what stands before it, or one per segment in hindsight."""
    features: Literal["all", "past"] = "past"
    """Whether a row's own distributions are looked at, or only what happened before the row."""
    objective: Literal["pool", "fusion", "both"] = "pool"
    """What trains it: the pool's NLL of the label, the fusion loss of the target, or both."""
    lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate of the scorer."""
    pretrain_steps: int = Field(default=300, ge=0)
    """Steps on the stores alone before the target is trained; 0 starts it untrained."""
    pretrain_batch_segments: int = Field(default=32, gt=0)
    """Segments of one such step."""
    start_from: str | None = None
    """Folder of a trained selector to start from instead of pretraining."""


class ControlSection(StrictModel):
    """What the CLM control does otherwise, so that both runs can be tuned equally well."""

    lr: float | None = Field(default=None, gt=0)
    """Its own peak learning rate; None takes the run's."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Its own weight decay; None takes the run's."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Its own warm-up; None takes the run's."""


class TrainSection(SectionModel):
    """How the target is trained."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {
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
        }
    )

    clm_weight: float = Field(default=0.3, ge=0, le=1)
    """lambda: share of the ground truth's cross-entropy; the rest is the fusion loss."""
    selector: SelectorName = "asn"
    """Who gives the sources their weights."""
    static_weights: dict[str, float] | None = None
    """Weight by source for selector static; they need not sum to 1."""
    tail: TailPolicy = "bucket"
    """Mass outside the entries: a bucket of its own, ignored, or spread over the entries."""
    feedback_weight: float = Field(default=0.01, ge=0)
    """alpha: weight of the ASN's CV^2 of importance (load balance)."""
    pool_weight: float = Field(default=1.0, ge=0)
    """Weight of the ASN's pool loss."""
    asn: AsnSection = AsnSection()
    """The adaptive selection network, for selector asn."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    warmup_ratio: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's, on matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training split."""
    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps in all; None means as many as `epochs` takes."""
    batch_segments: int = Field(default=32, gt=0)
    """Segments of one optimizer step, over all processes."""
    micro_batch_segments: int = Field(default=32, gt=0)
    """Segments one process holds on its device at a time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; weights and sums are float32 either way."""
    append_eos: bool = False
    """Train the end-of-sequence token, on ground truth alone, where a document ends."""

    train_split: str = Field(default="train", min_length=1)
    """Split that is trained on."""
    valid_split: str = Field(default="valid", min_length=1)
    """Split of the evaluations on the way."""
    eval_every: int | None = Field(default=50, gt=0)
    """Steps between evaluations of bits per byte; None evaluates at the end only."""
    eval_segments: int | None = Field(default=256, gt=0)
    """At most so many segments are evaluated, spread evenly over the split; None takes all."""
    keep_best: bool = True
    """Whether the final weights are those of the best evaluation instead of the last step."""

    control: bool = True
    """Also train the CLM control: same start, tokens, order and optimizer, no sources."""
    control_overrides: ControlSection = ControlSection()
    """What the control does otherwise."""

    shuffle_shards: int = Field(default=4, gt=0)
    """Segments are shuffled within windows of so many shards; memory grows with it."""
    cache_gib: float = Field(default=2.0, ge=0)
    """Decoded shards kept in memory for later passes, in GiB; one window is always kept."""
    prefetch_batches: int = Field(default=2, ge=0)
    """Batches prepared ahead in a thread; 0 prepares them in the loop."""
    head_chunk_rows: int = Field(default=1024, gt=0)
    """Rows whose logits exist at one time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    log_every: int = Field(default=10, gt=0)
    """Steps between lines for people; the step log has every step."""
    checkpoint_every: int = Field(default=100, gt=0)
    """Steps between checkpoints."""
    save_total_limit: int = Field(default=2, gt=0)
    """Checkpoints kept, newest first."""

    @model_validator(mode="after")
    def _static_weights_fit(self) -> Self:
        if self.selector == "static":
            if not self.static_weights:
                raise ValueError("selector static needs static_weights")
            if min(self.static_weights.values()) < 0 or sum(self.static_weights.values()) <= 0:
                raise ValueError("static_weights must be 0 or more, and not all 0")
        return self

    def control_section(self) -> TrainSection:
        """The section of the CLM control: nothing that sources have a say in."""
        plain = TrainSection()
        given = self.control_overrides.model_dump(exclude_none=True)
        fusion = ("selector", "static_weights", "tail", "feedback_weight", "pool_weight", "asn")
        neutral = {name: getattr(plain, name) for name in fusion}
        return self.model_copy(
            update=neutral | {"clm_weight": 1.0, "selector": "uniform", "control": False} | given
        )
