"""Facts that are kept: found once for one content by one version, and never taken when in doubt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fuse_train.model.identity import own_dtype_name
from store_schema.config import ModelRef
from store_schema.disk import cache
from store_schema.disk.cache import kept_fact
from store_schema.disk.cache_folder import cache_folder
from store_schema.errors import ModelError
from store_schema.model import class_config, model_check
from store_schema.model.class_config import model_rows
from store_schema.model.model_check import Loader, require_language_model
from store_schema.text import tokenizer_class
from store_schema.text.tokenizer import SegmentTokenizer
from tests.tiny import tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


class Counted:
    """A function that counts its calls and may fail."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*args, **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def facts() -> list[Path]:
    return sorted((cache_folder() / "facts").glob("*"))


def test_a_fact_is_found_once_for_its_content() -> None:
    find = Counted(lambda: {"a": [1, None, "é"]})
    for content in ("x", ["x"], "x"):
        assert kept_fact("kind", content, find) == {"a": [1, None, "é"]}
    kept_fact("other", "x", find)
    assert find.calls == len(facts()) == 3


def test_an_error_is_not_kept() -> None:
    def fails() -> str:
        raise ModelError("no")

    for _ in range(2):
        with pytest.raises(ModelError):
            kept_fact("kind", "x", fails)
    assert facts() == []
    assert kept_fact("kind", "x", lambda: "now") == "now"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"changed", "other code"])
def test_a_damaged_fact_or_one_of_other_code_is_found_again(
    damage: bytes | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_fact("kind", "x", lambda: "first")
    [path] = facts()
    if damage == b"changed":
        path.write_bytes(path.read_bytes().replace(b"first", b"worse"))
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        monkeypatch.setattr(cache, "_this_code", lambda: damage)
    assert kept_fact("kind", "x", lambda: "second") == "second"
    assert kept_fact("kind", "x", lambda: "third") == "second"
    assert facts() == [path]


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOGITFUSE_CACHE", str(tmp_path / "file"))
    assert kept_fact("kind", "x", lambda: 1) == 1
    assert kept_fact("kind", "x", lambda: 2) == 2


# ------------------------------------------------------------------------------- tokenizers


def asked_of_transformers(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(tokenizer_class._read_stand_in)
    monkeypatch.setattr(tokenizer_class, "_read_stand_in", counted)
    return counted


def what_is_known(folder: Path, **options: Any) -> tuple[Any, ...]:
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(folder), **options), name="m")
    return tokenizer.fingerprint, tokenizer.eos_id, tokenizer.bos_id, tokenizer.chat.text


def test_special_tokens_and_template_are_known_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_tokenizer("byte_level", bos=True)
    made.chat_template = TEMPLATE
    folder = tiny_model(tmp_path / "m", "llama", made)
    asked = asked_of_transformers(monkeypatch)
    first = what_is_known(folder)
    assert asked.calls == 1
    assert first[1:] == (made.eos_token_id, made.bos_token_id, TEMPLATE)
    assert what_is_known(folder) == first
    assert asked.calls == 1
    context = json.dumps({"messages": [{"role": "user", "content": "hm"}]})
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(folder)), name="m")
    assert made.decode(tokenizer.context_ids(context, where="s")).startswith("user: hm")
    assert asked.calls == 2  # a chat is rendered by transformers
    del tokenizer
    edit(folder / "tokenizer_config.json", eos_token="<s>")
    changed = what_is_known(folder)
    assert changed[1] == made.bos_token_id != first[1]
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert what_is_known(folder)[3] == "{{ messages[0].content }}"
    assert asked.calls == 4


def test_a_tokenizer_with_code_of_its_own_is_asked_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path / "m")
    asked = asked_of_transformers(monkeypatch)
    for _ in range(2):
        what_is_known(folder, trust_remote_code=True)
    assert asked.calls == 2
    assert facts() == []


# ----------------------------------------------------------------------------------- models


def check(folder: Path, loader: Loader = "transformers", **options: Any) -> None:
    ref = ModelRef(model=str(folder), **options)
    require_language_model(ref, folder, name="m", loader=loader)


def test_a_model_that_passed_is_checked_again_when_a_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path / "m")
    asked = Counted(class_config.transformers_config)
    monkeypatch.setattr(model_check, "transformers_config", asked)
    loaders: list[tuple[Loader, int]] = [("transformers", 1), ("vllm", 2)]
    for loader, calls in loaders:
        for _ in range(2):
            check(folder, loader)
            assert asked.calls == calls
    for _ in range(2):
        check(folder, trust_remote_code=True)
    assert asked.calls == 4
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.0" in name)
    save_file({**weights, name: weights[name].double()}, folder / "model.safetensors")
    check(folder)
    assert asked.calls == 5
    edit(folder / "config.json", rope_theta=5000.0)
    check(folder)
    assert asked.calls == 6
    edit(folder / "config.json", hidden_size="wide")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"transformers cannot read the config of m.*config"):
            check(folder)
    edit(folder / "config.json", hidden_size=32, is_encoder_decoder=True)
    with pytest.raises(ModelError, match="is_encoder_decoder"):
        check(folder)


def test_what_a_class_has_by_default_is_kept_by_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Counted(class_config.transformers_config)
    monkeypatch.setattr(class_config, "transformers_config", asked)
    monkeypatch.setattr("fuse_train.model.identity.transformers_config", asked)
    ref = ModelRef(model=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text", "dtype": "float16"}')
    for _ in range(2):
        assert (model_rows(ref), own_dtype_name(ref)) == (262_208, "float16")
    assert asked.calls == 2
    edit(tmp_path / "config.json", vocab_size=77, dtype="bfloat16")
    assert (model_rows(ref), own_dtype_name(ref)) == (77, "bfloat16")
    assert asked.calls == 3
