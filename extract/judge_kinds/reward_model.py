"""Judge reward_model."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import Field

from extract.engine_kinds.kind import Device
from extract.judge_kinds.kind import JudgeContext, JudgeKind, JudgeOptions
from store_schema.config import DtypeName, ModelRef, TemplateSettings
from store_schema.paths import PathText


class RewardModelOptions(JudgeOptions):
    """Judge reward_model."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"batch_tokens", "device"})

    model: PathText = Field(min_length=1)
    """Folder or hub name of a sequence classification model with one label."""
    revision: str | None = None
    """Commit of a hub model. None takes the folder, or the hub's default branch."""
    dtype: DtypeName = "auto"
    """bfloat16, float16, float32 or float64, or a short name (bf16); auto takes the checkpoint's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    template: TemplateSettings = TemplateSettings()
    """How its chat template is rendered, as for a source; `file` is for a model without a template."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a prompt with its answer, at most; longer ones get no score and are counted. None: the
    model's context length by its config."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of one forward pass, with padding."""
    device: Device = "auto"
    """Device that it runs on."""

    @property
    def ref(self) -> ModelRef:
        """The model as a `ModelRef`."""
        return ModelRef.model_validate(
            {
                name: getattr(self, name)
                for name in ("model", "revision", "dtype", "trust_remote_code", "template")
            }
        )


class RewardModel(JudgeKind):
    """A reward model of the Hugging Face hub or a folder, which reads prompt and answer in its own chat
    template."""

    section = RewardModelOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """Fingerprints of model, tokenizer and chat template."""
        from extract.judging.rewards import check_reward_model, tokenizer_of
        from store_schema.fingerprint import bytes_digest, model_fingerprint

        folder = check_reward_model(options)
        backend, chat = tokenizer_of(options, folder)
        files = [backend.to_str(), json.dumps(chat.text)]
        return [model_fingerprint(folder), *(bytes_digest(text.encode()) for text in files)]

    def open(self, options: Any, context: JudgeContext) -> Any:
        """As `JudgeKind.open` says."""
        from extract.judging.rewards import RewardJudge

        return RewardJudge(options)
