"""Other systems' ways of keeping a distribution, as we read them, judged by the same measure as ours.

These are our own plain numpy readings of what is public. DistillKit's recipes are packed to bytes
and read back from them, FuseLLM's values are rounded to float16; beyond that each gets one gift,
named below.

DistillKit's compressed captures (its README, "Logit Compression"): the k best ids in ceil(log2 V)
bits each; the first log-probabilities in bfloat16; for the rest a least-squares fit over the rank,
of which the coefficients are kept in float32. Each of the two parts of a position is padded to
whole bytes: ceil(k ceil(log2 V) / 8) + 2 exact + 4 terms. Where the README says nothing we take what
is best for it: ranks scaled to [0, 1] and the fit solved in float64, so that the fourth power does
not lose digits; what the fit gives is used in float32, not rounded to bfloat16. The fit is
unweighted, over log-probabilities, as in their code. The tail is not stored: it is 1 minus the sum
of what is read back. Where that sum passes 1, entries are scaled to 1 and the tail is 0; the gift
is a least tail, one for all rows, that makes its KL smallest (`best_least_tail`).

FuseLLM (2401.10491): the ten best values in float16 and their ids, and a softmax over the ten, so
that nothing is left for the other ids and KL is infinite. Two finite readings: `fusellm` smooths
with one epsilon for all rows, spread evenly over the other ids, and the gift is the epsilon with
the smallest mean KL, which is the mean true mass outside the ten; `fusellm_with_tail` is given
log-probabilities in place of values, so that every row has its own tail, and the same least tail as
DistillKit.

Shape suffixes: R rows (positions), K entries of a row, T terms, C bytes of a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.encoding.fidelity import StoredRows, measure, with_least_tail

Array = npt.NDArray[Any]
SQRT = 0.5
"""Exponent of the term that DistillKit's configuration calls "sqrt"."""
FUSELLM_ENTRIES = 10


