"""tokenizer.json is the truth: whatever class is named beside it, and back again when it is saved."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from store_schema.config import ModelRef
from store_schema.errors import LogitfuseError, ModelError, TokenizerError
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.tokenizer_class import PROBES
from tests.tiny import SAMPLE_TEXTS, tiny_tokenizer
from tests.tokenizer_zoo import CL100K, house_texts, trained_ranks, zoo

TEXTS = [*PROBES.values(), *(text for texts in SAMPLE_TEXTS.values() for text in texts)]

FOLDERS = {
    # family, tokenizer_class, model_type: as published folders have them
    "deepseek coder": ("llama3", "LlamaTokenizerFast", "llama"),
    "llama 2": ("llama2", "LlamaTokenizer", "llama"),
    "smollm2": ("starcoder", "GPT2Tokenizer", "llama"),
    "qwen 2": ("qwen", "Qwen2Tokenizer", "qwen2"),
    "llama 3": ("llama3", "PreTrainedTokenizerFast", "llama"),
    "mistral": ("mistral", "LlamaTokenizerFast", "mistral"),
    "gemma": ("gemma", "GemmaTokenizer", "gemma2"),
    "unigram in qwen 2": ("unigram", "PreTrainedTokenizerFast", "qwen2"),
    "unigram in llama": ("unigram", "LlamaTokenizer", "llama"),
    "pythia": ("neox", "GPTNeoXTokenizerFast", "gpt_neox"),
    "no class, no model": ("starcoder", None, None),
}


def published(folder: Path, case: str, **config: Any) -> Path:
    """A folder of the case's family, with more keys in tokenizer_config.json."""
    family, class_name, model_type = FOLDERS[case]
    zoo(family).roles.save_pretrained(folder)
    settings = {"tokenizer_class": class_name, **config}
    edit(folder / "tokenizer_config.json", settings)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def edit(path: Path, settings: dict[str, Any]) -> None:
    """Set keys of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def load(folder: Path, **ref: Any) -> SegmentTokenizer:
    return SegmentTokenizer.load(ModelRef(model=str(folder), **ref), name="m")


def ids_of_file(folder: Path, texts: list[str]) -> list[list[int]]:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def auto_ids(folder: Path, texts: list[str]) -> list[list[int]] | None:
    """As plain AutoTokenizer reads them; None where it cannot load the folder."""
    try:
        loaded = AutoTokenizer.from_pretrained(folder)
    except Exception:
        return None
    return [loaded(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("case", FOLDERS)
def test_ids_are_those_of_the_file_and_what_auto_tokenizer_makes_of_it_is_said(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = published(tmp_path, case)
    tokenizer = load(folder)
    plain = [text for text in TEXTS if "<s>" not in text]
    assert tokenizer.encode_text(plain) == ids_of_file(folder, plain)
    with caplog.at_level(logging.WARNING):
        tokenizer.warn_of_class()
    probes = list(PROBES.values())
    differs = auto_ids(folder, probes) != ids_of_file(folder, probes)
    assert len(caplog.records) == int(differs)
    if differs:
        assert "transformers" in caplog.text
        assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
@pytest.mark.parametrize("case", FOLDERS)
def test_saved_files_are_read_by_auto_tokenizer_as_here(
    tmp_path: Path, case: str, bos: str, caplog: pytest.LogCaptureFixture
) -> None:
    has = zoo(FOLDERS[case][0]).roles
    folder = published(tmp_path / "model", case, bos_token=has.bos_token or has.eos_token)
    tokenizer = load(folder, bos=bos)
    final = tmp_path / "final"
    final.mkdir()
    if (folder / "config.json").exists():
        (final / "config.json").write_bytes((folder / "config.json").read_bytes())
    tokenizer.save_pretrained(final)
    assert not caplog.records
    loaded = AutoTokenizer.from_pretrained(final)
    for text in (text for text in TEXTS if "<s>" not in text):
        ids = [*tokenizer.bos_ids, *tokenizer.encode_text([text])[0]]
        assert loaded(text)["input_ids"][: len(ids)] == ids
    assert loaded.eos_token_id == tokenizer.eos_id
    again = load(final)
    assert again.bos_ids == tokenizer.bos_ids
    if bos != "always":  # a chat is begun otherwise where the run file says so
        assert again.fingerprint == tokenizer.fingerprint
    if tokenizer.bos_ids == load(folder).bos_ids and bos == "auto":
        assert (final / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def with_bos(folder: Path, **config: Any) -> Path:
    """Byte-level BPE that has a BOS token and, in tokenizer.json, no rule for it."""
    tiny_tokenizer("byte_level").save_pretrained(folder)
    edit(folder / "tokenizer_config.json", config)
    return folder


def test_bos_rule_of_the_settings_counts_where_the_file_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bos = tiny_tokenizer("byte_level").bos_token_id
    folder = with_bos(tmp_path / "a", add_bos_token=True)
    assert load(folder).bos_ids == (bos,)
    load(folder).warn_of_class()
    assert "BOS" in caplog.text
    assert load(folder, bos="never").bos_ids == ()
    assert load(with_bos(tmp_path / "b")).bos_ids == ()
    assert load(with_bos(tmp_path / "b"), bos="always").bos_ids == (bos,)
    assert load(with_bos(tmp_path / "c", add_bos_token=False)).bos_ids == ()
    assert load(with_bos(tmp_path / "c"), bos="always").bos_ids == (bos,)
    prints = {load(folder, bos=rule).fingerprint for rule in ("auto", "always", "never")}
    assert len(prints) == 3


def test_settings_that_switch_bos_off_leave_other_marks_alone(tmp_path: Path) -> None:
    hf = tiny_tokenizer("byte_level", bos=True)
    hf.save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert load(tmp_path).bos_ids == ()
    assert load(tmp_path, bos="always").bos_ids == (hf.bos_token_id,)
    backend = hf.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", hf.eos_token_id)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert load(tmp_path).bos_ids == (hf.eos_token_id,)
    assert load(tmp_path, bos="never").bos_ids == ()


def test_bos_without_a_bos_token(tmp_path: Path) -> None:
    folder = with_bos(tmp_path, bos_token=None, add_bos_token=True)
    assert load(folder).bos_ids == ()
    with pytest.raises(TokenizerError, match="no BOS token") as caught:
        load(folder, bos="always")
    assert "`bos: always`" in caught.value.line()


@pytest.mark.parametrize("named", [None, "<begin>"])
@pytest.mark.parametrize("stated", [True, False, None])
def test_a_bos_token_that_is_none_is_no_word(
    tmp_path: Path, named: str | None, stated: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    """`bos_token: null` beside a piece "None", as Qwen's vocabulary has it."""
    hf = tiny_tokenizer("byte_level", ["None None None"] * 9)
    assert "None" in hf.get_vocab()
    hf.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = {"bos_token": named, "add_bos_token": stated}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    tokenizer = load(tmp_path)
    tokenizer.warn_of_missing_bos()
    assert (tokenizer.bos_ids, tokenizer.bos_id) == ((), None)
    assert len(caplog.messages) == int(stated is True)
    if stated:
        [line] = caplog.messages
        assert "tokenizer of m: its files say `add_bos_token: true`" in line
        assert "nothing is put before a text" in line
    got = "none" if named is None else "'<begin>', which it does not have"
    with pytest.raises(TokenizerError, match=f"no BOS token to put before a text.*got {got}"):
        load(tmp_path, bos="always")
    caplog.clear()
    load(tmp_path, bos="never").warn_of_missing_bos()
    assert not caplog.messages


