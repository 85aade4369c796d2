"""Text that is not NFC: one form for all models, asked for by a tokenizer or by the run file."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from tokenizers.normalizers import NFC

import extract.corpus.normal_form
from extract.corpus.corpus import corpus_location, iter_documents, open_corpus, read_documents
from extract.corpus.documents import Document, context_json
from extract.corpus.normal_form import _UNDECIDED, nfc, nfc_document, reads_nfc
from store_schema.config import ModelRef, load_run
from store_schema.text.tokenizer import SegmentTokenizer
from tests.command import ok, refused
from tests.extract_runs import sample_documents, write_jsonl, write_run
from tests.tiny import tiny_model, tiny_tokenizer

APART, COMPOSED = "cafe\u0301", "caf\u00e9"
MARKS = [chr(i) for i in range(0x300, 0x370)] + ["\u3099", "\u0f72", "\u093c", "\u11a8", "\u1161"]
TEXTS = st.lists(
    st.sampled_from(
        [*MARKS, "e", "a", "o", "<", "\n", " ", "か", "\u1100", "가", "\u212b", "\u0374"]
    )
    | st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
    max_size=12,
).map("".join)


def tokenizer_of(*steps: Any) -> SegmentTokenizer:
    hf = tiny_tokenizer("byte_level")
    hf.backend_tokenizer.normalizer = (
        steps[0] if len(steps) == 1 else normalizers.Sequence(list(steps))
    )
    return SegmentTokenizer(hf, name="q")


@pytest.fixture(scope="module")
def composing() -> list[SegmentTokenizer]:
    nothing = normalizers.Replace("never in a text of these tests", "")
    return [tokenizer_of(NFC()), tokenizer_of(nothing, NFC())]


@given(text=TEXTS, cut=st.floats(0, 1))
def test_tokens_join_to_any_normalised_text(
    composing: list[SegmentTokenizer], text: str, cut: float
) -> None:
    normal = nfc(text)
    assert nfc(normal) == normal
    place = round(cut * len(normal))
    parts = [part for part in (normal, normal[:place], normal[place:]) if part]  # as segments are
    for tokenizer in composing:
        assert [ends[-1] for ends in tokenizer.token_ends(parts)] == [
            len(part.encode()) for part in parts
        ]


def test_text_that_is_not_looked_at_is_nfc() -> None:
    """Characters that are neither changed nor joined to, in any order, by anyone's Unicode."""
    skipped = [c for i in range(0x110000) if not _UNDECIDED.match(c := chr(i))]
    assert len(skipped) > 30_000
    pieces = {d for i in range(0x110000) if (d := unicodedata.decomposition(chr(i)))}
    pairs = [piece.split() for piece in pieces if " " in piece and piece[0] != "<"]
    assert not {chr(int(second, 16)) for _, second in pairs} & set(skipped)
    assert not any(map(unicodedata.combining, skipped))
    assert [NFC().normalize_str(c) for c in skipped] == skipped


def test_context_is_normalised_inside_its_json() -> None:
    messages = [{"role": "user", "content": f'{APART} \n\u0303 <\u0338 "\u0301'}]
    before = Document("d", "x", "train", context_json({"messages": messages}), "plain")
    after = nfc_document(before)
    assert json.loads(after.context or "") == {
        "messages": [{"role": "user", "content": nfc(messages[0]["content"])}]
    }
    assert after.text == "plain"
    assert nfc_document(after) is after
    plain = Document("d", "x", "train", None, COMPOSED)
    assert nfc_document(plain) is plain


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"normalizer": {"type": "NFC"}}, True),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Strip"}]}}, False),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}, True),
        ({"normalizer": None}, False),
        ({"normalizer": {"type": "NFKC"}}, False),
        # Words of the vocabulary and of added tokens are not the key.
        ({"model": {"vocab": {"normalizer": 7, '"normalizer": {': 8}}}, None),
        (
            {
                "added_tokens": [{"content": '"normalizer": null'}],
                "model": {"vocab": {"normalizer": 7}},
                "normalizer": {"type": "NFC"},
            },
            True,
        ),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_the_normaliser_is_found_without_building(
    tmp_path: Path, content: dict[str, Any], found: bool | None, indent: int | None
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=indent))
    assert reads_nfc(ModelRef(model=str(tmp_path))) is found


