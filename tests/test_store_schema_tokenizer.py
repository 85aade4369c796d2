"""Tokens as bytes: every tokenizer family, any text, special tokens as roles and as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from store_schema.config import ModelRef
from store_schema.errors import CorruptionError, ModelError, NoRowError, TokenizerError
from store_schema.text.piece_bytes import vocabulary_of
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary
from tests import store_factory
from tests.tiny import SAMPLE_TEXTS, add_beyond_rows, tiny_model, tiny_tokenizer
from tests.tokenizer_zoo import (
    CHANGING,
    CL100K,
    FAMILIES,
    WORLD,
    from_ranks,
    house_texts,
    trained_ranks,
    zoo,
)
from tests.tokenizer_zoo import LOSSLESS as FAMILIES_THAT_JOIN

ALL_TEXTS = [text for texts in SAMPLE_TEXTS.values() for text in texts]

LOSSLESS = {
    "byte_level": {"kind": "byte_level", "bos": True},
    "byte_level without bos": {"kind": "byte_level", "vocab_size": 300},
    "unigram": {"kind": "unigram", "vocab_size": 420, "bos": True},
    "unigram without prefix": {"kind": "unigram", "vocab_size": 420, "dummy_prefix": False},
    "metaspace": {"kind": "metaspace_bpe", "vocab_size": 500, "bos": True},
    "metaspace without prefix": {"kind": "metaspace_bpe", "vocab_size": 500, "dummy_prefix": False},
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, SegmentTokenizer]:
    return {
        name: SegmentTokenizer(tiny_tokenizer(**options), name=name)  # type: ignore[arg-type]
        for name, options in LOSSLESS.items()
    }


def _joined(tokenizer: SegmentTokenizer, text: str) -> bytes:
    return b"".join(tokenizer.vocabulary.tokens[i] for i in tokenizer.encode_text([text])[0])


def _check(tokenizer: SegmentTokenizer, text: str) -> None:
    data = text.encode()
    ids = tokenizer.encode_text([text])[0]
    (ends,) = tokenizer.token_ends([text])
    assert ends.dtype == np.uint32
    assert len(ends) == len(ids)
    assert (np.diff(ends.astype(int)) >= 0).all()
    assert (int(ends[-1]) if len(ends) else 0) == len(data)
    # Each token's bytes are the text's bytes that end there, but for a space of the tokenizer's own.
    begin = 0
    for i, end in zip(ids, ends.tolist(), strict=True):
        piece = tokenizer.vocabulary.tokens[i]
        part = data[begin:end]
        assert piece == part or (begin == 0 and piece == b" " + part)
        begin = end


@pytest.mark.parametrize("name", LOSSLESS)
def test_tokens_join_to_real_and_odd_text(
    tokenizers: dict[str, SegmentTokenizer], name: str
) -> None:
    for text in [*ALL_TEXTS, " ", "\n", "a", "  a  ", "Ġ", "x" * 3000]:
        _check(tokenizers[name], text)


@pytest.mark.parametrize(
    ("name", "text"), [("unigram", "a ▁ b"), ("metaspace", "▁"), ("unigram", "byte <0x41> piece")]
)
def test_text_that_a_family_cannot_keep_is_refused_not_misread(
    tokenizers: dict[str, SegmentTokenizer], name: str, text: str
) -> None:
    """SentencePiece's own marks, written out: the word mark is a space, a byte piece is its byte."""
    with pytest.raises(TokenizerError, match="do not join to the text"):
        tokenizers[name].token_ends([text])
    _check(tokenizers["byte_level"], text)


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=st.text(max_size=30))
def test_tokens_join_to_any_text(
    tokenizers: dict[str, SegmentTokenizer], name: str, text: str
) -> None:
    try:
        _check(tokenizers[name], text)
    except TokenizerError as error:
        # The word mark itself is a character like any other; SentencePiece cannot keep it.
        assert "▁" in text and "byte_level" not in name, error  # noqa: PT018, PT017


