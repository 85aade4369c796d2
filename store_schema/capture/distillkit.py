"""DistillKit's compressed captures: from the bytes of a position to its entries, and back.

Format (its README, "Logit Compression", and the code that the README describes, version 1.0.0). A
position's bytes are, in this order: the values of its `exact_k` best entries in `exact_dtype`; the
coefficients, in `term_dtype`, of a least-squares curve through the other values over their rank 0, 1,
...; for each of `residual_bins` a scale and the bin's residuals, as multiples of it in so many bits.
Ids are in bits of their own. Values are natural log-probabilities, falling, or their differences
(`delta_encoding`). What the reader here gives is what theirs gives, with its roundings.

The earlier format has ids in 64-bit words, and a curve over the ranks 1, 2, ... .

Shapes: R rows (positions), K entries, T terms, U entries that are not exact, C bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.capture.bits import (
    FloatName,
    float_bytes,
    pack_bits,
    pack_floats,
    rounded,
    unpack_bits,
    unpack_floats,
    unpack_words,
)
from store_schema.capture.params import Bin, LegacyParams, Params, id_bits

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Packed = npt.NDArray[np.uint8]

SMALLEST_SINGULAR_VALUE = 1e-5
"""Of the matrix of terms: smaller ones count as zero, in their fit and in ours."""


# ------------------------------------------------------------------------------- reading


def unpack_ids(packed_RC: Packed, params: Params) -> npt.NDArray[np.int64]:
    """[R, K] token ids, of rows of `params.id_bytes` bytes."""
    return unpack_bits(packed_RC, id_bits(params.d), params.k)


def unpack_logprobs(packed_RC: Packed, params: Params) -> Floats:
    """[R, K] values, of rows of `params.logprob_bytes` bytes; they are checked for nothing."""
    at = params.exact_k * float_bytes(params.exact_dtype)
    exact_RK = unpack_floats(packed_RC[:, :at], params.exact_dtype)
    terms = params.polynomial_terms or ()
    end = at + len(terms) * float_bytes(params.term_dtype)
    coefficients_RT = unpack_floats(packed_RC[:, at:end], params.term_dtype)
    rest_RU = np.zeros((len(packed_RC), params.k - params.exact_k))
    first = 0
    for part in params.residual_bins:
        stop = first + part.num_elements
        rest_RU[:, first:stop] = _residuals(packed_RC[:, end : end + part.num_bytes], part)
        first, end = stop, end + part.num_bytes
    rest_RU = rounded(rest_RU, params.exact_dtype)
    if terms and rest_RU.shape[1]:
        both = _wider(params.exact_dtype, params.term_dtype)
        rest_RU = rounded(_curve(coefficients_RT, params) + rest_RU, both)
    values_RK: Floats = np.concatenate([exact_RK, rest_RU], axis=1)
    if params.delta_encoding:
        sums_RK = np.cumsum(values_RK.astype(np.float32), axis=1)
        values_RK = rounded(sums_RK, params.exact_dtype)
    return values_RK


def _residuals(packed_RC: Packed, part: Bin) -> Floats:
    """[R, num_elements] of one bin."""
    size = float_bytes(part.scale_dtype)
    scale_R1 = unpack_floats(packed_RC[:, :size], part.scale_dtype)
    codes = unpack_bits(packed_RC[:, size:], part.element_bits, part.num_elements)
    values: Floats = _multiples(codes, part.element_bits) * scale_R1
    return values


def _multiples(codes: npt.NDArray[np.int64], bits: int) -> Floats:
    """What codes stand for, in units of the scale: -1 and 1, or from -2^(bits - 1) on."""
    if bits == 1:
        return codes.astype(np.float64) * 2 - 1
    return codes.astype(np.float64) - (1 << (bits - 1))


def _curve(coefficients_RT: Floats, params: Params) -> Floats:
    """[R, U] values of the curve, in the arithmetic of `term_dtype`."""
    basis_UT = rounded(_basis(params), params.term_dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        products = rounded(basis_UT * coefficients_RT[:, None, :], params.term_dtype)
        return rounded(products.sum(axis=2), params.term_dtype)


def _basis(params: Params) -> Floats:
    """[U, T] each term of the curve at each rank."""
    count = params.k - params.exact_k
    ranks = np.linspace(0, 1, count) if params.normalize_t else np.arange(count, dtype=np.float64)
    special = {"sqrt": np.sqrt, "exp": np.exp}
    with np.errstate(over="ignore", divide="ignore"):
        columns = [
            special[term](ranks) if isinstance(term, str) else ranks ** float(term)
            for term in params.polynomial_terms or ()
        ]
    return np.stack(columns, axis=1)


def _wider(one: FloatName, other: FloatName) -> FloatName:
    """The type that a sum of the two has."""
    sizes = {one: float_bytes(one), other: float_bytes(other)}
    if one != other and set(sizes.values()) == {2}:
        return "float32"
    return max(sizes, key=lambda name: sizes[name])


# ------------------------------------------------------------------------------- the earlier format


def unpack_legacy(
    words_RW: Array, exact_RK: Floats, coefficients_RT: Floats, params: LegacyParams
) -> tuple[npt.NDArray[np.int64], Floats]:
    """[R, K] ids and values of positions in the earlier format.

    Args:
        words_RW: Ids, `params.id_words` 64-bit words a row.
        exact_RK: Values of the `exact_k` best entries.
        coefficients_RT: Of the curve, `params.num_terms` a row.
        params: Of the capture.
    """
    ids_RK = unpack_words(words_RW, id_bits(params.d), params.k)
    ranks = np.arange(1, params.k - params.exact_k + 1, dtype=np.float64)
    sign = -1.0 if params.invert_polynomial else 1.0
    columns = [ranks ** (sign * power) for power in range(params.polynomial_degree + 1)]
    if params.with_sqrt_term:
        columns.append(np.sqrt(ranks))
    basis_UT = np.stack(columns, axis=1).astype(np.float32)
    rest_RU = np.zeros((len(exact_RK), len(ranks)), np.float32)
    if len(ranks):
        # In float32, as theirs: its rounding is not small where large terms cancel.
        rest_RU = (basis_UT * coefficients_RT[:, None, :].astype(np.float32)).sum(axis=2)
    return ids_RK, np.concatenate([exact_RK, rest_RU], axis=1)


# ------------------------------------------------------------------------------- writing


def pack_ids(ids_RK: Array, params: Params) -> Packed:
    """[R, C] bytes of the ids."""
    return pack_bits(ids_RK, id_bits(params.d))


def pack_logprobs(logprobs_RK: Array, params: Params) -> Packed:
    """[R, C] bytes of finite, falling log-probabilities, for any reader of the format."""
    values_RK = logprobs_RK.astype(np.float64)
    if params.delta_encoding:
        values_RK = np.diff(values_RK, axis=1, prepend=0.0)
    parts = [pack_floats(values_RK[:, : params.exact_k], params.exact_dtype)]
    rest_RU = values_RK[:, params.exact_k :]
    if params.polynomial_terms and rest_RU.shape[1]:
        coefficients_RT = rounded(rest_RU @ _solver(params), params.term_dtype)
        parts.append(pack_floats(coefficients_RT, params.term_dtype))
        rest_RU = rest_RU - _curve(coefficients_RT, params)
    elif params.polynomial_terms:
        zeros = np.zeros((len(values_RK), len(params.polynomial_terms)))
        parts.append(pack_floats(zeros, params.term_dtype))
    first = 0
    for part in params.residual_bins:
        parts.append(_pack_residuals(rest_RU[:, first : first + part.num_elements], part))
        first += part.num_elements
    return np.concatenate(parts, axis=1)


def _solver(params: Params) -> Floats:
    """[U, T] matrix that takes values to the coefficients of the best curve."""
    left, values, right = np.linalg.svd(_basis(params), full_matrices=False)
    used = values > SMALLEST_SINGULAR_VALUE
    inverse: Floats = left[:, used] / values[used] @ right[used]
    return inverse


def _pack_residuals(residuals_RU: Floats, part: Bin) -> Packed:
    """[R, C] of one bin: the scale from the largest residual, then the nearest multiples of it."""
    half = 1 << (part.element_bits - 1)
    largest_R1 = np.abs(residuals_RU).max(axis=1, keepdims=True)
    scale_R1 = rounded(np.where(largest_R1 == 0, 1.0, largest_R1 / half), part.scale_dtype)
    scale_R1[scale_R1 == 0] = 1.0  # too small for its type
    if part.element_bits == 1:
        codes: Array = residuals_RU > 0
    else:
        codes = np.clip(np.rint(residuals_RU / scale_R1), -half, half - 1).astype(np.int64) + half
    packed = pack_bits(codes, part.element_bits)
    return np.concatenate([pack_floats(scale_R1, part.scale_dtype), packed], axis=1)
