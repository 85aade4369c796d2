"""The `harness` part of the section `evaluate`."""

from __future__ import annotations

from pydantic import Field

from store_schema.config import StrictModel
from store_schema.paths import PathText


class HarnessSection(StrictModel):
    """Which tasks of lm-evaluation-harness are run (`logitfuse eval harness`)."""

    tasks: tuple[str, ...] = ()
    """Names of tasks and groups, such as gsm8k or mmlu."""
    include_path: PathText | None = None
    """Folder with further tasks (YAML), which come before those of the package."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; None takes each task's own number."""
    limit: int | None = Field(default=None, ge=1)
    """Most examples of a task; None takes all."""
    batch_size: int = Field(default=8, gt=0)
    """Requests of one forward pass. Changes speed and memory only."""
    chat_template: bool = False
    """Whether prompts are written by each model's own chat template. Models without one refuse."""
    run_model_code: bool = False
    """Allow tasks that run code which a model has written, on this machine and without limits."""

    @property
    def shaping(self) -> dict[str, object]:
        """The options that determine the scores, for fingerprints."""
        return self.model_dump(mode="json", exclude={"batch_size", "run_model_code"})
