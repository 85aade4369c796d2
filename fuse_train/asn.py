"""The adaptive selection network (ASN): a scorer that learns which source to hear where.

Shape suffixes: B segments, T rows, M sources, F features, X inputs of the scorer.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fuse_train.config import AsnSection
from fuse_train.features import FEATURES, PAST_FEATURES
from fuse_train.selectors import Selector, SourceView, normalised
from store_schema.config import StrictModel
from store_schema.errors import CorruptionError, MismatchError, MissingError
from store_schema.location import storage_errors

WEIGHTS_FILE = "selector.safetensors"
RECORD_FILE = "selector.json"


class SelectorRecord(StrictModel):
    """What the weights file does not say."""

    hidden_size: int
    threshold: float
    granularity: str
    features: tuple[str, ...]
    """Columns that are looked at, in order."""


class AdaptiveSelector(Selector):
    """One MLP, shared by all sources, scores each from its own features and a summary of the set.

    Sharing makes it indifferent to the order of the sources and to their number: it can be asked
    about sources that it was not trained with.

        x_m = [f_m, f_m - mean over covered, max over covered - f_m]
        g   = softmax over covered of (MLP(x_m) + u . x_m)
        w   = g where g > threshold, and the largest g; scaled to sum 1

    Starts as uniform (the last layer is zero) and has a linear path u, so that the Bayes mixture of
    the sources (log-weights = sums of earlier log-probabilities) is within reach from the start.

    Source: Fusion-X (2505.23844): MLP, softmax, selection by threshold, re-normalisation. Departures:
    features that do not hold the label instead of the rewards of the whole sequence; one scorer for
    all sources; it is trained, saved and tested, which the public code's is not.
    """

    def __init__(self, section: AsnSection) -> None:
        super().__init__()
        self.threshold = section.threshold
        self.granularity = section.granularity
        self.columns = PAST_FEATURES if section.features == "past" else FEATURES
        width = 3 * len(self.columns)
        hidden = section.hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()
        )
        self.score = nn.Linear(hidden, 1, bias=False)
        self.direct = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.direct.weight)

    def gates(self, view: SourceView) -> torch.Tensor:
        """Softmax g [B, T, M] over covered sources; 0 on rows that no source covers."""
        features_BTMF = view.features_BTMF[..., : len(self.columns)]
        covered_BTM = view.covered_BTM
        if self.granularity == "segment":
            features_BTMF, covered_BTM = _segment_means(features_BTMF, covered_BTM)
        inputs_BTMX = with_summary(features_BTMF, covered_BTM)
        scores_BTM: torch.Tensor = self.score(self.mlp(inputs_BTMX)) + self.direct(inputs_BTMX)
        scores_BTM = scores_BTM[..., 0]
        scores_BTM = scores_BTM.expand(view.covered_BTM.shape)
        # A row without sources gets finite scores first: softmax of -inf alone is NaN, also in
        # the gradient, however it is masked afterwards.
        none_BT1 = ~view.covered_BTM.any(-1, keepdim=True)
        scores_BTM = scores_BTM.masked_fill(~(view.covered_BTM | none_BT1), float("-inf"))
        return scores_BTM.softmax(-1) * view.covered_BTM

    def keep(self, gates_BTM: torch.Tensor) -> torch.Tensor:
        """Weights: gates above the threshold, the largest in any case, scaled to sum 1."""
        best_BT1 = gates_BTM.max(-1, keepdim=True).values
        kept_BTM = (gates_BTM > self.threshold) | (gates_BTM == best_BT1)
        return normalised(torch.where(kept_BTM, gates_BTM, 0.0))

    def forward(self, view: SourceView) -> torch.Tensor:
        return self.keep(self.gates(view))

    def save(self, folder: Path) -> None:
        """Write weights and record into an existing folder."""
        record = SelectorRecord(
            hidden_size=self.score.in_features,
            threshold=self.threshold,
            granularity=self.granularity,
            features=self.columns,
        )
        with storage_errors(str(folder)):
            text = json.dumps(record.model_dump(mode="json"), indent=1)
            (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
            try:
                save_file(
                    {name: t.detach().cpu() for name, t in self.state_dict().items()},
                    folder / WEIGHTS_FILE,
                )
            except SafetensorError as error:
                raise OSError(str(error)) from error

    def load(self, folder: Path) -> None:
        """Take the weights that `save` wrote.

        Raises:
            MissingError: No selector there.
            MismatchError: It was built otherwise.
            CorruptionError: Damaged files.
        """
        where = folder / WEIGHTS_FILE
        if not where.exists() or not (folder / RECORD_FILE).exists():
            raise MissingError("no selector", where=folder, hint="train one, or drop start_from")
        try:
            text = (folder / RECORD_FILE).read_text(encoding="utf-8")
            record = SelectorRecord.model_validate_json(text)
            state = load_file(where)
        except (ValidationError, SafetensorError, UnicodeDecodeError) as error:
            raise CorruptionError("selector unreadable", where=folder, got=error) from error
        ours = (self.score.in_features, self.granularity, tuple(self.columns))
        theirs = (record.hidden_size, record.granularity, record.features)
        if ours != theirs:
            raise MismatchError(
                "selector was built otherwise", where=folder, expected=ours, got=theirs
            )
        self.load_state_dict(state)


def with_summary(features_BTMF: torch.Tensor, covered_BTM: torch.Tensor) -> torch.Tensor:
    """Each source's features beside their distance to the mean and the best of the covered set."""
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