def test_a_chat_that_begins_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    hf = tiny_tokenizer("byte_level")
    chat = json.dumps({"messages": [{"role": "user", "content": "Why?"}]})
    for rule, written, count in (
        ("auto", "<s>", 1), ("always", "<s>", 1), ("never", "<s>", 1),
        ("auto", "", 0), ("always", "", 1), ("never", "", 0),
    ):  # fmt: skip
        hf.chat_template = written + "[{{ messages[0].content }}]{{ messages[1].content }}"
        hf.save_pretrained(tmp_path)
        ids = load(tmp_path, bos=rule).context_ids(chat, where="s")
        assert ids.count(hf.bos_token_id) == count, (rule, written)
        assert hf.decode(ids, skip_special_tokens=True) == "[Why?]"


def test_tokens_that_stand_beside_the_file_continue_its_ids(tmp_path: Path) -> None:
    hf = tiny_tokenizer("byte_level")
    hf.chat_template = "<|turn|>{{ messages[0].content }}{{ messages[1].content }}"
    hf.save_pretrained(tmp_path)
    size = len(hf)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|turn|>": size, "<far>": size + 9}))
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == size + 1
    chat = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    assert tokenizer.context_ids(chat, where="s")[0] == size
    token = {"content": "<|turn|>", "special": True}
    edit(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(size): token}})
    (tmp_path / "added_tokens.json").unlink()
    assert load(tmp_path).vocab_size == size + 1
    assert load(tmp_path).vocabulary.special[size]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _set(folder: Path, **changes: Any) -> None:
    edit(folder / "tokenizer.json", changes)


