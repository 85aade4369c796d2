"""What an engine is to the rest of the stage; read with the run file, so it loads nothing heavy."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from store_schema.model.model_check import Loader
from store_schema.registry import Kind

Device = Literal["auto", "cpu", "cuda"]


class EngineKind(Kind):
    """Base of all engines.

    A `spec` is an `extract.engines.protocol.EngineSpec`, a `section` the run file's `extract`; options
    of an engine are a field of it.
    """

    whole_rows: ClassVar[bool] = False
    """Whether it gives whole distributions, which draws need."""
    loader: ClassVar[Loader] = "auto"
    """What reads the model's files, where that decides which models can be loaded at all."""

    def open(self, spec: Any) -> Any:
        """A loaded model: an `extract.engines.protocol.Engine`.

        Raises:
            ConfigError: The engine is not installed.
            ModelError: The model does not load.
        """
        raise NotImplementedError

    def check(self, section: Any) -> None:
        """Refuse what it cannot do.

        Raises:
            ValueError: Says what it cannot, and what can.
        """
        if section.needs_all and not self.whole_rows:
            raise ValueError(f"draws need whole distributions: not from {self.name}")

    def serves(self, section: Any, *, on_cpu: bool, fp32_head: bool) -> bool:
        """Whether it may be taken where the run file leaves the engine open.

        Args:
            section: The run file's `extract`.
            on_cpu: Whether the machine has no GPU.
            fp32_head: Whether logits are computed in float32 though the model is not.
        """
        return False

    def device(self, section: Any) -> str:
        """Where it runs: "auto", "cpu" or "cuda"."""
        return "auto"

    def memory_need(self, spec: Any, on_cpu: bool) -> Any:
        """What scoring takes, an `extract.engines.memory.Need`; None where that is not known."""
        return None

    def free_memory(self, spec: Any) -> tuple[int, str]:
        """Bytes of a GPU that a source may take, and whose they are."""
        from extract.engines.memory import gpu_bytes

        return gpu_bytes(0)[0], "GPU 0"

    def halved(self, spec: Any, times: int, on_cpu: bool) -> Any:
        """The spec with batches halved so many times, the same where that is done in the engine."""
        return spec