@pytest.mark.parametrize("name", LOSSLESS)
def test_texts_of_nul_and_digits_are_no_special_tokens(
    tokenizers: dict[str, SegmentTokenizer], name: str
) -> None:
    for token in range(12):
        _check(tokenizers[name], f"a\0{token}")


def test_empty_text(tokenizers: dict[str, SegmentTokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.encode_text([""]) == [[]]
        assert tokenizer.token_ends([""])[0].tolist() == []


@pytest.mark.parametrize("name", LOSSLESS)
def test_bos_is_context_and_never_a_row(tokenizers: dict[str, SegmentTokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    (encoded,) = tokenizer.encode(store_factory.segments(["some text"]))
    bos = bool(LOSSLESS[name].get("bos"))
    assert len(encoded.context_ids) == int(bos)
    assert encoded.context_ids == tokenizer.bos_ids
    assert encoded.input_ids == [*encoded.context_ids, *encoded.token_ids.tolist()]
    # What the model's own tokenizer gives is what the model is fed.
    assert encoded.input_ids == tokenizer.roles("some text")["input_ids"]
    assert not tokenizer.vocabulary.special[encoded.token_ids].any()


def test_specials_spelt_out_in_the_text_are_text(tokenizers: dict[str, SegmentTokenizer]) -> None:
    for tokenizer in tokenizers.values():
        text = "a<s></s><unk><|endoftext|>b"
        (ids,) = tokenizer.encode_text([text])
        assert not tokenizer.vocabulary.special[ids].any()
        _check(tokenizer, text)


def test_specials_and_unused_ids_are_roles_without_bytes() -> None:
    backend = tiny_tokenizer("byte_level").backend_tokenizer
    spec = json.loads(backend.to_str())
    spec["model"]["vocab"]["zz"] = len(spec["model"]["vocab"]) + 5  # a hole of five ids
    table = vocabulary_of(Tokenizer.from_str(json.dumps(spec)), where="m")
    assert len(table) == max(spec["model"]["vocab"].values()) + 1
    assert table.special[-6:-1].all()
    assert table.tokens[-6:-1] == (b"",) * 5
    for item in spec["added_tokens"]:
        assert table.special[item["id"]]
        assert table.tokens[item["id"]] == b""


def test_added_tokens_that_are_text_keep_their_bytes() -> None:
    hf = tiny_tokenizer("byte_level")
    hf.add_tokens([AddedToken("→é", normalized=False), AddedToken("<tool>", special=True)])
    tokenizer = SegmentTokenizer(hf, name="m")
    (ids,) = tokenizer.encode_text(["a→éb<tool>"])
    table = tokenizer.vocabulary
    assert table.tokens[hf.convert_tokens_to_ids("→é")] == "→é".encode()
    assert hf.convert_tokens_to_ids("→é") in ids
    assert table.special[hf.convert_tokens_to_ids("<tool>")]
    _check(tokenizer, "a→éb<tool>")


def test_byte_fallback_pieces_are_bytes_and_only_there(
    tokenizers: dict[str, SegmentTokenizer],
) -> None:
    table = tokenizers["unigram"].vocabulary
    singles = [t for t in table.tokens if len(t) == 1]
    assert set(singles) == {bytes([i]) for i in range(256)}
    plain = Tokenizer(models.WordLevel({"<0x41>": 0, "a": 1}, unk_token="a"))
    plain.decoder = decoders.Fuse()
    assert vocabulary_of(plain, where="m").tokens[0] == b"<0x41>"


def test_wordpiece_has_bytes_but_loses_text() -> None:
    tokenizer = SegmentTokenizer(tiny_tokenizer("wordpiece"), name="bert")
    assert _joined(tokenizer, "The quick fox") == b" The quick fox"
    _check(tokenizer, "The quick brown")
    with pytest.raises(TokenizerError, match="does not change") as caught:
        tokenizer.token_ends(["two  spaces"])
    assert "bert" in caught.value.line()


def test_unknown_token_is_named() -> None:
    hf = tiny_tokenizer("wordpiece")
    tokenizer = SegmentTokenizer(hf, name="bert")
    with pytest.raises(TokenizerError, match="unknown token"):
        tokenizer.token_ends(["漢字漢字 🜁"])


def test_normaliser_that_changes_text_is_refused() -> None:
    from tokenizers import normalizers

    hf = tiny_tokenizer("byte_level")
    hf.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer = SegmentTokenizer(hf, name="lower")
    _check(tokenizer, "already lower")
    with pytest.raises(TokenizerError, match="first difference at byte 3") as caught:
        tokenizer.encode(store_factory.segments(["lowUPPER"]))
    assert "d0#0" in caught.value.line()


ODD_TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", "\r\n\r\n", "\t\t x", " a", "a ", "   both ends   ",
    "A  B" + " " * 37 + "C", "\u00a0hard\u00a0", "\ufeffmark", "\x01\x1b[0m\x7f", "\u200b\u2028",
    "7 42 365 1024 31415 271828 1000000", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "[UNK]", "[CLS] a",
    "<|endoftext|><|im_end|>", "a<tool_call>b", "a<table>b", "zqzq", "don't (stop), e.g. \"this\"!",
    *ALL_TEXTS, *WORLD,
]  # fmt: skip

NOT_TOLD_APART = {
    "qwen": ["e\u0301", "\u1112\u1161\u11ab"],
    "llama2": ["\u2581", "a \u2581b"],
    "mistral": ["\u2581", "\u2581\u2581"],
    "gemma": ["\u2581", "\u2581\u2581"],
    "unigram": ["\u2581", "<0x41>"],
}
"""Text that a lossless family reads as it reads another: refused by name, never misread."""


@pytest.mark.parametrize("name", FAMILIES_THAT_JOIN)
def test_every_family_joins_to_odd_text(name: str) -> None:
    bad = NOT_TOLD_APART.get(name, [])
    for text in ODD_TEXTS:
        if name != "qwen" or "\u0301" not in text:
            _check(zoo(name), text)
    said = "text to NFC" if name == "qwen" else "do not join to the text, first difference at"
    for text in bad:
        with pytest.raises(TokenizerError, match=said):
            zoo(name).token_ends([text])


@pytest.mark.parametrize("name", CHANGING)
@given(text=st.text(max_size=30))
def test_changed_text_is_refused_by_name(name: str, text: str) -> None:
    """And text that the tokenizer happens to keep is read."""
    tokenizer = zoo(name)
    if _joined(tokenizer, text) in (text.encode(), b" " + text.encode()):
        _check(tokenizer, text)
        return
    with pytest.raises(TokenizerError, match=f"tokenizer of {name}"):
        tokenizer.token_ends([text])


CHANGED = {
    "lowercase": ["The Quick", "a 😀 of APPLES"],
    "nfkc": ["o\ufb03ce", "a\u00a0b", "\uff21"],
    "t5": ["two  spaces", " \n ", "two\nlines", "fine \U00010348 text"],
    "bert": ["two  spaces", " \n ", "reading (1)", "fine \U00010348 text", "[UNK]"],
    "bert_uncased": ["The Quick", "caf\u00e9"],
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_helps_is_said_where_text_is_changed(name: str) -> None:
    tokenizer = zoo(name)
    for text in CHANGED[name]:
        with pytest.raises(TokenizerError, match="do not join to the text, first diff") as caught:
            tokenizer.encode(store_factory.segments([text]))
        line = caught.value.line()
        assert f"segment d0#0, tokenizer of {name}" in line
        assert "leave such documents out with `corpus.on_bad: drop`, or take a model whose" in line
        assert "corpus.unicode" not in line
        unknown = not tokenizer.vocabulary.unknown.isdisjoint(tokenizer.encode_text([text])[0])
        assert ("unknown token); the tokenizer" in line) == unknown
        assert unknown or "\U00010348" not in text


def test_text_that_is_not_nfc_is_told_what_makes_it_so() -> None:
    for text in ("e\u0301", "a\u030a and more", "\u1112\u1161\u11ab"):
        with pytest.raises(
            TokenizerError, match="normalises text to NFC, but the corpus"
        ) as caught:
            zoo("qwen").token_ends([text])
        assert "set `corpus.unicode: nfc` and run `logitfuse corpus build`" in caught.value.line()


def test_bytes_of_word_pieces() -> None:
    """Words begin with a space, unless they may follow a letter."""
    tokenizer = zoo("bert")
    vocab, table = tokenizer.roles.get_vocab(), tokenizer.vocabulary.tokens
    assert table[vocab["the"]] == b" the"
    assert table[vocab["##ing"]] == b"ing"
    assert table[vocab[","]] == b","
    assert table[vocab["漢"]] == "漢".encode()


def test_unknown_tokens_are_refused_when_spelt_out() -> None:
    whole_words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    whole_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole_words.decoder = decoders.WordPiece()
    hf = PreTrainedTokenizerFast(tokenizer_object=whole_words)
    tokenizer = SegmentTokenizer(hf, name="w")
    assert tokenizer.token_ends(["a a"])[0].tolist() == [1, 3]
    for text in ("[UNK]", "a [UNK]"):  # what spells the unknown token is unknown
        with pytest.raises(TokenizerError, match="unknown token"):
            tokenizer.token_ends([text])


def test_a_tokenizer_keeps_its_fingerprint() -> None:
    """That of the plans and stores on disk."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.decoder = decoders.Fuse()
    tokenizer = SegmentTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), name="m")
    assert tokenizer.fingerprint == "f54b52706b426533c358b5cba9af5dca"
    assert tokenizer.vocabulary.fingerprint == "35ee32d7f086484c96d7d426fa7e2bfc"


def test_added_tokens_of_word_marks_are_spaces() -> None:
    """Gemma's runs of word marks: pieces of the model, met in text as spaces."""
    tokenizer = zoo("gemma")
    run = tokenizer.roles.convert_tokens_to_ids("▁▁▁▁")
    assert tokenizer.vocabulary.tokens[run] == b"    "
    assert run in tokenizer.encode_text(["x\n    y"])[0]
    _check(tokenizer, "x\n    y")


def test_bos_of_each_family_is_context() -> None:
    for name in FAMILIES:
        tokenizer = zoo(name)
        [encoded] = tokenizer.encode(store_factory.segments(["some text"]))
        whole = tokenizer.roles("some text")["input_ids"]
        assert encoded.input_ids == whole[: len(encoded.input_ids)]
        assert tokenizer.vocabulary.special[list(encoded.context_ids)].all()
        after = whole[len(encoded.input_ids) :]
        assert tokenizer.vocabulary.special[after].all()


def test_merges_found_from_ranks_read_text_as_the_ranks_do() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = trained_ranks(house_texts(), 1500)
    theirs = tiktoken.Encoding("t", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={})
    ours = from_ranks(ranks, CL100K)
    for text in [t for t in ODD_TEXTS if t]:
        assert ours.encode(text).ids == theirs.encode_ordinary(text)


def test_decoder_of_unknown_kind_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.CTC()
    with pytest.raises(TokenizerError, match="CTC"):
        vocabulary_of(backend, where="speech")


def test_byte_level_without_decoder_is_known_by_its_pre_tokenizer() -> None:
    backend = tiny_tokenizer("byte_level").backend_tokenizer
    spec = json.loads(backend.to_str())
    spec["decoder"] = None
    spec["pre_tokenizer"] = json.loads(Tokenizer.from_str(_with_pre_tokenizer(backend)).to_str())[
        "pre_tokenizer"
    ]
    found = vocabulary_of(Tokenizer.from_str(json.dumps(spec)), where="m")
    assert found.tokens == vocabulary_of(backend, where="m").tokens


def _with_pre_tokenizer(backend: Tokenizer) -> str:
    copy = Tokenizer.from_str(backend.to_str())
    copy.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return str(copy.to_str())


def test_table_comes_back_from_parquet_and_damage_never_goes_unseen() -> None:
    table = vocabulary_of(tiny_tokenizer("unigram").backend_tokenizer, where="m")
    data = table.to_parquet()
    back = Vocabulary.from_parquet(data, where="v")
    assert back.tokens == table.tokens
    assert back.special.tolist() == table.special.tolist()
    assert back.fingerprint == table.fingerprint
    rng = np.random.default_rng(0)
    found = 0
    for place in rng.choice(len(data), 200, replace=False).tolist():
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        try:
            read = Vocabulary.from_parquet(bytes(damaged), where="v")
        except CorruptionError:
            found += 1
            continue
        assert read.fingerprint == table.fingerprint, place
    assert found > 100
    for bad in (b"", data[:-1], data[: len(data) // 2], b"PAR1" * 4):
        with pytest.raises(CorruptionError):
            Vocabulary.from_parquet(bad, where="v")


def test_fingerprint_is_of_what_decides_ids(tmp_path: Path) -> None:
    hf = tiny_tokenizer("byte_level", bos=True)
    one = SegmentTokenizer(hf, name="a")
    hf.save_pretrained(tmp_path)
    again = SegmentTokenizer.load(ModelRef(model=str(tmp_path)), name="b")
    assert again.fingerprint == one.fingerprint
    assert again.encode_text(ALL_TEXTS) == one.encode_text(ALL_TEXTS)
    padded = tiny_tokenizer("byte_level", bos=True)
    padded.pad_token = padded.eos_token
    padded(["a", "long text"], padding=True, truncation=True, max_length=3)
    assert SegmentTokenizer(padded, name="c").fingerprint == one.fingerprint
    assert SegmentTokenizer(padded, name="c").encode_text(["long text indeed"]) == one.encode_text(
        ["long text indeed"]
    )
    others = [
        tiny_tokenizer("byte_level"),
        tiny_tokenizer("byte_level", bos=True, vocab_size=399),
        tiny_tokenizer("unigram", bos=True),
    ]
    assert len({SegmentTokenizer(t, name="d").fingerprint for t in others} | {one.fingerprint}) == 4


def test_prompt_and_messages_are_context() -> None:
    hf = tiny_tokenizer("byte_level", bos=True)
    tokenizer = SegmentTokenizer(hf, name="m")
    plain_fingerprint = tokenizer.fingerprint
    prompt = tokenizer.context_ids(json.dumps({"prompt": "Why? "}), where="s")
    assert prompt == (*tokenizer.bos_ids, *tokenizer.encode_text(["Why? "])[0])
    chat = json.dumps({"messages": [{"role": "user", "content": "Why?"}]})
    with pytest.raises(TokenizerError, match="chat template"):
        tokenizer.context_ids(chat, where="segment s")
    hf.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chatty = SegmentTokenizer(hf, name="m")
    ids = chatty.context_ids(chat, where="s")
    assert hf.decode(ids).replace(" ", "") == "<s>[user]Why?[assistant]"
    for template, words in (
        ("{{ raise_exception('no such role') }}", "the chat template refuses .*no such role"),
        ("{{ messages[5].x.y }}", "the chat template refuses"),
        ("{% if %}", "the chat template cannot be read"),
        ("{# nothing #}", "the chat template renders the messages to nothing"),
    ):
        hf.chat_template = template
        with pytest.raises(TokenizerError, match=words):
            SegmentTokenizer(hf, name="m").context_ids(chat, where="segment s")
    # The template writes BOS itself: once, as the role, not as text and not twice.
    assert ids.count(tokenizer.bos_ids[0]) == 1
    assert chatty.fingerprint != plain_fingerprint


@pytest.mark.parametrize("content", [None, {"config.json": "{}"}, {"tokenizer.json": "{"}])
def test_folder_without_tokenizer(tmp_path: Path, content: dict[str, str] | None) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(ModelError, match="tokenizer") as caught:
        SegmentTokenizer.load(ModelRef(model=str(folder)), name="code")
    assert caught.value.exit_code == 2
    assert "code" in caught.value.line()


def test_tokenizer_without_fast_backend_is_refused() -> None:
    class Slow:
        backend_tokenizer: Any = None

    with pytest.raises(TokenizerError, match="fast backend"):
        SegmentTokenizer(Slow(), name="m")


def test_eos() -> None:
    assert SegmentTokenizer(tiny_tokenizer("byte_level"), name="m").eos_id == 2
    backend = tiny_tokenizer("byte_level").backend_tokenizer
    without = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert SegmentTokenizer(without, name="m").eos_id is None


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "metaspace_bpe"])
def test_the_vocabulary_ends_at_the_models_rows(tmp_path: Path, kind: Any) -> None:
    folder = tiny_model(tmp_path / "m", tokenizer=tiny_tokenizer(kind, vocab_size=450))
    ref = ModelRef(model=str(folder))
    plain = SegmentTokenizer.load(ref, name="m")
    assert plain.beyond_rows == ()
    add_beyond_rows(folder, "<image>", special=True)
    add_beyond_rows(folder, "[PAD]")
    longer = SegmentTokenizer.load(ref, name="m")
    assert longer.beyond_rows == ("<image>", "[PAD]")
    assert longer.vocabulary.fingerprint == plain.vocabulary.fingerprint
    assert longer.vocab_size == plain.vocab_size
    assert longer.encode_text(ALL_TEXTS) == plain.encode_text(ALL_TEXTS)
    # A special token written out is text; another added token is met in a text.
    _check(longer, "an <image> in the text")
    with pytest.raises(NoRowError) as caught:
        longer.token_ends(["fine", "a [PAD] in the text"])
    line = caught.value.line()
    assert f"ids below {plain.vocab_size}, the rows of the model" in line
    assert f"got token id {plain.vocab_size + 1}, '[PAD]'" in line


def test_a_tokenizer_of_another_model_is_told() -> None:
    tokenizer = SegmentTokenizer(tiny_tokenizer("byte_level"), name="m")
    for rows, another in ((tokenizer.vocab_size - 9, False), (300, True)):
        tokenizer.limit_vocabulary(rows)
        assert tokenizer.is_of_other_model is another
        for text in (token for token in tokenizer.beyond_rows if token.isascii()):
            with pytest.raises(NoRowError) as caught:
                tokenizer.token_ends([text])
            line = caught.value.line()
            assert ("it seems to be another model's" in line) is another
            assert ("remove it from the text" in line) is not another


def test_a_prompt_may_not_reach_beyond_the_rows(tmp_path: Path) -> None:
    folder = add_beyond_rows(tiny_model(tmp_path / "m"), "<image>", special=True)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(folder)), name="m")
    for content, fine in (("a picture", True), ("a <image>", False)):
        context = json.dumps({"messages": [{"role": "user", "content": content}]})
        if fine:
            assert tokenizer.context_ids(context, where="segment s")
            continue
        with pytest.raises(NoRowError, match=r"in the context of segment s: .*'<image>'"):
            tokenizer.context_ids(context, where="segment s")
    # As text before the text it is none of the tokenizer's roles.
    assert tokenizer.context_ids(json.dumps({"prompt": "a <image>"}), where="segment s")


def test_an_end_of_sequence_beyond_the_rows_is_none(tmp_path: Path) -> None:
    folder = add_beyond_rows(tiny_model(tmp_path / "m"), "<end>", special=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(folder)
    assert SegmentTokenizer.load(ModelRef(model=str(folder)), name="m").eos_id is None


def test_more_rows_than_ids_are_padding(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", vocab_padding=61)
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(folder)), name="m")
    assert tokenizer.vocab_size == len(PreTrainedTokenizerFast.from_pretrained(folder))
    assert tokenizer.beyond_rows == ()
