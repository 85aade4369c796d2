"""The parameters that a capture of DistillKit was compressed with, as its YAML files have them.

A capture says nothing of them itself: its folder has a `compression_config.yaml`, or the run file of a
distillation has them as `teacher.logprob_compressor` or `teacher.legacy_logit_compression`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from store_schema.capture.bits import FloatName, float_bytes, row_bytes, row_words
from store_schema.config import StrictModel
from store_schema.errors import ConfigError
from store_schema.validation import validation_line
from store_schema.yaml_file import read_yaml

PARAMS_FILE = "compression_config.yaml"
MOST_BITS = 63
MOST_ENTRIES = 1 << 16

Term = Literal["sqrt", "exp"] | int


def id_bits(vocab_size: int) -> int:
    """Bits of an id: the logarithm of the vocabulary's size, taken in float32 and rounded up."""
    return int(np.ceil(np.log2(np.float32(vocab_size))))


class Bin(StrictModel):
    """A run of neighbouring entries whose distances from the fit are kept, with one scale."""

    scale_dtype: FloatName
    element_bits: int = Field(ge=1, le=MOST_BITS)
    num_elements: int = Field(ge=1, le=MOST_ENTRIES)

    @property
    def num_bytes(self) -> int:
        """Of the scale and the elements of one position."""
        return float_bytes(self.scale_dtype) + row_bytes(self.num_elements, self.element_bits)


class Params(StrictModel):
    """The present format (`logprob_compressor`)."""

    d: int = Field(ge=2, le=1 << 24)
    """Size of the vocabulary: ids lie below it."""
    k: int = Field(ge=1, le=MOST_ENTRIES)
    """Entries of a position."""
    exact_k: int = Field(ge=0)
    """Entries, from the most probable on, whose value is kept as it is."""
    exact_dtype: FloatName = "float32"
    polynomial_terms: tuple[Term, ...] | None = None
    """Of the curve over the rank that stands for the other entries: powers, `sqrt` and `exp`."""
    term_dtype: FloatName = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    """Whether differences of neighbouring entries are kept in place of values."""
    error_diffusion: bool = False
    """How its writer rounded: nothing that a reader needs."""
    normalize_t: bool = False
    """Whether ranks are scaled to [0, 1]."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        rest = self.k - self.exact_k
        if rest < 0:
            raise ValueError("exact_k must not be larger than k")
        if rest and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("exact_k below k needs polynomial_terms or residual_bins")
        if sum(part.num_elements for part in self.residual_bins) > rest:
            raise ValueError("residual_bins have more elements than there are inexact entries")
        return self

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's ids."""
        return row_bytes(self.k, id_bits(self.d))

    @property
    def logprob_bytes(self) -> int:
        """Bytes of a position's log-probabilities."""
        terms = len(self.polynomial_terms or ()) * float_bytes(self.term_dtype)
        exact = self.exact_k * float_bytes(self.exact_dtype)
        return exact + terms + sum(part.num_bytes for part in self.residual_bins)


class LegacyParams(StrictModel):
    """The earlier format (`legacy_logit_compression`)."""

    vocab_size: int = Field(ge=2, le=1 << 24)
    k: int = Field(ge=1, le=MOST_ENTRIES)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0, le=64)
    invert_polynomial: bool = True
    """Whether powers are negative."""
    with_sqrt_term: bool = False
    term_dtype: str = "float32"
    """Of its writer; files have float32."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError("exact_k must not be larger than k")
        return self

    @property
    def d(self) -> int:
        """Size of the vocabulary."""
        return self.vocab_size

    @property
    def num_terms(self) -> int:
        """Coefficients of a position."""
        if self.exact_k == self.k:
            return 0
        return self.polynomial_degree + 1 + self.with_sqrt_term

    @property
    def id_words(self) -> int:
        """64-bit words of a position's ids."""
        return row_words(self.k, id_bits(self.d))


AnyParams = Params | LegacyParams


def read_params(path: Path) -> AnyParams:
    """The parameters in a YAML file: by themselves, or in the run file of a distillation.

    Raises:
        ConfigError: The file is missing, has none, or one of them is wrong.
    """
    raw: Any = read_yaml(path, "compression parameters")
    found: Any = raw.get("teacher", raw)
    found = found if isinstance(found, dict) else {}
    kind: type[AnyParams] = LegacyParams if "polynomial_degree" in found else Params
    if found.get("logprob_compressor") is not None:
        found, kind = found["logprob_compressor"], Params
    elif found.get("legacy_logit_compression") is not None:
        found, kind = found["legacy_logit_compression"], LegacyParams
    if not isinstance(found, dict) or not found.keys() & {"d", "vocab_size"}:
        raise ConfigError(
            "no compression parameters",
            where=path,
            expected="d, k, exact_k and so on, as in DistillKit's compression_config.yaml",
            got=", ".join(map(str, raw)) or "an empty file",
        )
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        line = validation_line(error, kind)
        raise ConfigError(f"compression parameters refused in {path}: {line}") from error
