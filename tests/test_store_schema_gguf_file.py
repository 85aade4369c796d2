"""GGUF files as model folders: weights, tokenizer, BOS rule, and files that cannot be used."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from store_schema.config import ModelRef
from store_schema.errors import ConfigError, LogitfuseError, ModelError, TokenizerError
from store_schema.model import gguf_file
from store_schema.model.gguf_file import read_header, unpack
from store_schema.model.gguf_tokenizer import adds_bos, as_trained
from store_schema.model.models import (
    is_gguf,
    local_ref,
    model_config,
    resolve_model,
    resolved_dtype,
)
from store_schema.text.tokenizer import SegmentTokenizer
from tests.tiny import SAMPLE_TEXTS, tiny_model
from tests.tiny_gguf import TEMPLATE, write_gguf

# transformers reads numbers of a GGUF file through arrays of one element.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOGITFUSE_CACHE", str(folder))
    return folder


@pytest.mark.parametrize(
    ("quantization", "kept"), [("Q8_0", "bfloat16"), ("F16", "float16"), ("F32", "float32")]
)
def test_weights_are_those_of_the_format_s_own_library(
    model: Path, tmp_path: Path, quantization: str, kept: str
) -> None:
    written = write_gguf(model, tmp_path / "m.gguf", quantization=quantization)
    exact = AutoModelForCausalLM.from_pretrained(unpack(tmp_path / "m.gguf", "float32"))
    read = exact.state_dict()
    assert read.keys() == written.keys()
    for name, values in written.items():
        assert np.array_equal(read[name].numpy(), values), name
    folder = unpack(tmp_path / "m.gguf")
    assert resolved_dtype(ModelRef(model="m"), model_config(folder)) == kept
    rounded = AutoModelForCausalLM.from_pretrained(folder)
    for name, values in rounded.state_dict().items():
        assert torch.equal(values, read[name].to(getattr(torch, kept))), name


def test_logits_are_the_model_s(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf", quantization="F32")
    ids = torch.tensor([[1, 7, 30, 200, 311]])
    with torch.no_grad():
        true = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        read = AutoModelForCausalLM.from_pretrained(unpack(tmp_path / "m.gguf"))(ids).logits
    torch.testing.assert_close(read, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bos", [True, False])
def test_the_tokenizer_keeps_bos_rule_template_and_special_tokens(
    model: Path, tmp_path: Path, bos: bool
) -> None:
    write_gguf(model, tmp_path / "m.gguf", bos=bos, pre="gpt-2")
    ref = ModelRef(model=str(tmp_path / "m.gguf"))
    read = SegmentTokenizer.load(ref, name="m")
    own = SegmentTokenizer.load(ModelRef(model=str(model)), name="own")
    assert read.bos_ids == ((own.bos_id,) if bos else ())
    assert (read.roles.bos_token, read.eos_id) == (own.roles.bos_token, own.eos_id)
    assert read.roles.chat_template == TEMPLATE
    texts = [text for texts in SAMPLE_TEXTS.values() for text in texts]
    assert read.encode_text(texts) == own.encode_text(texts)
    stated = json.loads((resolve_model(ref) / "tokenizer_config.json").read_text())
    assert stated["add_bos_token"] is bos
    plain = AutoTokenizer.from_pretrained(resolve_model(ref))("12 a").input_ids
    assert plain == [*read.bos_ids, *read.encode_text(["12 a"])[0]]


def test_a_file_that_asks_for_bos_and_has_none_puts_nothing_before_a_text(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(model, tmp_path / "m.gguf", bos=True, bos_id=None)
    ref = ModelRef(model=str(tmp_path / "m.gguf"))
    tokenizer = SegmentTokenizer.load(ref, name="m")
    assert (tokenizer.bos_ids, tokenizer.bos_id) == ((), None)
    tokenizer.warn_of_missing_bos()
    assert "nothing is put before a text" in caplog.messages[-1]
    with pytest.raises(TokenizerError, match="no BOS token"):
        SegmentTokenizer.load(ref.model_copy(update={"bos": "always"}), name="m")


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_text_is_cut_by_the_rule_that_the_file_names(text: str) -> None:
    spec = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}

    def cut(pre: str) -> list[str]:
        made = as_trained(
            spec, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}, where="m"
        )
        rest = {"version": "1.0", "truncation": None, "padding": None, "decoder": None}
        tokenizer = Tokenizer.from_str(json.dumps(made | rest))
        assert tokenizer.pre_tokenizer is not None
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    assert cut("smollm") == [piece for piece, _ in digits.pre_tokenize_str(text)]
    plain = pre_tokenizers.ByteLevel(False)
    assert cut("gpt-2") == [piece for piece, _ in plain.pre_tokenize_str(text)]
    three = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    three += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    llama3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(three), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    assert cut("llama-bpe") == [piece for piece, _ in llama3.pre_tokenize_str(text)]


def test_runs_that_are_read_whole_come_before_other_merges_the_longest_first() -> None:
    pieces = ["<unk>", "▁", "▁▁", "▁▁▁", "▁▁▁▁", "a", "▁a"]
    spec = {
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [["▁", "a"], ["▁", "▁"], ["▁▁", "▁"], ["▁▁", "▁▁"], ["▁▁▁", "▁"]],
        },
    }
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": ["<unk>", "▁", "  ", "   ", "    ", "a", "▁a"],
        "tokenizer.ggml.token_type": [2, 1, 4, 4, 4, 1, 1],
        "tokenizer.ggml.add_bos_token": False,
    }
    made = as_trained(spec, metadata, where="m")
    made |= {"version": "1.0", "truncation": None, "padding": None}
    tokenizer = Tokenizer.from_str(json.dumps(made))
    assert tokenizer.encode("       a").tokens == ["▁▁▁▁", "▁▁▁", "a"]
    assert tokenizer.decode(tokenizer.encode("  a a").ids) == "  a a"
    no_such = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 2**32 - 1}
    assert as_trained(spec, metadata | no_such, where="m")["post_processor"] is None


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"model": "llama"}, True),
        ({"model": "llama", "add_bos_token": False}, False),
        ({"model": "gpt2", "pre": "qwen2"}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "qwen2", "add_bos_token": True}, True),
    ],
)
def test_the_bos_rule_is_the_file_s_else_the_format_s(
    metadata: dict[str, object], expected: bool
) -> None:
    assert adds_bos({f"tokenizer.ggml.{k}": v for k, v in metadata.items()}) is expected


@pytest.mark.parametrize("pre", [None, "default", "somebody-s"])
def test_an_unknown_rule_is_refused_and_a_tokenizer_beside_the_file_helps(
    model: Path, tmp_path: Path, cache: Path, pre: str | None
) -> None:
    write_gguf(model, tmp_path / "m.gguf", pre=pre, bos=None)
    with pytest.raises(TokenizerError, match=r"splits text.*tokenizer\.json beside"):
        unpack(tmp_path / "m.gguf")
    assert not [path for path in (cache / "gguf").iterdir() if path.is_dir()]
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((model / "tokenizer_config.json").read_bytes())
    ref = ModelRef(model=str(tmp_path), gguf_file="m.gguf")
    own = SegmentTokenizer.load(ModelRef(model=str(model)), name="own")
    assert SegmentTokenizer.load(ref, name="m").encode_text(["a 12"]) == own.encode_text(["a 12"])


def test_a_file_is_unpacked_once_and_another_content_is_another_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(model, tmp_path / "m.gguf")
    ref = ModelRef(model=str(tmp_path), gguf_file="m.gguf")
    assert is_gguf(ref)
    first = local_ref(ref)
    assert first.gguf_file is None
    assert Path(first.model) == resolve_model(ref)
    monkeypatch.setattr(gguf_file, "_make", lambda *_: pytest.fail("unpacked again"))
    assert local_ref(ref) == first
    monkeypatch.undo()
    os.environ["LOGITFUSE_CACHE"] = str(Path(first.model).parents[1])
    try:
        write_gguf(model, tmp_path / "m.gguf", bos=False)
        assert local_ref(ref) != first
    finally:
        del os.environ["LOGITFUSE_CACHE"]


def test_two_at_once_make_one_folder(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(model, tmp_path / "m.gguf")
    made: list[Path] = []
    monkeypatch.setattr(gguf_file, "_save_tokenizer", lambda *_: None)
    monkeypatch.setattr(gguf_file, "_save_weights", lambda file, dtype, part: made.append(part))
    found: list[Path] = []
    workers = [
        threading.Thread(target=lambda: found.append(unpack(tmp_path / "m.gguf"))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(found)) == 1
    assert len(made) == 1
    assert [path.name for path in (cache / "gguf").iterdir() if path.is_dir()] == [found[0].name]


def test_a_failed_unpacking_leaves_nothing(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(model, tmp_path / "m.gguf")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_file, "_save_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "m.gguf")
    assert not [path for path in (cache / "gguf").iterdir() if path.is_dir()]


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_cut_file_is_one_line(model: Path, tmp_path: Path, kept: float) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(model, file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(ModelError, match=r"GGUF file is (damaged or )?truncated"):
        unpack(file)


@given(st.integers(4, 40_000), st.binary(min_size=1, max_size=8))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_header_is_read_or_refused(
    model: Path, tmp_path: Path, place: int, damage: bytes
) -> None:
    file = tmp_path / "m.gguf"
    if not (tmp_path / "whole").exists():
        write_gguf(model, file)
        (tmp_path / "whole").write_bytes(file.read_bytes())
    whole = (tmp_path / "whole").read_bytes()
    file.write_bytes(whole[:place] + damage + whole[place + len(damage) :])
    with contextlib.suppress(LogitfuseError):
        read_header(file)


def test_what_is_no_gguf_of_a_known_model_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="GGUF file not found"):
        resolve_model(ModelRef(model=str(tmp_path / "gone.gguf")))
    (tmp_path / "text.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match=r"pointer of git-lfs.*text\.gguf"):
        unpack(tmp_path / "text.gguf")
    (tmp_path / "text.gguf").write_text("some text")
    with pytest.raises(ModelError, match="not a GGUF file"):
        unpack(tmp_path / "text.gguf")
    write_gguf(model, tmp_path / "m.gguf", architecture="clip")
    with pytest.raises(ModelError, match=r"cannot be read by transformers.*clip"):
        unpack(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"no config\.json.*m\.gguf.*gguf_file"):
        resolve_model(ModelRef(model=str(tmp_path)))
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        read_header(tmp_path / "m.gguf")
