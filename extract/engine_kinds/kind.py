"""Base class of engines. Loaded with every run file, so it imports nothing heavy."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from store_schema.model.model_check import Loader
from store_schema.registry import Kind

Device = Literal["auto", "cpu", "cuda"]


class EngineKind(Kind):
    """Base class of all engines.

    A `spec` is an `extract.engines.protocol.EngineSpec`, a `section` the run file's section `extract`,
    of which the engine's options are a field.
    """

    whole_rows: ClassVar[bool] = False
    """Whether it returns whole distributions, which sampled stores need."""
    has_branches: ClassVar[bool] = False
    """Whether it has `Engine.branch`, which `extract.branches` needs."""
    loader: ClassVar[Loader] = "auto"
    """The library that loads the model, which determines which models can be loaded."""

    def open(self, spec: Any) -> Any:
        """Load a model: returns an `extract.engines.protocol.Engine`.

        Raises:
            ConfigError: The engine is not installed.
            ModelError: The model cannot be loaded.
        """
        raise NotImplementedError

    def check(self, section: Any) -> None:
        """Refuse settings that it does not support.

        Raises:
            ValueError: There is such a setting; says which engine supports it.
        """
        if section.needs_all and not self.whole_rows:
            raise ValueError(f"estimator sampled needs whole distributions, not engine {self.name}")
        if section.branches is not None and not self.has_branches:
            raise ValueError(f"branches need engine transformers; {self.name} has none")

    def can_serve(self, section: Any) -> bool:
        """Whether it has all that `section` needs of an engine."""
        return (self.whole_rows or not section.needs_all) and (
            self.has_branches or section.branches is None
        )

    def serves(self, section: Any, *, on_cpu: bool, fp32_head: bool) -> bool:
        """Whether `engine: auto` may choose it.

        Args:
            section: Section `extract` of the run file.
            on_cpu: Whether the machine has no GPU.
            fp32_head: Whether logits are computed in float32 for a model in another dtype.
        """
        return False

    def device(self, section: Any) -> str:
        """The device it runs on: "auto", "cpu" or "cuda"."""
        return "auto"

    def memory_need(self, spec: Any, on_cpu: bool) -> Any:
        """Memory for scoring, as an `extract.engines.memory.Need`; None where that is not known."""
        return None

    def free_memory(self, spec: Any) -> tuple[int, str]:
        """Bytes of GPU memory that a source may use, and the GPU's name for messages."""
        from extract.engines.memory import gpu_bytes

        return gpu_bytes(0)[0], "GPU 0"

    def halved(self, spec: Any, times: int, on_cpu: bool) -> Any:
        """The spec with batches halved `times` times; unchanged for engines that halve by
        themselves."""
        return spec
