"""The tokenizer of a GGUF file as its model was trained with it.

A GGUF file has pieces and, for some kinds, merges. The rule by which text is split before the merges is
only named (`tokenizer.ggml.pre`), and BOS is a flag. Readers know some of the names and use GPT-2's
rule for all others without a message, which gives other ids than the model was trained on. Here an
unknown name is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from store_schema.errors import TokenizerError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (),
    "digits": (r"\p{N}",),
    "qwen2": (rf"{_LETTERS}|\p{{N}}|{_SIGNS}",),
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "llama3": (rf"{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}",),
    "gpt4o": (_CASED % (_CONTRACTION, _CONTRACTION, r"\p{N}{1,3}"),),
    "tekken": (_CASED % ("", "", r"\p{N}"),),
    "deepseek3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
"""Regular expressions by which each rule splits text, one after the other. The first two rules then use
GPT-2's own expression, which is part of the byte-level pre-tokenizer."""

_RULE_OF_PRE: dict[str, str] = {
    name: rule
    for rule, names in {
        "gpt2": "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion exaone4 granite-docling",
        "digits": "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        "qwen2": "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        "qwen35": "qwen35",
        "llama3": "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe"
        " glm4 chatglm-bpe",
        "gpt4o": "gpt-4o llama4 kanana2 talkie minimax-m2",
        "tekken": "tekken",
        "deepseek3": "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    }.items()
    for name in names.split()
}
_WHOLE_WORDS = frozenset(
    [
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "tekken",
    ]
)
"""Kinds that ignore the merges for a word that is a piece as a whole; they also put BOS before a text
if the file has no flag."""
_NFC = frozenset({"qwen2", "qwen35"})
"""Kinds whose own tokenizer.json normalises to NFC."""

CONTROL, USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type` of special tokens, and of pieces that are matched before the merges."""


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether the model was trained with BOS before every text: the file's flag, or without one the
    format's default for its kind of tokenizer."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    return metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS


def as_trained(spec: dict[str, Any], metadata: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """tokenizer.json with the rules that the file names, in place of those that transformers guessed.

    Args:
        spec: tokenizer.json that transformers made from the file.
        metadata: The file's metadata.
        where: The file, for messages.

    Raises:
        TokenizerError: The file names a rule that is not known here, or none.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        spec = _byte_level(spec, metadata.get("tokenizer.ggml.pre"), where=where)
    elif kind == "llama":
        spec = _sentencepiece(spec, metadata)
    return spec | {"post_processor": _template(spec, metadata)}


def _byte_level(spec: dict[str, Any], pre: str | None, *, where: str) -> dict[str, Any]:
    rule = _RULE_OF_PRE.get(pre or "")
    if rule is None or pre is None:
        raise TokenizerError(
            "the file does not name the rule by which its tokenizer splits text"
            if pre in (None, "default")
            else "the file's tokenizer splits text by an unknown rule",
            where=where,
            expected="tokenizer.ggml.pre among " + ", ".join(sorted(_RULE_OF_PRE)[:6]) + ", ...",
            got=pre or "none",
            hint="put the model's own tokenizer.json beside the file and give folder and gguf_file",
        )
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in _SPLITS[rule]
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": rule in ("gpt2", "digits"),
    }
    return spec | {
        "normalizer": {"type": "NFC"} if pre in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "model": spec["model"] | {"ignore_merges": pre in _WHOLE_WORDS},
    }


def _sentencepiece(spec: dict[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Spaces become word marks, with one before a text if the file says so; text is not split first.

    User-defined pieces, such as runs of spaces, are matched before all others, the longest first. So
    the merges that form them come first, the longest first.
    """
    steps: list[dict[str, Any]] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    tokens, types = (metadata.get(f"tokenizer.ggml.{k}") or () for k in ("tokens", "token_type"))
    whole = {
        token.replace(" ", "▁")
        for token, kind in zip(tokens, types, strict=False)
        if kind == USER_DEFINED
    }

    def rank(merge: list[str]) -> int:
        made = "".join(merge)
        return -len(made) if made in whole else 0

    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if len(steps) == 2:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = spec["model"]
    return spec | {
        "normalizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"merges": sorted(model["merges"], key=rank)},
    }


def _template(spec: dict[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The post-processor that puts BOS before a text; None for a tokenizer without it."""
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is None or not adds_bos(metadata):
        return None
    token = next((t["content"] for t in spec["added_tokens"] if t["id"] == bos), None)
    if token is None:
        pieces = spec["model"]["vocab"].items()
        token = next((piece for piece, index in pieces if index == bos), None)
    if token is None:
        return None

    def sequence(name: str, number: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": token, "type_id": number}},
            {"Sequence": {"id": name, "type_id": number}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
    }
