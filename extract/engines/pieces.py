"""How much an engine computes at a time, which is halved when memory runs out."""

from __future__ import annotations

from dataclasses import dataclass

from extract.engines.memory import LEAST_ROWS


@dataclass(slots=True)
class Pieces:
    """How much is computed at a time; halved whenever memory runs out.

    Args:
        batch_tokens: Tokens of one forward pass, with padding; it has at least one segment.
        head_rows: Rows of logits.
        shrunk: Whether it was halved since the last call of `describe`.
    """

    batch_tokens: int
    head_rows: int
    shrunk: bool = False

    def shrink(self, in_head: bool, num_segments: int, longest: int, num_rows: int) -> bool:
        """Halve the rows of logits, or the batch if these are few or memory ran out before them.

        Args:
            in_head: Whether memory ran out after the forward pass.
            num_segments: Segments of the batch.
            longest: Tokens of its longest segment.
            num_rows: Rows of the batch.

        Returns:
            False if nothing can be halved any more.
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

    def describe(self) -> str:
        """The present values as text; resets `shrunk`."""
        self.shrunk = False
        return (
            f"going on with extract.batch_tokens {self.batch_tokens:,} "
            f"and extract.head_rows {self.head_rows:,}"
        )