@dataclass(frozen=True, slots=True)
class DistillKit:
    """One configuration of DistillKit's `logprob_compressor`.

    Args:
        num_entries: k.
        num_exact: Entries whose log-probability is kept in bfloat16.
        exponents: Terms of the fit over the rank of the rest.
    """

    num_entries: int
    num_exact: int
    exponents: tuple[float, ...]

    def bytes_per_position(self, vocab_size: int) -> int:
        """Ids and values, each padded to whole bytes: 344 and 127 for Qwen's vocabulary."""
        id_bytes = -(-self.num_entries * id_bits(vocab_size) // 8)
        return id_bytes + 2 * self.num_exact + 4 * len(self.exponents)

    def pack(self, logprobs_RV: Array) -> npt.NDArray[np.uint8]:
        """[R, C] bytes of positions with the full log-probabilities `logprobs_RV`."""
        return self.pack_entries(
            *best_entries(logprobs_RV, self.num_entries), id_bits(logprobs_RV.shape[1])
        )

    def pack_entries(self, ids_RK: Array, logs_RK: Array, bits: int) -> npt.NDArray[np.uint8]:
        """[R, C] bytes of positions with these best entries, `bits` an id."""
        basis_KT = self._basis()
        fitted_RT = logs_RK[:, self.num_exact :].astype(np.float64) @ np.linalg.pinv(basis_KT).T
        return np.concatenate(
            [
                pack_ids(ids_RK, bits),
                as_bytes(to_bfloat16(logs_RK[:, : self.num_exact])),
                as_bytes(fitted_RT.astype("<f4")),
            ],
            axis=1,
        )

    def unpack(self, packed_RC: npt.NDArray[np.uint8], vocab_size: int) -> StoredRows:
        """What a reader of the bytes knows of the positions."""
        bits = id_bits(vocab_size)
        ids_end = -(-self.num_entries * bits // 8)
        exact_end = ids_end + 2 * self.num_exact
        ids_RK = unpack_ids(packed_RC[:, :ids_end], bits, self.num_entries)
        exact_RK = from_bfloat16(from_bytes(packed_RC[:, ids_end:exact_end], "<u2"))
        fitted_RT = from_bytes(packed_RC[:, exact_end:], "<f4").astype(np.float64)
        fit_RK = (fitted_RT @ self._basis().T).astype(np.float32)
        # A fit can pass 0 where one entry has nearly all the mass; no probability does.
        logs_RK = np.minimum(np.concatenate([exact_RK, fit_RK], axis=1), 0.0)
        return with_what_is_left(ids_RK, logs_RK)

    def compress(self, logprobs_RV: Array) -> StoredRows:
        """Through the bytes and back."""
        return self.unpack(self.pack(logprobs_RV), logprobs_RV.shape[1])

    def _basis(self) -> npt.NDArray[np.float64]:
        rank_K = np.linspace(0.0, 1.0, self.num_entries - self.num_exact)
        return np.stack([rank_K**exponent for exponent in self.exponents], axis=1)


RECOMMENDED = DistillKit(num_entries=128, num_exact=16, exponents=(0, 1, 2, 3, 4, SQRT))
BUDGET = DistillKit(num_entries=50, num_exact=1, exponents=(0, 1, SQRT))


def fusellm_bytes_per_position(vocab_size: int, *, packed_ids: bool) -> int:
    """Ten float16 values, and ten ids in ceil(log2 V) bits or as int32."""
    id_bytes = -(-FUSELLM_ENTRIES * id_bits(vocab_size) // 8)
    return (id_bytes if packed_ids else 4 * FUSELLM_ENTRIES) + 2 * FUSELLM_ENTRIES


def fusellm(logprobs_RV: Array) -> StoredRows:
    """The softmax over ten float16 values, smoothed by the one epsilon with the least mean KL."""
    kept = fusellm_with_tail(logprobs_RV)
    logs_RK = kept.entry_logprobs_E.reshape(-1, FUSELLM_ENTRIES)
    logs_RK = logs_RK - np.log(np.exp(logs_RK).sum(1, keepdims=True))
    # -(1 - M) log(1 - e) - M log(e) is least at e = M, the mean true mass outside the entries.
    true_RK = best_entries(logprobs_RV, FUSELLM_ENTRIES)[1].astype(np.float64)
    epsilon = float(np.clip(1.0 - np.exp(true_RK).sum(1), 0.0, 1.0).mean())
    softmax = StoredRows(kept.entry_ids_E, logs_RK.ravel(), kept.offsets_R1, np.zeros(len(kept)))
    return with_least_tail(softmax, epsilon)


def fusellm_with_tail(logprobs_RV: Array) -> StoredRows:
    """Ten float16 log-probabilities whose missing mass is kept as tail."""
    ids_RK, logs_RK = best_entries(logprobs_RV, FUSELLM_ENTRIES)
    return with_what_is_left(ids_RK, logs_RK.astype(np.float16))


def best_entries(logprobs_RV: Array, num_entries: int) -> tuple[Array, Array]:
    """[R, K] ids and log-probabilities, most probable first."""
    ids_RK = np.argpartition(-logprobs_RV, num_entries - 1, axis=1)[:, :num_entries]
    order_RK = np.argsort(-np.take_along_axis(logprobs_RV, ids_RK, 1), axis=1, kind="stable")
    ids_RK = np.take_along_axis(ids_RK, order_RK, 1)
    return ids_RK.astype(np.uint32), np.take_along_axis(logprobs_RV, ids_RK, 1)


def with_what_is_left(ids_RK: Array, logs_RK: Array) -> StoredRows:
    """Rows whose tail is what the entries leave; entries that pass 1 are scaled to 1."""
    logs_RK = logs_RK.astype(np.float64)
    mass_R = np.exp(logs_RK).sum(1)
    logs_RK = logs_RK - np.log(np.maximum(mass_R, 1.0))[:, None]
    num_rows, num_entries = ids_RK.shape
    return StoredRows(
        ids_RK.ravel(),
        logs_RK.ravel(),
        np.arange(num_rows + 1, dtype=np.int64) * num_entries,
        np.maximum(1.0 - mass_R, 0.0),
    )


def best_least_tail(logprobs_RV: Array, rows: StoredRows) -> float:
    """The least tail, of powers of ten between 1e-9 and 1e-1, that gives the smallest mean KL."""
    short = rows.tail_mass_R < 0.1
    candidates = 10.0 ** np.arange(-9.0, -0.9, 0.5)
    picked = np.flatnonzero(short)
    if not len(picked):
        return float(candidates[0])
    part = take(rows, picked)
    full_RV = logprobs_RV[picked]
    nats = [measure(full_RV, with_least_tail(part, e)).means().kl_nats for e in candidates]
    return float(candidates[int(np.argmin(nats))])


def take(rows: StoredRows, picked_R: Array) -> StoredRows:
    """Rows of one length by their index."""
    num_entries = int(rows.offsets_R1[1])
    return StoredRows(
        rows.entry_ids_E.reshape(-1, num_entries)[picked_R].ravel(),
        rows.entry_logprobs_E.reshape(-1, num_entries)[picked_R].ravel(),
        np.arange(len(picked_R) + 1, dtype=np.int64) * num_entries,
        rows.tail_mass_R[picked_R],
    )


def id_bits(vocab_size: int) -> int:
    """ceil(log2 V)."""
    return max(1, (vocab_size - 1).bit_length())


def pack_ids(ids_RK: Array, bits: int) -> npt.NDArray[np.uint8]:
    """[R, C]: each row's ids bit after bit, padded to a whole byte."""
    ones = (ids_RK[:, :, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(ones.astype(np.uint8).reshape(len(ids_RK), -1), axis=1)


def unpack_ids(packed_RC: npt.NDArray[np.uint8], bits: int, num_entries: int) -> Array:
    """The inverse of `pack_ids`."""
    ones = np.unpackbits(packed_RC, axis=1, count=bits * num_entries)
    ones_RKB = ones.reshape(len(packed_RC), num_entries, bits).astype(np.uint32)
    ids_RK: Array = (ones_RKB << np.arange(bits, dtype=np.uint32)).sum(2, dtype=np.uint32)
    return ids_RK


def to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """The upper half of float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bfloat16(halves: Array) -> npt.NDArray[np.float32]:
    """The float32 that a bfloat16 stands for."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def as_bytes(values: Array) -> npt.NDArray[np.uint8]:
    """[R, C] of a matrix of numbers."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def from_bytes(packed_RC: npt.NDArray[np.uint8], dtype: str) -> Array:
    """The inverse of `as_bytes`."""
    return np.ascontiguousarray(packed_RC).view(dtype)
