"""One trained tokenizer of every family, made as the real models' tokenizer.json are made.

Real files cannot be had offline, so each builder trains pieces on given texts in well under a second
and puts the family's own normaliser, pre-tokenizer, decoder, post-processor and special tokens
around them: those decide what becomes of odd text. Nothing here is a copy of a real vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from store_schema.text.tokenizer import SegmentTokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How cl100k and Llama 3 split; Qwen the same with single digits."""

WORDS_AND_RUNS = r"▁*[^▁\n]+|▁+|\n+"
"""Where SentencePiece-like BPE may not merge while it is trained; runs of marks become pieces."""

BYTE_PIECES = [f"<0x{i:02X}>" for i in range(256)]

WORLD = [
    "漢字かな交じり文は日本語の普通の書き方である。東京都の人口は約千四百万人です。",
    "我们在北京大学学习语言模型，今天的天气很好。中文没有空格，所以分词比较难。",
    "한국어는 띄어쓰기가 있는 언어이다. 오늘은 날씨가 좋다. 서울에서 만나요.",
    "Emoji 😀😃🎉👩‍👩‍👧‍👦🏳️‍🌈👍🏽 and 🇩🇪🇯🇵 flags ❤️ — “quotes” … naïve café façade",
    "العربية لغة جميلة. हिन्दी एक भाषा है। Ελληνικά και Русский язык, tiếng Việt.",
]


def house_texts() -> list[str]:
    """Real prose and code at hand, this repository's own, and a little of the world's scripts."""
    root = Path(__file__).resolve().parent.parent
    files = [root / "README.md", *sorted((root / "store_schema").glob("[a-m]*.py"))]
    texts = [path.read_text(encoding="utf-8")[:12_000] for path in files]
    return [*texts, *(text for text in WORLD for _ in range(4))]


def _byte_bpe(
    texts: Sequence[str],
    vocab_size: int,
    pre_tokenizer: Any,
    *,
    normalizer: Any = None,
    ignore_merges: bool = False,
) -> Tokenizer:
    """Byte-level BPE: `pre_tokenizer` ends in the byte alphabet."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _wrap(
    backend: Tokenizer,
    *,
    before: str | None = None,
    after: str | None = None,
    specials: Sequence[str] = (),
    **roles: str,
) -> PreTrainedTokenizerFast:
    """Add special tokens, the post-processor that places them, and the roles."""
    names = [*specials, *(t for t in (before, after) if t), *roles.values()]
    backend.add_special_tokens([AddedToken(n, special=True) for n in dict.fromkeys(names)])
    if before or after:
        template = " ".join(part for part in (before, "$A", after) if part)
        used = [(t, backend.token_to_id(t)) for t in dict.fromkeys((before, after)) if t]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles
    )


def gpt2(texts: Sequence[str], vocab_size: int = 1200) -> PreTrainedTokenizerFast:
    """Byte-level BPE, GPT-2's own regex, nothing before a text."""
    backend = _byte_bpe(texts, vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=False))
    return _wrap(backend, eos_token="<|endoftext|>")


def gpt2_bos(texts: Sequence[str], vocab_size: int = 900) -> PreTrainedTokenizerFast:
    """The same with BOS and a space of its own before every text (RoBERTa's way)."""
    backend = _byte_bpe(texts, vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=True))
    return _wrap(backend, before="<s>", after="</s>", bos_token="<s>", eos_token="</s>")


def llama3(texts: Sequence[str], vocab_size: int = 1400) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits in threes, whole words looked up before merges, BOS."""
    backend = _byte_bpe(texts, vocab_size, _split_then_bytes(CL100K), ignore_merges=True)
    return _wrap(
        backend, before="<|begin_of_text|>", specials=["<|eot_id|>"], eos_token="<|end_of_text|>",
        bos_token="<|begin_of_text|>",
    )  # fmt: skip


def qwen(texts: Sequence[str], vocab_size: int = 1300) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one, NFC, no BOS, added tokens special and not."""
    backend = _byte_bpe(
        texts, vocab_size, _split_then_bytes(CL100K.replace("{1,3}", "")),
        normalizer=normalizers.NFC(),
    )  # fmt: skip
    wrapped = _wrap(backend, specials=["<|im_start|>", "<|im_end|>"], eos_token="<|endoftext|>")
    wrapped.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return wrapped


def starcoder(texts: Sequence[str], vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind a splitter of single digits."""
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    return _wrap(
        _byte_bpe(texts, vocab_size, pre_tokenizers.Sequence(steps)), eos_token="<|endoftext|>"
    )


def neox(texts: Sequence[str], vocab_size: int = 1100) -> PreTrainedTokenizerFast:
    """Byte-level BPE with runs of spaces as added tokens, and a hole of unused ids (padding)."""
    backend = _byte_bpe(texts, vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=False))
    spec = json.loads(backend.to_str())
    spec["model"]["vocab"]["zqzq"] = len(spec["model"]["vocab"]) + 11
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_tokens([AddedToken(" " * n, normalized=False) for n in range(8, 1, -1)])
    return _wrap(backend, eos_token="<|endoftext|>")


def lowercase(texts: Sequence[str], vocab_size: int = 900) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind a lower-casing normaliser."""
    backend = _byte_bpe(
        texts, vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=False),
        normalizer=normalizers.Lowercase(),
    )  # fmt: skip
    return _wrap(backend, eos_token="<|endoftext|>")


