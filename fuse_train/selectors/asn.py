"""The adaptive selection network (ASN): a network that learns each source's weight at each position.

`AdaptiveSelector` is the base of all selectors with parameters: gates, the cut to weights, files.
`SharedScorer` is ours; the paper's own network and the constant gate are in gates.py.

Shape suffixes: B segments, T rows, M sources, F features, X inputs of the scorer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fuse_train.disk.checksums import file_record
from fuse_train.selectors.features import FEATURES, HEDGE_START
from fuse_train.selectors.kind import LearnedOptions
from fuse_train.selectors.kinds.asn import AsnSection
from fuse_train.selectors.past import HEDGE_SCALE, OF_SOURCE, SHARED
from fuse_train.selectors.pools import hold_over_spans
from fuse_train.selectors.selectors import Selector, SourceView, covered_softmax, normalised
from store_schema.config import StrictModel
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import CorruptionError, MismatchError, MissingError
from store_schema.manifest import FileRecord
from store_schema.validation import validation_line

WEIGHTS_FILE = "selector.safetensors"
RECORD_FILE = "selector.json"


class SelectorRecord(StrictModel):
    """selector.json: how a saved selector is built."""

    kind: str
    """shared | fusion-x | constant."""
    granularity: str
    features: tuple[str, ...] = ()
    """Feature columns that it reads, in order."""
    hidden_size: int | None = None
    num_sources: int | None = None
    """None if it works for any number."""
    weights: FileRecord | None = None
    """Size and checksum of the weights file; ignored when records are compared."""


class AdaptiveSelector(Selector):
    """Base of selectors that learn: gates g, and weights w computed from them.

        w = g where g > threshold (or the largest g that sum to top_p, or all), the best always;
            scaled to sum 1

    The pool loss uses gates, so that a dropped source still gets a gradient; fusion loss, importance
    and pools use weights.

    Source: Fusion-X (2505.23844): selection by threshold, re-normalisation. Departure: where no gate
    is above the threshold the best one is kept, or all that are equal to it.
    """

    learns = True
    kind: ClassVar[str]

    def __init__(self, section: LearnedOptions) -> None:
        super().__init__()
        self.cut, self.threshold, self.top_p = section.cut, section.threshold, section.top_p
        self.pool_trains = section.objective != "fusion"
        self.fusion_trains = section.objective != "pool"

    def gates(self, view: SourceView) -> torch.Tensor:
        """Softmax g [B, T, M] over covered sources; 0 on rows that no source covers."""
        raise NotImplementedError

    def record(self) -> SelectorRecord:
        """How it is built; must equal the saved record when weights are loaded."""
        raise NotImplementedError

    def set_threshold(self, threshold: float) -> None:
        self.threshold = threshold

    def keep(self, gates_BTM: torch.Tensor) -> torch.Tensor:
        """Weights: the gates that pass the cut, scaled to sum 1."""
        if self.cut == "none":
            return normalised(gates_BTM)
        best_BT1 = gates_BTM.max(-1, keepdim=True).values
        if self.cut == "threshold":
            kept_BTM = (gates_BTM > self.threshold) | (gates_BTM == best_BT1)
        else:
            ordered_BTM = gates_BTM.sort(-1, descending=True).values
            before_BTM = ordered_BTM.cumsum(-1) - ordered_BTM
            wanted_BT1 = self.top_p * gates_BTM.sum(-1, keepdim=True)
            # The least gate that is still needed: equal gates stay together, whatever their order.
            last_BT1 = (before_BTM < wanted_BT1).sum(-1, keepdim=True).clamp(min=1) - 1
            kept_BTM = gates_BTM >= ordered_BTM.gather(-1, last_BT1)
        return normalised(torch.where(kept_BTM, gates_BTM, 0.0))

    def forward(self, view: SourceView) -> torch.Tensor:
        return self.keep(self.gates(view))

    def save(self, folder: Path) -> None:
        """Write weights and record into an existing folder."""
        with storage_errors(str(folder)):
            try:
                save_file(
                    {name: t.detach().cpu() for name, t in self.state_dict().items()},
                    folder / WEIGHTS_FILE,
                )
            except SafetensorError as error:
                raise OSError(str(error)) from error
            weights = {"weights": file_record(folder / WEIGHTS_FILE)}
            record = self.record().model_copy(update=weights).model_dump(mode="json")
            text = json.dumps(record, indent=1)
            (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote.

        Raises:
            MissingError: No selector there.
            MismatchError: It was built with other options.
            CorruptionError: Damaged files.
        """
        where = folder / WEIGHTS_FILE
        if not where.exists() or not (folder / RECORD_FILE).exists():
            raise MissingError("no selector", where=folder, hint="train one, or drop start_from")
        try:
            text = (folder / RECORD_FILE).read_text(encoding="utf-8")
            saved = SelectorRecord.model_validate_json(text)
            state = load_file(where)
        except ValidationError as error:
            got = validation_line(error)
            raise CorruptionError("selector unreadable", where=folder, got=got) from error
        except (SafetensorError, UnicodeDecodeError) as error:
            raise CorruptionError("selector unreadable", where=folder, got=error) from error
        if saved.weights != file_record(where):
            raise CorruptionError(
                "selector's weights changed since they were written",
                where=where,
                hint="train the selector again",
            )
        saved, own = saved.model_copy(update={"weights": None}), self.record()
        if own != saved:
            raise MismatchError(
                "selector was built with other options",
                where=folder,
                expected=_differing(own, saved),
                got=_differing(saved, own),
                hint="give train.asn the fields that it was trained with, or train another",
            )
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise CorruptionError(
                "selector's weights do not fit its record", where=where
            ) from error


