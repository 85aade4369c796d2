"""Fingerprints of tokenizers, computed quickly: those of the plain computation, to the last byte."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from store_schema.config import ModelRef
from store_schema.fingerprint import (
    bytes_digest,
    canonical_json,
    canonical_list,
    canonical_rows,
    fingerprint,
)
from store_schema.text.specials import text_reader
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.tokenizer_class import model_rules
from tests.tokenizer_zoo import FAMILIES, WORLD, zoo

SURROGATES = range(0xD800, 0xE000)
TEXTS = [*WORLD, " a  b\n\n c</s><s><|endoftext|>", "def f(x):\n\treturn x<eos><bos>"]


def test_rows_of_texts_and_numbers_have_their_canonical_json() -> None:
    rows: list[list[str | int]] = [
        [chr(i), i] for i in range(sys.maxunicode + 1) if i not in SURROGATES
    ]
    assert canonical_rows(rows) == canonical_json(rows)
    assert canonical_rows([]) == canonical_json([])


@given(st.lists(st.lists(st.text() | st.integers(-(1 << 63), 1 << 63))), st.text())
def test_a_list_of_canonical_items_is_canonical(rows: list[list[Any]], text: str) -> None:
    assert canonical_rows(rows) == canonical_json(rows)
    whole = [rows, {"b": text, "a": None}, []]
    assert canonical_list(map(canonical_json, whole)) == canonical_json(whole)


def plain_rules(backend: Tokenizer) -> list[Any]:
    """`text_rules` as one JSON-like value, everything asked of the tokenizer itself."""
    steps = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    rules = [None if step is None else step.__getstate__().decode() for step in steps]
    added = sorted(backend.get_added_tokens_decoder().items())
    pieces = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda piece: piece[1])
    model = json.loads(backend.to_str())["model"]
    if model["type"] == "BPE":
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        state: list[Any] = [sorted(model_rules(backend).items()), merges]
    else:
        state = [bytes_digest(backend.model.__getstate__())]
    return [state, pieces, rules, [[i, token.__getstate__()] for i, token in added]]


def saved(folder: Path, family: str) -> Path:
    zoo(family).roles.save_pretrained(folder)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_is_that_of_the_plain_computation(family: str, tmp_path: Path) -> None:
    path = saved(tmp_path, family)
    loaded = SegmentTokenizer.load(ModelRef(model=str(tmp_path)), name="m")
    rules = plain_rules(Tokenizer.from_file(str(path)))
    for tokenizer in (loaded, zoo(family)):
        template, options = tokenizer.chat.text, [list(tokenizer.bos_ids), False, False]
        assert template is None
        assert tokenizer.fingerprint == fingerprint([*rules, template, options])
        assert tokenizer.rules_fingerprint == fingerprint(rules)


def test_merges_written_as_texts_are_the_same_merges(tmp_path: Path) -> None:
    path = saved(tmp_path, "gpt2")
    pairs = SegmentTokenizer.load(ModelRef(model=str(tmp_path)), name="m").fingerprint
    spec = json.loads(path.read_text())
    assert isinstance(spec["model"]["merges"][0], list)
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    path.write_text(json.dumps(spec))
    assert SegmentTokenizer.load(ModelRef(model=str(tmp_path)), name="m").fingerprint == pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reader_of_text_has_the_same_ids_and_no_special_tokens(
    family: str, tmp_path: Path
) -> None:
    whole = Tokenizer.from_file(str(saved(tmp_path, family)))
    before = whole.to_str()
    reader = text_reader(whole)
    if type(whole.model).__name__ == "BPE":
        same = json.loads(before) | {"post_processor": None, "truncation": None, "padding": None}
        assert json.loads(reader.to_str()) == same
    else:
        assert len(reader.get_vocab()) == len(whole.get_vocab())
    own = Tokenizer.from_str(before)
    special = {i for i, t in own.get_added_tokens_decoder().items() if t.special}
    for text in TEXTS:
        assert whole.encode(text).ids == own.encode(text).ids  # it is as it was
        ids = reader.encode(text).ids
        unknown = getattr(own.model, "unk_token", None)
        allowed = {own.token_to_id(unknown)} if unknown else set()
        allowed |= {reader.token_to_id("<unk>"), own.token_to_id("<unk>")}
        assert not (special - allowed) & set(ids)
    assert whole.to_str() == before