def test_a_tokenizer_that_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    for model in (str(tmp_path), "./gone", "some/model"):
        assert reads_nfc(ModelRef(model=model)) is None
    for damaged in (b"\xff", b'{"normalizer": {', b"version https://git-lfs.github.com/spec/v1"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        assert reads_nfc(ModelRef(model=str(tmp_path))) is None


@pytest.fixture
def models(tmp_path: Path, tiny_models: dict[str, Path]) -> dict[str, Path]:
    hf = tiny_tokenizer("byte_level")
    hf.backend_tokenizer.normalizer = NFC()
    return {
        "code": tiny_models["code"],
        "qwen": tiny_model(tmp_path / "qwen", "qwen2", hf),
        "target": tiny_models["target"],
    }


def documents_of(path: Path) -> list[Document]:
    location = corpus_location(load_run(path))
    return list(iter_documents(read_documents(location, open_corpus(location))))


def test_one_tokenizer_that_composes_decides_for_all(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    given_texts = sample_documents()
    assert [d["id"] for d in given_texts if nfc(d["text"]) != d["text"]] == ["prose-1"]
    path = write_run(tmp_path, models)
    said = ok("corpus", "build", path)
    assert "text of 1 documents was normalised to NFC, as the tokenizer of qwen reads it" in said
    assert [d.text for d in documents_of(path)] == [nfc(d["text"]) for d in given_texts]
    assert "nothing to do" in ok("corpus", "build", path)
    ok("extract", "plan", path)
    # What all models read already stays when the one that asked for it goes.
    path = write_run(tmp_path, {name: models[name] for name in ("code", "target")})
    assert "nothing to do" in ok("corpus", "build", path)


def test_kept_text_is_refused_where_a_tokenizer_composes(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    path = write_run(tmp_path, models)
    keep = ("--set", "corpus.unicode=keep")
    assert "1 documents are not NFC and were kept unchanged" in ok("corpus", "build", path, *keep)
    assert [d.text for d in documents_of(path)] == [d["text"] for d in sample_documents()]
    line = refused("extract", "plan", path, *keep)
    assert "document prose-1 from byte 0, tokenizer of qwen" in line
    assert "set `corpus.unicode: nfc`" in line
    dropping = (*keep, "--set", "corpus.on_bad=drop")
    ok("corpus", "build", path, *dropping)
    assert "tokenizer_changes_text 1" in ok("extract", "plan", path, *dropping)


def test_a_source_that_composes_comes_later(tmp_path: Path, models: dict[str, Path]) -> None:
    without = {name: models[name] for name in ("code", "target")}
    path = write_run(tmp_path, without)
    assert "were kept unchanged" in ok("corpus", "build", path)
    path = write_run(tmp_path, models)
    assert "set `corpus.unicode: nfc`" in refused("extract", "plan", path)
    assert "normalised to NFC" in ok("corpus", "build", path)
    ok("extract", "plan", path)


def test_no_model_is_asked_about_text_that_is_nfc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(ref: ModelRef) -> bool:
        raise AssertionError(ref)

    monkeypatch.setattr(extract.corpus.normal_form, "reads_nfc", asked)
    write_jsonl(tmp_path / "docs.jsonl", [{"text": COMPOSED, "domain": "d", "split": "train"}])
    gone = {"a": Path("far/away"), "target": Path("far/off")}
    path = write_run(tmp_path, gone)
    said = ok("corpus", "build", path)
    assert "NFC" not in said
    # Whatever is asked for now, such a corpus is as it would be.
    for unicode in ("nfc", "keep"):
        again = ok("corpus", "build", path, "--set", f"corpus.unicode={unicode}")
        assert "nothing to do" in again


def test_normalised_because_it_was_asked_for(tmp_path: Path) -> None:
    row = {"id": APART, "text": APART, "prompt": "x", "domain": APART, "split": "train"}
    write_jsonl(tmp_path / "docs.jsonl", [row])
    path = write_run(tmp_path, {"a": Path("far/away"), "target": Path("far/off")})
    said = ok("corpus", "build", path, "--set", "corpus.unicode=nfc")
    assert "text of 1 documents was normalised to NFC (corpus.unicode)" in said
    # Names are names.
    assert documents_of(path) == [Document(APART, APART, "train", None, COMPOSED)]
