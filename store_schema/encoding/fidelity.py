"""How far stored distributions are from the full ones: divergences, and errors of the gradient.

For a row with full probabilities p_j, stored entries s_j, tail mass t, a prior u_j in proportion to
which the tail is spread, and a student's probabilities q_j:

    stored_j = s_j                                      for ids that are entries
               t u_j / (sum of u over the other ids)    for the other ids
    kl       = sum_j p_j log(p_j / stored_j)            nats; infinite where p_j > 0 and stored_j = 0
    tv       = sum_j |p_j - stored_j| / 2
    g_j      = q_j - p_j                                gradient of CE(P, Q) in the student's logits
    ghat_j   = c q_j + d q_j [j is an entry] - e s_j [j is an entry]

with, for the tail policies of the fusion loss (m is the mass of the entries, S and Q are the student's
mass on the entries and outside them):

    bucket:       c = m - S t / Q,  d = t / Q,  e = 1
    drop:         c = m,            d = 0,      e = 1
    renormalise:  c = 1,            d = 0,      e = 1 / m

The error of ghat is its angle to g and its relative norm error | |ghat| - |g| | / |g|, in two ways:
row by row, weighted by |g|; and with all rows as one vector, as in an optimizer step, where the errors
of different rows partly cancel.

Sums are float64. Angles below about 1e-5 degrees, and a KL slightly below 0, are rounding errors of the
float32 inputs.

Shape suffixes: R rows (positions), V vocabulary, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import degrees, inf, nan, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.compiled import compiled_fast
from store_schema.errors import InputError
from store_schema.presets import TailPolicy

POLICIES: tuple[TailPolicy, ...] = ("bucket", "drop", "renormalise")
BUCKET, DROP, RENORMALISE = range(3)

LEAST_REST = 1e-6
"""Lower bound of the student's mass outside the entries, the same as in the fusion loss."""
MASS_TOLERANCE = 1e-3
"""A row whose sum is further from 1 is refused."""
CHUNK_VALUES = 1 << 18
"""Probabilities computed at a time: float64 chunks of P and Q fit a core's cache."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Stored distributions of R positions, in the layout of a store.

    Args:
        entry_ids_E: Integer token ids, none twice in a row.
        entry_logprobs_E: Nats.
        offsets_R1: Entries of row i are offsets[i]:offsets[i + 1].
        tail_mass_R: Mass outside the entries.
    """

    entry_ids_E: npt.NDArray[Any]
    entry_logprobs_E: npt.NDArray[Any]
    offsets_R1: npt.NDArray[Any]
    tail_mass_R: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.tail_mass_R)

    def __getitem__(self, rows: slice) -> StoredRows:
        """A slice of consecutive rows."""
        start, stop, _ = rows.indices(len(self))
        offsets = self.offsets_R1[start : stop + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        return StoredRows(
            self.entry_ids_E[entries],
            self.entry_logprobs_E[entries],
            offsets - offsets[0],
            self.tail_mass_R[start:stop],
        )

    def entry_mass(self) -> npt.NDArray[np.float64]:
        """[R] sum of the probabilities of the entries."""
        row_E = np.repeat(np.arange(len(self)), np.diff(self.offsets_R1))
        probs_E = np.exp(self.entry_logprobs_E.astype(np.float64))
        return np.bincount(row_E, probs_E, minlength=len(self)).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Means over rows; the gradient figures are NaN without a student's distribution.

    Args:
        num_rows: Number of rows.
        num_infinite: Rows with infinite KL: no tail mass, but probability outside the entries.
        entries_per_row: Mean number of entries.
        tail_mass: Mean stored tail mass.
        kl_nats: KL(P || stored) over all rows.
        finite_kl_nats: The same over the rows where it is finite.
        total_variation: Half the sum of absolute differences.
        row_angle_degrees: Angle between g and ghat of a row, weighted by |g|.
        row_norm_error: Relative norm error of a row, weighted by |g|.
        gradient_angle_degrees: Angle between the gradients of all rows as one vector.
        gradient_norm_error: Relative norm error of that vector.
    """

    num_rows: int
    num_infinite: int
    entries_per_row: float
    tail_mass: float
    kl_nats: float
    finite_kl_nats: float
    total_variation: float
    row_angle_degrees: float
    row_norm_error: float
    gradient_angle_degrees: float
    gradient_norm_error: float


@dataclass(frozen=True, slots=True)
class FidelitySums:
    """Sums over rows, which may be added up; `means` divides by the counts."""

    num_rows: int = 0
    num_infinite: int = 0
    num_entries: int = 0
    tail_mass: float = 0.0
    kl_nats: float = 0.0
    """Over the rows where it is finite."""
    total_variation: float = 0.0
    norm: float = 0.0
    """Sum of |g|."""
    norm_times_angle: float = 0.0
    """Radians."""
    norm_times_error: float = 0.0
    full_square: float = 0.0
    stored_square: float = 0.0
    product: float = 0.0

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def means(self) -> Fidelity:
        """The means over all rows."""
        count, norm = self.num_rows or nan, self.norm or nan
        finite = self.kl_nats / ((self.num_rows - self.num_infinite) or nan)
        full = sqrt(self.full_square) or nan
        cosine = self.product / (full * sqrt(self.stored_square) or inf)
        return Fidelity(
            num_rows=self.num_rows,
            num_infinite=self.num_infinite,
            entries_per_row=self.num_entries / count,
            tail_mass=self.tail_mass / count,
            kl_nats=inf if self.num_infinite else finite,
            finite_kl_nats=finite,
            total_variation=self.total_variation / count,
            row_angle_degrees=degrees(self.norm_times_angle / norm),
            row_norm_error=self.norm_times_error / norm,
            gradient_angle_degrees=degrees(float(np.arccos(np.clip(cosine, -1.0, 1.0)))),
            gradient_norm_error=abs(sqrt(self.stored_square) - full) / full,
        )


def measure(
    full_logprobs_RV: npt.NDArray[Any],
    rows: StoredRows,
    *,
    prior_V: npt.NDArray[Any] | None = None,
    student_logprobs_RV: npt.NDArray[Any] | None = None,
    tail_policy: TailPolicy = "bucket",
) -> FidelitySums:
    """Measure stored rows against the full distributions.

    Args:
        full_logprobs_RV: Full distributions: nats, normalised.
        rows: The same rows as a store has them.
        prior_V: The tail is spread in proportion to it; positive, of any scale; None spreads it evenly.
        student_logprobs_RV: Q, nats, normalised; None measures no gradients.
        tail_policy: Tail policy of the fusion loss.

    Returns:
        Sums, which may be added over calls.

    Raises:
        InputError: Shapes do not fit, or a distribution does not sum to 1.
    """
    _check(full_logprobs_RV, rows, prior_V, student_logprobs_RV)
    num_rows, vocab_size = full_logprobs_RV.shape
    prior_V = np.ones(vocab_size) if prior_V is None else np.asarray(prior_V, np.float64)
    log_prior_V = np.log(prior_V)
    figures_RF = np.zeros((num_rows, 5))
    step = max(1, CHUNK_VALUES // vocab_size)
    for start in range(0, num_rows, step):
        chunk = slice(start, start + step)
        part = rows[chunk]
        # exp(-1000) is 0 already; minus infinity would give 0 * inf = NaN below.
        logp_RV = np.maximum(full_logprobs_RV[chunk].astype(np.float64), -1000.0)
        p_RV = np.exp(logp_RV)
        _check_mass(p_RV.sum(1), "a full distribution does not sum to 1", start)
        q_RV = np.empty((0, vocab_size))
        if student_logprobs_RV is not None:
            q_RV = np.exp(student_logprobs_RV[chunk].astype(np.float64))
            _check_mass(q_RV.sum(1), "a student's distribution does not sum to 1", start)
        _measure_rows(
            logp_RV,
            p_RV,
            q_RV,
            prior_V,
            log_prior_V,
            (
                part.entry_ids_E.astype(np.int64),
                part.entry_logprobs_E.astype(np.float64),
                part.offsets_R1.astype(np.int64),
                part.tail_mass_R.astype(np.float64),
            ),
            POLICIES.index(tail_policy),
            figures_RF[chunk],
        )
    return _sums(figures_RF, rows, student_logprobs_RV is not None)


def with_least_tail(rows: StoredRows, least: float) -> StoredRows:
    """The same rows with a tail mass of at least `least`; the entries of changed rows are scaled.

    A stored tail of 0 means only that the tail is smaller than its precision, but makes a KL infinite.

    Args:
        rows: Stored distributions.
        least: Mass in (0, 1).

    Returns:
        New rows; those with enough tail mass are unchanged.
    """
    mass_R, counts_R = rows.entry_mass(), np.diff(rows.offsets_R1)
    short_R = (rows.tail_mass_R < least) & (mass_R > 0)
    shift_R = np.where(short_R, np.log1p(-least) - np.log(np.where(short_R, mass_R, 1.0)), 0.0)
    return StoredRows(
        rows.entry_ids_E,
        rows.entry_logprobs_E + np.repeat(shift_R, counts_R),
        rows.offsets_R1,
        np.where(short_R, least, rows.tail_mass_R),
    )


def _check(
    full_RV: npt.NDArray[Any],
    rows: StoredRows,
    prior_V: npt.NDArray[Any] | None,
    student_RV: npt.NDArray[Any] | None,
) -> None:
    num_rows, vocab_size = full_RV.shape
    counts_R, num_entries = np.diff(rows.offsets_R1), len(rows.entry_ids_E)
    ends = (int(rows.offsets_R1[0]), int(rows.offsets_R1[-1]))
    if not (len(rows) == len(counts_R) == num_rows and len(rows.entry_logprobs_E) == num_entries):
        raise InputError("stored rows do not fit the full ones", expected=num_rows, got=len(rows))
    if ends != (0, num_entries) or (counts_R < 0).any():
        what = "offsets do not rise from 0 to the number of entries"
        raise InputError(what, expected=(0, num_entries), got=ends)
    if prior_V is not None and prior_V.shape != (vocab_size,):
        raise InputError("a prior of the wrong shape", expected=(vocab_size,), got=prior_V.shape)
    if prior_V is not None and not (prior_V > 0).all():
        raise InputError("a prior that is not positive everywhere", hint="add 1 to counts")
    if student_RV is not None and student_RV.shape != full_RV.shape:
        raise InputError(
            "a student of the wrong shape", expected=full_RV.shape, got=student_RV.shape
        )
    ids_E = rows.entry_ids_E
    if len(ids_E) and not (int(ids_E.min()) >= 0 and int(ids_E.max()) < vocab_size):
        raise InputError(
            "entry ids outside the vocabulary",
            expected=f"0 to {vocab_size - 1}",
            got=f"{ids_E.min()} to {ids_E.max()}",
        )
    _check_mass(rows.entry_mass() + rows.tail_mass_R, "a stored row does not sum to 1")


def _check_mass(mass_R: npt.NDArray[Any], what: str, first_row: int = 0) -> None:
    wrong_R = ~(np.abs(mass_R - 1.0) <= MASS_TOLERANCE)
    if wrong_R.any():
        row = int(wrong_R.argmax())
        raise InputError(
            what,
            where=f"row {first_row + row}",
            expected=f"1 within {MASS_TOLERANCE}",
            got=f"{mass_R[row]:.6f}",
        )


def _sums(figures_RF: npt.NDArray[np.float64], rows: StoredRows, student: bool) -> FidelitySums:
    kl_R, tv_R, full_R, stored_R, product_R = figures_RF.T
    finite_R = np.isfinite(kl_R)
    sums = FidelitySums(
        num_rows=len(rows),
        num_infinite=int((~finite_R).sum()),
        num_entries=len(rows.entry_ids_E),
        tail_mass=float(rows.tail_mass_R.astype(np.float64).sum()),
        kl_nats=float(kl_R[finite_R].sum()),
        total_variation=float(tv_R.sum()),
    )
    if not student:
        return sums
    norm_R = np.sqrt(full_R)
    length_R = norm_R * np.sqrt(stored_R)
    # A gradient of length 0 has no direction: its angle counts as a right angle.
    cosine_R = np.divide(product_R, length_R, out=np.zeros_like(length_R), where=length_R > 0)
    angle_R = np.arccos(np.clip(cosine_R, -1.0, 1.0))
    return sums + FidelitySums(
        norm=float(norm_R.sum()),
        norm_times_angle=float((norm_R * angle_R).sum()),
        norm_times_error=float(np.abs(np.sqrt(stored_R) - norm_R).sum()),
        full_square=float(full_R.sum()),
        stored_square=float(stored_R.sum()),
        product=float(product_R.sum()),
    )


@compiled_fast
def _measure_rows(
    logp_RV: Any,
    p_RV: Any,
    q_RV: Any,
    prior_V: Any,
    log_prior_V: Any,
    rows: Any,
    policy: int,
    figures_RF: Any,
) -> None:
    """Fill figures_RF: KL, total variation, |g|^2, |ghat|^2 and g.ghat; q_RV may have no rows."""
    ids_E, logs_E, offsets_R1, tail_R = rows
    vocab_size = len(prior_V)
    kept_V = np.zeros(vocab_size)
    other_V = np.ones(vocab_size)  # 0 at the entries of the row; kept_V is 0 everywhere else
    for row in range(len(p_RV)):
        start, stop = offsets_R1[row], offsets_R1[row + 1]
        entries_kl = 0.0
        for i in range(start, stop):
            j = ids_E[i]
            other_V[j], kept_V[j] = 0.0, np.exp(logs_E[i])
            if p_RV[row, j] > 0:
                entries_kl += p_RV[row, j] * (logp_RV[row, j] - logs_E[i])
        kl, tv = _distances(
            logp_RV[row], p_RV[row], kept_V, other_V, prior_V, log_prior_V, tail_R[row]
        )
        figures_RF[row, 0], figures_RF[row, 1] = entries_kl + kl, tv
        if len(q_RV):
            squares = _gradients(p_RV[row], q_RV[row], kept_V, other_V, tail_R[row], policy)
            figures_RF[row, 2], figures_RF[row, 3], figures_RF[row, 4] = squares
        for i in range(start, stop):
            other_V[ids_E[i]], kept_V[ids_E[i]] = 1.0, 0.0


@compiled_fast
def _distances(
    logp_V: Any, p_V: Any, kept_V: Any, other_V: Any, prior_V: Any, log_prior_V: Any, tail: float
) -> tuple[float, float]:
    """The part of KL from ids that are not entries, and the total variation."""
    prior = 0.0
    for j in range(len(p_V)):
        prior += other_V[j] * prior_V[j]
    scale = tail / prior if prior > 0 else 0.0
    mass, log_ratio, difference = 0.0, 0.0, 0.0
    for j in range(len(p_V)):
        p = p_V[j] * other_V[j]
        mass += p
        log_ratio += p * (logp_V[j] - log_prior_V[j])
        difference += abs(p_V[j] - kept_V[j] - scale * prior_V[j] * other_V[j])
    if mass == 0:
        return 0.0, difference / 2
    if scale == 0:
        return np.inf, difference / 2
    return log_ratio - mass * np.log(scale), difference / 2


@compiled_fast
def _gradients(
    p_V: Any, q_V: Any, kept_V: Any, other_V: Any, tail: float, policy: int
) -> tuple[float, float, float]:
    """|g|^2, |ghat|^2 and g.ghat."""
    entries, inside, rest = 0.0, 0.0, 0.0
    for j in range(len(q_V)):
        entries += kept_V[j]
        inside += q_V[j] * (1.0 - other_V[j])
        rest += q_V[j] * other_V[j]
    everywhere, at_entries, less = entries, 0.0, 1.0
    if policy == BUCKET:
        at_entries = tail / max(rest, LEAST_REST)
        everywhere = entries - inside * at_entries
    elif policy == RENORMALISE and entries > 0:
        everywhere, less = 1.0, 1.0 / entries
    full_square, stored_square, product = 0.0, 0.0, 0.0
    for j in range(len(q_V)):
        full = q_V[j] - p_V[j]
        stored = q_V[j] * (everywhere + at_entries * (1.0 - other_V[j])) - less * kept_V[j]
        full_square += full * full
        stored_square += stored * stored
        product += full * stored
    return full_square, stored_square, product