class SharedScorer(AdaptiveSelector):
    """One scorer, shared by all sources, reads each one's features and a summary of the set.

    Sharing makes it independent of the order and number of the sources: it also works for sources that
    it was not trained with.

        x_m = [f_m, f_m - mean over covered, max over covered - f_m, c]
        g   = softmax over covered of (hedge_m + MLP(x_m) + u . x_m)

    c has the features that are the same for all sources: where in the text the row is. hedge_m is the
    log-weight of a hedge with fixed share (hedge.py) that begins with the prior of the segment's domain
    (prior.py): the untrained network is that hedge, and training learns a correction.

    Source: Fusion-X (2505.23844): MLP, softmax. Departures: features that do not hold the label
    instead of rewards of the whole sequence; one scorer for all sources; it is trained and saved, which
    the public code's is not.
    """

    kind = "shared"

    def __init__(self, section: AsnSection) -> None:
        super().__init__(section)
        self.granularity = section.granularity
        width = 3 * len(OF_SOURCE) + len(SHARED)
        hidden = section.hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()
        )
        self.score = nn.Linear(hidden, 1, bias=False)
        self.direct = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.direct.weight)
        with torch.no_grad():
            self.direct.weight[0, FEATURES.index(HEDGE_START)] = HEDGE_SCALE

    @property
    def hindsight(self) -> bool:
        return self.granularity == "segment"

    def gates(self, view: SourceView) -> torch.Tensor:
        features_BTMF, covered_BTM = view.features_BTMF, view.covered_BTM
        if self.granularity == "segment":
            features_BTMF, covered_BTM = _segment_means(features_BTMF, covered_BTM)
        own = len(OF_SOURCE)
        of_source = with_summary(features_BTMF[..., :own], covered_BTM)
        inputs_BTMX = torch.cat([of_source, features_BTMF[..., own:]], -1)
        scores_BTM: torch.Tensor = self.score(self.mlp(inputs_BTMX)) + self.direct(inputs_BTMX)
        scores_BTM = scores_BTM[..., 0]
        if self.granularity == "span":
            scores_BTM = hold_over_spans(scores_BTM, view.begins_BT)
        return covered_softmax(scores_BTM.expand(view.covered_BTM.shape), view.covered_BTM)

    def record(self) -> SelectorRecord:
        return SelectorRecord(
            kind=self.kind,
            granularity=self.granularity,
            features=FEATURES,
            hidden_size=self.score.in_features,
        )


def with_summary(features_BTMF: torch.Tensor, covered_BTM: torch.Tensor) -> torch.Tensor:
    """Each source's features, and their distances to mean and maximum over the covered sources."""
    mask_BTM1 = covered_BTM[..., None].to(features_BTMF.dtype)
    count_BT11 = mask_BTM1.sum(2, keepdim=True).clamp(min=1)
    mean_BT1F = (features_BTMF * mask_BTM1).sum(2, keepdim=True) / count_BT11
    low_BTMF = features_BTMF.masked_fill(~covered_BTM[..., None], float("-inf"))
    max_BT1F = low_BTMF.max(2, keepdim=True).values
    max_BT1F = torch.where(max_BT1F.isinf(), 0.0, max_BT1F)
    return torch.cat([features_BTMF, features_BTMF - mean_BT1F, max_BT1F - features_BTMF], -1)


def _segment_means(
    features_BTMF: torch.Tensor, covered_BTM: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features averaged over the rows of a segment that the source covers, as one row."""
    mask_BTM1 = covered_BTM[..., None].to(features_BTMF.dtype)
    mean_B1MF = (features_BTMF * mask_BTM1).sum(1, keepdim=True)
    mean_B1MF = mean_B1MF / mask_BTM1.sum(1, keepdim=True).clamp(min=1)
    return mean_B1MF, covered_BTM.any(1, keepdim=True)


def _differing(one: SelectorRecord, other: SelectorRecord) -> str:
    """The fields of `one` whose value differs in `other`."""
    ours, theirs = one.model_dump(), other.model_dump()
    return ", ".join(f"{name} {ours[name]}" for name in ours if ours[name] != theirs[name])
