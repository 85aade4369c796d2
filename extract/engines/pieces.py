"""How much an engine computes at a time, and less of it once memory ran out."""

from __future__ import annotations

from dataclasses import dataclass

from extract.engines.memory import LEAST_ROWS


@dataclass(slots=True)
class Pieces:
    """How much is computed at a time; halved whenever memory runs out.

    Args:
        batch_tokens: Of one forward pass, padding included; one segment at least.
        head_rows: Rows of logits.
        shrunk: Whether it was halved since it was last told.
    """

    batch_tokens: int
    head_rows: int
    shrunk: bool = False

    def shrink(self, in_head: bool, num_segments: int, longest: int, num_rows: int) -> bool:
        """Halve what ran out: rows of logits, or, if they are few or it was not them, the batch.

        Args:
            in_head: Whether memory ran out behind the forward pass.
            num_segments: Of the batch.
            longest: Tokens of its longest segment.
            num_rows: Rows of the batch.

        Returns:
            Whether there was anything left to halve.
        """
        rows = min(self.head_rows, num_rows)
        if in_head and rows > LEAST_ROWS:
            self.head_rows = max(rows // 2, LEAST_ROWS)
        elif num_segments > 1:
            self.batch_tokens = num_segments * longest // 2
        else:
            return False
        self.shrunk = True
        return True

    def told(self) -> str:
        """For people, what is computed at a time from here on."""
        self.shrunk = False
        return (
            f"going on with extract.batch_tokens {self.batch_tokens:,} "
            f"and extract.head_rows {self.head_rows:,}"
        )