FAULTS: dict[str, tuple[Any, str]] = {
    "pointer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "pointer of git-lfs"),
    "pointer beside": (
        lambda f: (f / "tokenizer_config.json").write_text(POINTER), "pointer of git-lfs"),
    "empty": (lambda f: (f / "tokenizer.json").write_text(""), "empty file"),
    "half": (
        lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:999]),
        "damaged: not JSON"),
    "not text": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "newer": (lambda f: _set(f, pre_tokenizer={"type": "SplitOf2030"}), "newer version of tokenizers"),
    "merges": (
        lambda f: _set(f, model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b", "c"]]}),
        "cannot be read"),
    "pointer for template": (
        lambda f: (f / "chat_template.jinja").write_text(POINTER), "pointer of git-lfs"),
    "pointer for config": (
        lambda f: (f / "config.json").write_text(POINTER), "pointer of git-lfs"),
    "settings": (lambda f: (f / "tokenizer_config.json").write_text("[1]"), "not a JSON object"),
    "extra tokens": (
        lambda f: edit(f / "tokenizer_config.json", {"extra_special_tokens": "<x>"}),
        "files beside tokenizer.json are wrong"),
    "added tokens": (
        lambda f: edit(f / "tokenizer_config.json", {"added_tokens_decoder": {"9999": 7}}),
        "files beside tokenizer.json are wrong"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_unreadable_files_are_told_in_one_line(tmp_path: Path, fault: str) -> None:
    tiny_tokenizer("byte_level").save_pretrained(tmp_path)
    spoil, words = FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(LogitfuseError) as caught:
        load(tmp_path).warn_of_class()
    line = caught.value.line()
    assert words in line
    assert str(tmp_path) in line
    assert len(line) < 700
    assert isinstance(caught.value, ModelError)


def test_files_that_cannot_be_converted_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("no sentencepiece model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match="cannot be converted"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").write_text(POINTER)
    with pytest.raises(ModelError, match="pointer of git-lfs"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "vocab.json").write_text(POINTER)
    with pytest.raises(ModelError, match="pointer of git-lfs"):
        load(tmp_path)


def test_opening_reads_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """33 MB of JSON at each opening: once for plain text, once more for chats, not ten times."""
    import store_schema.text.tokenizer_source as source

    tiny_tokenizer("byte_level", bos=True).save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", {"add_bos_token": True})
    times: list[Path] = []
    read = source.read_backend
    monkeypatch.setattr(
        source, "read_backend", lambda path, **k: (times.append(path), read(path, **k))[1]
    )
    tokenizer = load(tmp_path)
    assert tokenizer.encode_text(["text"])
    assert tokenizer.eos_id is not None
    assert tokenizer.fingerprint
    tokenizer.warn_of_class()
    assert len(times) == 1
    other = SegmentTokenizer.load(ModelRef(model=str(tmp_path)), name="target")
    assert (other.name, tokenizer.name) == ("target", "m")
    assert other.fingerprint == tokenizer.fingerprint
    assert len(times) == 1
    assert load(tmp_path, bos="never").bos_ids == ()
    edit(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert load(tmp_path).bos_ids == ()
    assert len(times) == 3


def tekken_file(path: Path) -> None:
    """tekken.json as Mistral's folders have it, over a small vocabulary trained here."""
    ranks = trained_ranks(house_texts(), 700)
    longer = [piece for piece in sorted(ranks, key=ranks.__getitem__) if len(piece) > 1]
    pieces = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate([*(bytes([i]) for i in range(256)), *longer])
    ]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    specials = [{"rank": i, "token_str": n, "is_control": True} for i, n in enumerate(names)]
    sizes = {"default_vocab_size": len(pieces) + 10, "default_num_special_tokens": 10}
    config = {"pattern": CL100K, "num_vocab_tokens": len(pieces), "version": "v3", **sizes}
    path.write_text(json.dumps({"config": config, "vocab": pieces, "special_tokens": specials}))


def test_tekken_alone_is_read_as_its_own_library_reads_it(tmp_path: Path) -> None:
    tekken_file(tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_ids, tokenizer.eos_id) == ((1,), 2)
    texts = [text for text in TEXTS if text]
    assert [ends[-1] for ends in tokenizer.token_ends(texts)] == [len(t.encode()) for t in texts]
    (tmp_path / "final").mkdir()
    tokenizer.save_pretrained(tmp_path / "final")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "final")
    read = tokenizer.encode_text(texts)
    plain = [i for i, text in enumerate(texts) if "<s>" not in text]
    assert [loaded(texts[i])["input_ids"] for i in plain] == [[1, *read[i]] for i in plain]
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    theirs = tekken.Tekkenizer.from_file(tmp_path / "tekken.json")
    assert read == [theirs.encode(text, bos=False, eos=False) for text in texts]


def test_tekken_beside_the_file_is_not_looked_at(tmp_path: Path) -> None:
    folder = published(tmp_path, "mistral")
    alone = load(folder).fingerprint
    (folder / "tekken.json").write_text("{}")
    assert load(folder).fingerprint == alone
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot be converted") as caught:
        load(folder)
    assert "save it as tokenizer.json" in caught.value.line()
