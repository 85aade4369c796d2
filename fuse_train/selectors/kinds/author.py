"""Selector author."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fuse_train.selectors.kind import RuleKind
from store_schema.config import StrictModel

if TYPE_CHECKING:
    import torch

    from fuse_train.selectors.selectors import SourceView


class AuthorSection(StrictModel):
    """Selector author."""

    otherwise: Literal["min_ce", "avg_ce", "uniform"] = "min_ce"
    """Which selector weighs the sources of a text that none of them wrote."""


class Author(RuleKind):
    """1 on the source that wrote the text, where one did; else as `otherwise` says (ProFuser).

    Source: ProFuser (2408.04998): the author of the best answer teaches it (inference mode), MinCE
    teaches given text (training mode). Departure: rows that the author has no distribution for go by
    `otherwise`, too.
    """

    section = AuthorSection
    hindsight = True
    needs_options = True

    def weights(self, view: SourceView, options: AuthorSection | None) -> torch.Tensor:
        """All weight on the author."""
        from torch.nn.functional import one_hot

        from fuse_train.selectors import SELECTORS

        rule = SELECTORS[(options or AuthorSection()).otherwise]
        if not isinstance(rule, RuleKind):
            raise TypeError(f"{rule.name} is no rule")
        others_BTM = rule.weights(view, rule.default_options())
        if view.author_B is None:
            return others_BTM
        num_sources = view.covered_BTM.shape[-1]
        wrote_BM = one_hot(view.author_B + 1, num_sources + 1)[:, 1:].bool()
        author_BTM = wrote_BM[:, None] & view.covered_BTM
        import torch

        return torch.where(author_BTM.any(-1, keepdim=True), author_BTM.float(), others_BTM)