def nfkc(texts: Sequence[str], vocab_size: int = 900) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind NFKC."""
    backend = _byte_bpe(
        texts, vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=False),
        normalizer=normalizers.NFKC(),
    )  # fmt: skip
    return _wrap(backend, eos_token="<|endoftext|>")


def tiktoken(texts: Sequence[str], vocab_size: int = 1500) -> PreTrainedTokenizerFast:
    """Byte-level BPE given as ranks alone, merges found again from them."""
    ranks = trained_ranks(texts, vocab_size)
    backend = from_ranks(ranks, CL100K)
    return _wrap(backend, specials=["<|fim_prefix|>"], eos_token="<|endoftext|>")


def trained_ranks(texts: Sequence[str], vocab_size: int) -> dict[bytes, int]:
    """Token bytes -> rank, as a .tiktoken file lists them."""
    vocab = _byte_bpe(texts, vocab_size, _split_then_bytes(CL100K)).get_vocab()
    alphabet = _alphabet()
    written = {bytes(alphabet[c] for c in piece): i for piece, i in vocab.items()}
    return {token: rank for rank, token in enumerate(sorted(written, key=written.__getitem__))}


def from_ranks(ranks: dict[bytes, int], pattern: str) -> Tokenizer:
    """A `tokenizers` BPE of ranks: each token's merge is the last that builds it by lower ranks."""
    stand_in = {byte: character for character, byte in _alphabet().items()}

    def written(token: bytes) -> str:
        return "".join(stand_in[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            if min(pairs) >= rank:
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((written(parts[0]), written(parts[1])))
    vocab = {written(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = _split_then_bytes(pattern)
    backend.decoder = decoders.ByteLevel()
    return backend


def _alphabet() -> dict[str, int]:
    """Stand-in character -> byte, asked of the library."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    found |= {chr(256 + rank): byte for rank, byte in enumerate(others)}
    assert set(found) == set(pre_tokenizers.ByteLevel.alphabet())
    return found


def _piece_bpe(texts: Sequence[str], vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """SentencePiece-like BPE with byte fallback: merges within words, nothing around it yet."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS_AND_RUNS), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*specials, *BYTE_PIECES],
        limit_alphabet=300,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in BYTE_PIECES]
    spec["normalizer"] = spec["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(spec))


def _mark_decoder(*, strip: bool) -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def llama2(texts: Sequence[str], vocab_size: int = 1300) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE, word mark put before every text by the normaliser, BOS."""
    backend = _piece_bpe(texts, vocab_size, ["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = _mark_decoder(strip=True)
    return _wrap(backend, before="<s>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def mistral(texts: Sequence[str], vocab_size: int = 1500) -> PreTrainedTokenizerFast:
    """The same through the pre-tokenizer: a mark before the first word, the text one piece."""
    backend = _piece_bpe(texts, vocab_size, ["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = _mark_decoder(strip=True)
    return _wrap(backend, before="<s>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def gemma(texts: Sequence[str], vocab_size: int = 1400) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE over the whole text, no mark before it; runs of marks and line ends are
    pieces and added tokens at once, as SentencePiece's user-defined symbols become."""
    backend = _piece_bpe(texts, vocab_size, ["<pad>", "<eos>", "<bos>", "<unk>"])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = _mark_decoder(strip=False)
    runs = ["▁" * n for n in range(2, 9)] + ["\n" * n for n in range(1, 4)] + ["<table>"]
    backend.add_tokens([AddedToken(run, normalized=False, special=False) for run in runs])
    return _wrap(
        backend, before="<bos>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>",
    )  # fmt: skip


def _unigram(texts: Sequence[str], vocab_size: int, *, byte_fallback: bool) -> Tokenizer:
    specials = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    if not byte_fallback:
        return backend
    spec = json.loads(backend.to_str())
    pieces = spec["model"]["vocab"]
    lowest = min(score for _, score in pieces)
    head, rest = pieces[: len(specials)], pieces[len(specials) :]
    spec["model"]["vocab"] = [*head, *([b, lowest - 20.0] for b in BYTE_PIECES), *rest]
    spec["model"] |= {"byte_fallback": True, "unk_id": 2}
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=True)]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.decoder = decoders.Sequence(steps)
    return backend


def unigram(texts: Sequence[str], vocab_size: int = 1200) -> PreTrainedTokenizerFast:
    """Unigram with byte pieces, word mark before every text, EOS after it and no BOS."""
    backend = _unigram(texts, vocab_size, byte_fallback=True)
    return _wrap(backend, after="</s>", unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def t5(texts: Sequence[str], vocab_size: int = 1200) -> PreTrainedTokenizerFast:
    """As T5 is: Unigram without byte pieces, white space split off first and runs of it lost."""
    backend = _unigram(texts, vocab_size, byte_fallback=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
        ]
    )
    return _wrap(backend, after="</s>", unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def bert(
    texts: Sequence[str], vocab_size: int = 2000, *, lower: bool = False
) -> PreTrainedTokenizerFast:
    """WordPiece behind BERT's normaliser and pre-tokenizer."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=names, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(
        backend, before="[CLS]", after="[SEP]", specials=names, unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]",
    )  # fmt: skip


def bert_uncased(texts: Sequence[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """The same with lower case and accents stripped."""
    return bert(texts, vocab_size, lower=True)


Builder = Callable[..., PreTrainedTokenizerFast]

LOSSLESS: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (
        gpt2, gpt2_bos, llama3, qwen, starcoder, neox, tiktoken, llama2, mistral, gemma, unigram
    )
}  # fmt: skip
"""Families whose tokens join to any text but what the family cannot tell apart (tested)."""

CHANGING: dict[str, Builder] = {
    builder.__name__: builder for builder in (lowercase, nfkc, t5, bert, bert_uncased)
}
"""Families that change text: refused where they do."""

FAMILIES = LOSSLESS | CHANGING


@cache
def zoo(name: str) -> SegmentTokenizer:
    """A family's tokenizer trained on `house_texts`, ready for use.

    Args:
        name: In `FAMILIES`.
    """
    return SegmentTokenizer(FAMILIES[name](house_texts()), name=name)
