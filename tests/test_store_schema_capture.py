"""The packing of DistillKit's captures: our bytes and values beside its documented format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from store_schema.capture import distillkit
from store_schema.capture.bits import (
    FLOATS,
    pack_bits,
    pack_floats,
    pack_words,
    rounded,
    row_bytes,
    row_words,
    unpack_bits,
    unpack_floats,
    unpack_words,
)
from store_schema.capture.params import LegacyParams, Params, id_bits, read_params
from store_schema.errors import ConfigError
from tests import captures

VOCAB = 1000
ERROR = 1e-3
"""Nats."""


def entries(k: int, rows: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and float32 log-probabilities of the best of made-up distributions, most probable first."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, VOCAB))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    return ids, np.take_along_axis(logprobs, ids, 1).astype(np.float32)


def described(name: str) -> tuple[dict[str, Any], Params]:
    config = captures.CONFIGS[name] | {"d": VOCAB}
    return config, Params.model_validate(config)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_bits_come_back_and_are_the_documented_ones(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 63))
    count = data.draw(st.integers(1, 20))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    numbers = data.draw(st.lists(row, min_size=1, max_size=4))
    packed = pack_bits(np.array(numbers, np.uint64), bits)
    assert packed.shape == (len(numbers), row_bytes(count, bits))
    assert [bytes(part) for part in packed] == [captures.to_bits(part, bits) for part in numbers]
    assert unpack_bits(packed, bits, count).tolist() == numbers


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_words_come_back(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 31))
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    packed = pack_words(np.array([numbers], np.uint64), bits)
    assert packed.shape == (1, row_words(len(numbers), bits))
    assert unpack_words(packed, bits, len(numbers)).tolist() == [numbers]
    each = 64 // bits
    words = [
        sum(number << (bits * i) for i, number in enumerate(numbers[first : first + each]))
        for first in range(0, len(numbers), each)
    ]
    assert packed[0].tolist() == words


@given(st.lists(st.floats(-1e3, 0, width=32), min_size=1, max_size=9), st.sampled_from(FLOATS))
@settings(max_examples=100, deadline=None)
def test_floats_are_those_of_their_type(values: list[float], name: Any) -> None:
    packed = pack_floats(np.array([values]), name)
    assert bytes(packed[0]) == b"".join(captures.to_bytes(value, name) for value in values)
    read = unpack_floats(packed, name)
    assert read[0].tolist() == captures.from_bytes(bytes(packed[0]), name)
    np.testing.assert_array_equal(rounded(np.array([values]), name), read)


def test_infinity_is_a_bfloat16() -> None:
    assert rounded(np.array([-np.inf, -0.0]), "bfloat16").tolist() == [-np.inf, 0.0]


@pytest.mark.parametrize("name", captures.CONFIGS)
def test_their_bytes_read_as_documented(name: str, record_property: Any) -> None:
    config, params = described(name)
    ids, logprobs = entries(params.k)
    written = [captures.write_values(row.tolist(), config) for row in logprobs]
    packed = np.array([list(data) for data in written], np.uint8)
    assert packed.shape[1] == params.logprob_bytes
    expected = np.array([captures.read_values(data, config) for data in written])
    error = np.abs(distillkit.unpack_logprobs(packed, params) - expected).max()
    # A NumPy number does not travel between the processes of pytest-xdist.
    record_property("import_capture_max_error", float(error))
    assert error <= ERROR
    bits = captures.id_bits(VOCAB)
    packed = np.array([list(captures.to_bits(row.tolist(), bits)) for row in ids], np.uint8)
    assert packed.shape[1] == params.id_bytes
    np.testing.assert_array_equal(distillkit.unpack_ids(packed, params), ids)


@pytest.mark.parametrize("name", captures.CONFIGS)
def test_our_bytes_are_read_by_the_documented_reader(name: str) -> None:
    config, params = described(name)
    ids, logprobs = entries(params.k, seed=1)
    packed = distillkit.pack_logprobs(logprobs, params)
    read = np.array([captures.read_values(bytes(row), config) for row in packed])
    best = np.array([captures.read_values(captures.write_values(r.tolist(), config), config)
                     for r in logprobs])  # fmt: skip
    # As near to the values as the plain writer, whose fit is the best there is.
    assert np.abs(read - logprobs).mean() <= np.abs(best - logprobs).mean() * 1.01 + 1e-6
    assert np.abs(distillkit.unpack_logprobs(packed, params) - read).max() <= ERROR
    bits = captures.id_bits(VOCAB)
    for row, data in zip(ids, distillkit.pack_ids(ids, params), strict=True):
        assert captures.from_bits(bytes(data), bits, params.k) == row.tolist()


def test_all_exact_keeps_every_value() -> None:
    params = Params(d=VOCAB, k=9, exact_k=9, delta_encoding=False)
    _, logprobs = entries(9)
    read = distillkit.unpack_logprobs(distillkit.pack_logprobs(logprobs, params), params)
    np.testing.assert_array_equal(read, logprobs)


@pytest.mark.parametrize("options", [{}, {"invert_polynomial": False, "with_sqrt_term": True}])
def test_the_earlier_format(options: dict[str, Any]) -> None:
    params = LegacyParams(vocab_size=VOCAB, k=30, exact_k=6, polynomial_degree=3, **options)
    rng = np.random.default_rng(0)
    ids, exact = entries(30)[0], -np.sort(rng.exponential(1, (40, 6)))
    coefficients = rng.normal(0, 0.1, (40, params.num_terms))
    words = pack_words(ids, id_bits(VOCAB))
    found_ids, found = distillkit.unpack_legacy(words, exact, coefficients, params)
    np.testing.assert_array_equal(found_ids, ids)
    np.testing.assert_array_equal(found[:, :6], exact)
    sign = 1 if "invert_polynomial" in options else -1
    for rank in range(24):
        terms = [(rank + 1.0) ** (sign * power) for power in range(4)]
        terms += [(rank + 1.0) ** 0.5] if options else []
        np.testing.assert_allclose(found[:, 6 + rank], coefficients @ terms, rtol=1e-5, atol=1e-3)


def test_bits_of_an_id() -> None:
    assert [id_bits(n) for n in (2, 3, 256, 257, 131_072, 131_073, 262_145)] == [
        1, 2, 8, 9, 17, 18, 19,
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of their code
@pytest.mark.parametrize("name", captures.CONFIGS)
def test_their_own_code_agrees(name: str) -> None:
    package = captures.theirs()
    import torch

    config, params = described(name)
    ids, logprobs = entries(params.k, seed=2)
    own = package.LogprobCompressor(
        config=package.DistributionQuantizationConfig.model_validate(config)
    )
    row = own.compress_from_sparse(torch.tensor(ids)[None], torch.tensor(logprobs)[None])
    expected_ids, expected = own.decompress_to_sparse(row)
    packed = {key: value[0].numpy() for key, value in row.items()}
    found = distillkit.unpack_logprobs(packed["compressed_logprobs"], params)
    assert np.abs(found - expected[0].double().numpy()).max() <= ERROR
    found_ids = distillkit.unpack_ids(packed["bytepacked_indices"], params)
    np.testing.assert_array_equal(found_ids, expected_ids[0].numpy())
    ours = {
        "compressed_logprobs": torch.tensor(distillkit.pack_logprobs(logprobs, params))[None],
        "bytepacked_indices": torch.tensor(distillkit.pack_ids(ids, params))[None],
    }
    read_ids, read = own.decompress_to_sparse(ours)
    np.testing.assert_array_equal(read_ids[0].numpy(), ids)
    packed_ours = ours["compressed_logprobs"][0].numpy()
    here = distillkit.unpack_logprobs(packed_ours, params)
    assert np.abs(here - read[0].double().numpy()).max() <= ERROR


# ------------------------------------------------------------------------------- parameters


def _file(folder: Path, content: Any) -> Path:
    path = folder / "compression.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_parameters_are_read_from_any_of_their_files(tmp_path: Path) -> None:
    config = captures.BUDGET | {"d": VOCAB}
    expected = Params.model_validate(config)
    for content in (
        config,
        {"logprob_compressor": config},
        {"project_name": "p", "teacher": {"kind": "dataset", "logprob_compressor": config}},
    ):
        assert read_params(_file(tmp_path, content)) == expected
    legacy = {"vocab_size": VOCAB, "k": 30, "exact_k": 6, "polynomial_degree": 3}
    for content in (legacy, {"teacher": {"legacy_logit_compression": legacy}}):
        assert read_params(_file(tmp_path, content)) == LegacyParams.model_validate(legacy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"teacher": {"kind": "hf"}}, "no compression parameters"),
        ("[1, 2]", "is not a mapping"),
        ({"d": "<your_vocab_size_here>", "k": 4, "exact_k": 4}, "d: "),
        ({"d": 10, "k": 4, "exact_k": 5}, "exact_k must not be larger than k"),
        ({"d": 10, "k": 4, "exact_k": 1}, "needs polynomial_terms or residual_bins"),
        ({"d": 10, "k": 4, "exact_k": 4, "exact_kind": 1}, "exact_kind: unknown key"),
        (
            captures.BARE | {"d": 10, "k": 5},
            "residual_bins have more elements than there are inexact entries",
        ),
        ({"vocab_size": 9, "k": 2, "exact_k": 3, "polynomial_degree": 1}, "exact_k must not"),
    ],
)
def test_wrong_parameters_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_params(_file(tmp_path, content))
    assert message in caught.value.line()
    assert "compression.yaml" in caught.value.line()
