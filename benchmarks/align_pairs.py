"""What `bench-align` measures on: texts, tokenizers, rows made without a model, and a real model's.

Nothing is downloaded: prose and code are those of the running Python, CJK and emoji text is made from
character ranges, tokenizers are trained on the spot by `tests/tokenizer_zoo.py` and kept.

Rows without a model are smoothed bigrams: of what followed the same token in other text the 25 most
frequent, probability by count, the label always among them and the rest in the tail. They have the
shape of real rows (few likely tokens, long lists of rare ones) and cost no time.

Shapes: N positions, V vocabulary, K entries of a row.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from unicodedata import is_normalized

import numpy as np
import numpy.typing as npt
import yaml
from transformers import PreTrainedTokenizerFast

from align.chain.continuation import PairCounts, first_tokens
from align.chain.first_token import piece_table
from align.chain.project import BytesAligner
from align.chain.tail_tokens import tail_tokens
from align.chain.trie import TargetTrie
from align.chain.vocabulary_map import VocabularyMap
from align.methods.method import Aligner
from align.papers.mined import MinedAligner
from align.papers.mined_vocabulary import nearest_tokens, written_tokens
from align.papers.stats import MatchCounts, StatsAligner
from benchmarks.store_model import BenchModel
from first_run.demo.text import Document, SplitSizes, library_documents, rank
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.errors import TokenizerError
from store_schema.layout import Arrays
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.plan.plan import Segment, write_plan
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.tokenizer_zoo import FAMILIES

ROOT = Path(__file__).resolve().parent.parent

NUM_ENTRIES = 25
SMOOTHING = 5.0
"""Occurrences that the unigram distribution counts for in every bigram row."""
COUNTED_BYTES, QUICK_COUNTED_BYTES = 3_000_000, 500_000
"""Of text that continuations are counted on."""
MAX_ENTRIES = 64
PRIOR = 4.0
TAIL_TOKENS = 0
"""`align.continuation_prior`'s default."""
FREQUENT_CHARACTERS = 700
"""Characters that a Unigram vocabulary has pieces for; it must take in all that it is trained on."""

# ---- texts ------------------------------------------------------------------------------------------


def library_texts(domain: str, limit_bytes: int, *, held_out: bool = False) -> list[str]:
    """Code or prose of the running Python in a fixed shuffled order.

    Args:
        domain: "code" or "prose".
        limit_bytes: About so much.
        held_out: Other documents than those of the call without.
    """
    wanted = "test" if held_out else "models"
    chosen = (d.text for d in _library(domain) if d.split == wanted)
    return list(_until(chosen, limit_bytes))


@cache
def _library(domain: str) -> list[Document]:
    documents = library_documents(domain, SplitSizes(train=0, valid=0, test=600_000), seed=1)
    return sorted(documents, key=lambda d: rank(1, d.id))


def _until(texts: Iterator[str], limit_bytes: int) -> Iterator[str]:
    size_bytes = 0
    for text in texts:
        if size_bytes >= limit_bytes:
            return
        size_bytes += len(text.encode())
        yield text


def site_texts(limit_bytes: int, half: int) -> list[str]:
    """Python sources of the standard library and of all installed packages, every second file."""
    paths = sysconfig.get_paths()
    found = sorted({p for name in ("stdlib", "purelib") for p in Path(paths[name]).rglob("*.py")})
    found.sort(key=lambda p: rank(0, p.name + str(len(p.parts))))
    sources = (p.read_text(encoding="utf-8", errors="ignore") for p in found[half::2])
    return list(_until(sources, limit_bytes))


def _characters(*ranges: tuple[int, int]) -> list[str]:
    codes = (chr(code) for first, end in ranges for code in range(first, end))
    return [c for c in codes if unicodedata.category(c) in ("Lo", "So", "Lm")]


def cjk_text(size_bytes: int, seed: int) -> str:
    """Sentences of made-up Chinese, Japanese and Korean words, frequent and rare as in real text."""
    words = random.Random(0)  # one lexicon; `seed` chooses what is written with it
    han = words.sample(_characters((0x4E00, 0x9FA6)), 1_500)
    kana = _characters((0x3041, 0x3097), (0x30A1, 0x30FB))
    hangul = words.sample(_characters((0xAC00, 0xD7A4)), 500)

    def word(alphabet: list[str], longest: int) -> str:
        return "".join(_draw(words, alphabet, words.randint(1, longest)))

    chinese = [word(han, 3) for _ in range(1_200)]
    japanese = [*"のはがをにで", *(word(han, 2) + word(kana, 3) for _ in range(800))]
    korean = [word(hangul, 4) + " " for _ in range(800)]
    chance = random.Random(seed)

    def sentence() -> str:
        text = "".join(
            _draw(chance, chance.choice([chinese, japanese, korean]), chance.randint(4, 14))
        )
        if chance.random() < 0.2:
            text += chance.choice(["2024", "3.5", " GPU ", "「" + text[:2] + "」", "１２３"])
        return text.rstrip() + chance.choice("。，、！？.\n")

    return "".join(_until(iter(sentence, None), size_bytes))


def emoji_text(size_bytes: int, seed: int) -> str:
    """Chat with emoji: single ones, skin tones, families, flags, keycaps, and words between them."""
    faces = _characters((0x1F300, 0x1F5FF), (0x1F600, 0x1F650), (0x1F680, 0x1F6C6))
    faces += _characters((0x1F910, 0x1F93F), (0x1F950, 0x1F970), (0x2600, 0x2700))
    words = [w.lower() for face in faces for w in unicodedata.name(face).split() if w.isalpha()]
    joined = ["👩‍👩‍👧‍👦", "👨‍💻", "🏳️‍🌈", "❤️", "❤️‍🔥", "1️⃣", "🧑‍🚀", "👍🏽", "🤷🏿‍♀️"]
    chance = random.Random(seed)

    def piece() -> str:
        what = chance.random()
        if what < 0.55:
            return " ".join(chance.choices(words, k=chance.randint(1, 5)))
        if what < 0.8:
            return _draw(chance, faces, 1)[0] * chance.choice([1, 1, 1, 2, 3])
        if what < 0.95:
            return chance.choice(joined)
        return "".join(chr(0x1F1E6 + chance.randrange(26)) for _ in range(2))

    def message() -> str:
        return " ".join(piece() for _ in range(chance.randint(2, 9))) + chance.choice("\n!\n")

    return "".join(_until(iter(message, None), size_bytes))


def _draw(chance: random.Random, items: Sequence[str], count: int) -> list[str]:
    """With weights that fall as those of words do."""
    return chance.choices(items, cum_weights=_falling(len(items)), k=count)


@cache
def _falling(count: int) -> list[float]:
    return list(accumulate(1 / (place + 4) for place in range(count)))


def text_of(kind: str, size_bytes: int, *, held_out: bool) -> str:
    """Text of one kind: prose, code, cjk or emoji."""
    if kind in ("prose", "code"):
        return "\n".join(library_texts(kind, size_bytes, held_out=held_out))[:size_bytes]
    made = cjk_text if kind == "cjk" else emoji_text
    return made(size_bytes, seed=1 if held_out else 2)


def as_segments(texts: Sequence[str], split: str = "train") -> list[Segment]:
    """Each text a segment of its own document."""
    return [
        Segment(i, f"d{i}#0", f"d{i}", "x", split, 0, len(text.encode()), True, None, text)
        for i, text in enumerate(texts)
    ]


def cut(text: str, tokenizer: SegmentTokenizer, num_tokens: int) -> list[str]:
    """Pieces of about so many tokens, cut at line ends; what is left over is left out."""
    lines = text.splitlines(keepends=True)
    line_ends = np.cumsum([len(line.encode()) for line in lines])
    before = np.searchsorted(tokenizer.token_ends([text])[0], line_ends, side="right")
    pieces, current, first = [], [], 0
    for line, count in zip(lines, before.tolist(), strict=True):
        current.append(line)
        if count - first >= num_tokens:
            pieces.append("".join(current))
            current, first = [], count
    return pieces


# ---- tokenizers -------------------------------------------------------------------------------------


def trained(
    folder: Path, family: str, vocab_size: int, texts: Callable[[], Sequence[str]]
) -> SegmentTokenizer:
    """A family's tokenizer, trained or as it stands in the folder.

    Args:
        folder: Of all that is kept.
        family: In `tests.tokenizer_zoo.FAMILIES`.
        vocab_size: Aimed at; special tokens may come on top.
        texts: Called if it has to be trained.
    """
    path = folder / f"{family}-{vocab_size}"
    if not (path / "tokenizer.json").exists():
        FAMILIES[family](texts(), vocab_size).save_pretrained(path)
    made = PreTrainedTokenizerFast.from_pretrained(path)
    return SegmentTokenizer(made, name=family)


def frequent_only(texts: Sequence[str]) -> list[str]:
    """The texts without rare characters, which SentencePiece leaves to its byte pieces."""
    counts = Counter(character for text in texts for character in text)
    kept = {character for character, _ in counts.most_common(FREQUENT_CHARACTERS)}
    return ["".join(c if c in kept else " " for c in text) for text in texts]


def family_tokenizer(
    folder: Path, family: str, vocab_size: int, texts: Callable[[], Sequence[str]]
) -> SegmentTokenizer:
    """As `trained`; Unigram ones as SentencePiece trains them, at a character coverage below 1."""

    def own() -> Sequence[str]:
        return frequent_only(texts()) if family in ("unigram", "t5") else texts()

    return trained(folder, family, vocab_size, own)


# ---- rows without a model ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bigrams:
    """The most likely tokens after each token.

    Args:
        keys: Rising previous * V + next of all pairs seen, and their counts.
        counts: [pairs].
        totals_V: Pairs that begin with each token.
        unigram_V: Smoothed share of each token.
        ids_VK: Tokens by falling probability.
        mass_VK: Their probabilities.
    """

    keys: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    totals_V: npt.NDArray[np.float64]
    unigram_V: npt.NDArray[np.float64]
    ids_VK: npt.NDArray[np.int64]
    mass_VK: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, encoded: Sequence[EncodedSegment], vocab_size: int, num_entries: int = NUM_ENTRIES
    ) -> Bigrams:
        """Count segments."""
        before = np.concatenate([_previous(e) for e in encoded])
        token = np.concatenate([e.token_ids for e in encoded]).astype(np.int64)
        known = before >= 0
        pairs = before[known] * vocab_size + token[known]
        keys, counts = np.unique(pairs, return_counts=True)
        totals_V = np.bincount(before[known], minlength=vocab_size).astype(np.float64)
        unigram_V = np.bincount(token, minlength=vocab_size) + 0.5
        unigram_V /= unigram_V.sum()
        found = cls(keys, counts, totals_V, unigram_V, np.empty(0), np.empty(0))
        frequent = np.argsort(-unigram_V, kind="stable")[:num_entries]
        filling = (np.arange(vocab_size)[:, None] * vocab_size + frequent).ravel()
        every = np.union1d(keys, filling)
        first, second = every // vocab_size, every % vocab_size
        mass = found.probability(first, second)
        order = np.lexsort((second, -mass, first))
        begins = np.searchsorted(first, np.arange(vocab_size))
        best_VK = order[begins[:, None] + np.arange(num_entries)]
        return replace(found, ids_VK=second[best_VK], mass_VK=mass[best_VK])

    def probability(
        self, before: npt.NDArray[np.int64], token: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Of tokens after others; everything has some."""
        wanted = before * len(self.totals_V) + token
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        counts = np.where(self.keys[at] == wanted, self.counts[at], 0)
        return (counts + SMOOTHING * self.unigram_V[token]) / (self.totals_V[before] + SMOOTHING)

    def rows(self, encoded: Sequence[EncodedSegment]) -> Arrays:
        """Arrays of a source store of these segments."""
        before_N = np.concatenate([_previous(e) for e in encoded])
        token_N = np.concatenate([e.token_ids for e in encoded]).astype(np.int64)
        known = before_N >= 0
        before, label = before_N[known], token_N[known]
        ids_NK, mass_NK = self.ids_VK[before], self.mass_VK[before]
        label_mass = self.probability(before, label)
        missing = ~(ids_NK == label[:, None]).any(axis=1)
        ids_NK[missing, -1], mass_NK[missing, -1] = label[missing], label_mass[missing]
        order = np.argsort(-mass_NK, axis=1, kind="stable")
        ids_NK = np.take_along_axis(ids_NK, order, 1)
        mass_NK = np.take_along_axis(mass_NK, order, 1)
        tail_N = np.ones(len(token_N))
        tail_N[known] = np.clip(1 - mass_NK.sum(axis=1), 0, 1)
        label_N = np.full(len(token_N), np.nan)
        label_N[known] = np.log(label_mass)
        entries_N = np.where(known, mass_NK.shape[1], 0)
        tokens = [len(e.token_ids) for e in encoded]
        return {
            "segment_ids": np.arange(len(encoded), dtype="<i8"),
            "token_offsets": np.concatenate(([0], np.cumsum(tokens))).astype("<i8"),
            "token_ids": token_N.astype("<u4"),
            "byte_ends": np.concatenate([e.byte_ends for e in encoded]).astype("<u4"),
            "entry_offsets": np.concatenate(([0], np.cumsum(entries_N))).astype("<i8"),
            "entry_ids": ids_NK.ravel().astype("<u4"),
            "entry_logprobs": np.minimum(np.log(mass_NK), 0).ravel().astype("<f4"),
            "tail_mass": tail_N.astype("<f4"),
            "label_logprobs": np.minimum(label_N, 0).astype("<f4"),
        }


def _previous(encoded: EncodedSegment) -> npt.NDArray[np.int64]:
    """[N] the token before each, -1 for none."""
    first = encoded.context_ids[-1] if encoded.context_ids else -1
    return np.concatenate(([first], encoded.token_ids[:-1])).astype(np.int64)[
        : len(encoded.token_ids)
    ]


# ---- methods ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A source's and a target's tokenizer, and the text that maps between them may be learned from."""

    source: SegmentTokenizer
    target: SegmentTokenizer
    training: Sequence[Segment]

    @property
    def eos(self) -> tuple[int, int]:
        """EOS of both, -1 for none."""
        own, other = self.source.eos_id, self.target.eos_id
        return -1 if own is None else own, -1 if other is None else other

    def bytes_map(self) -> VocabularyMap:
        """The map of method `bytes` as `align run` makes it, its continuations counted."""
        pieces = piece_table(self.source.vocabulary, self.target)
        counts = PairCounts(self.source.vocab_size, self.target.vocab_size)
        for source, target in self._read():
            ends = source.byte_ends.astype(np.int64), target.byte_ends.astype(np.int64)
            counts.add(source.token_ids, ends[0], target.token_ids, ends[1])
        own, lengths = self.source.vocabulary.lengths, self.target.vocabulary.lengths
        return VocabularyMap(
            pieces,
            counts.continuation(first_tokens(pieces), PRIOR),
            TargetTrie.of(self.target.vocabulary),
            lengths,
            tail_tokens(counts.distinct, own, lengths, TAIL_TOKENS),
            self.eos,
        )

    def _read(self) -> Iterator[tuple[EncodedSegment, EncodedSegment]]:
        encoded = self.source.encode(self.training), self.target.encode(self.training)
        return zip(*encoded, strict=True)

    def nearest(self) -> npt.NDArray[np.int32]:
        """[V] the MinED map as `align run` makes it."""
        own, other = self.eos
        return nearest_tokens(
            self.source.vocabulary,
            self.target.vocabulary,
            written=written_tokens(self.target),
            roles={own: other} if own >= 0 and other >= 0 else {},
        )

    def first_token_map(self, mapping: VocabularyMap) -> VocabularyMap:
        """The same without counts: every token goes to what the target begins with on it."""
        counts = PairCounts(self.source.vocab_size, self.target.vocab_size)
        plain = counts.continuation(first_tokens(mapping.pieces), PRIOR)
        return mapping._replace(continuation=plain)

    def aligners(self) -> dict[str, Aligner]:
        """All methods, and the variants of `bytes`."""
        mapping = self.bytes_map()
        sure = mapping._replace(continuation=mapping.continuation.only_certain())
        found: dict[str, Aligner] = {
            name: BytesAligner(one, MAX_ENTRIES)
            for name, one in {
                "bytes": mapping,
                "bytes, first token": self.first_token_map(mapping),
                "bytes, tail": sure,
                "bytes, no look-ahead": mapping._replace(look_ahead=False),
            }.items()
        }
        own, other = self.source.vocabulary, self.target.vocabulary
        nearest = self.nearest()
        counts = MatchCounts(self.source.vocab_size, self.target.vocab_size)
        for segment, (source, target) in zip(self.training, self._read(), strict=True):
            ends = source.byte_ends.astype(np.int64), target.byte_ends.astype(np.int64)
            text = segment.text.encode()
            counts.add(text, source.token_ids, ends[0], target.token_ids, ends[1])
        met = counts.token_map(nearest, own, other)
        found["mined"] = MinedAligner(nearest, self.target.vocab_size)
        found["stats"] = StatsAligner(met, self.target.vocab_size)
        return found


def readable(tokenizer: SegmentTokenizer, segments: Sequence[Segment]) -> list[Segment]:
    """The segments that the tokenizer does not refuse."""
    kept = []
    for segment in segments:
        try:
            if tokenizer.encode([segment]):
                kept.append(segment)
        except TokenizerError:
            continue
    return kept


# ---- a real model's rows, and stores on disk --------------------------------------------------------


def real_shards(
    made: BenchModel, folder: Path, *, top_k: int, text_bytes: int
) -> list[tuple[Arrays, list[Segment]]]:
    """Held-out text scored by the model through the stages themselves, read back from the store.

    Text that is not NFC is left out: one of the targets refuses it.
    """
    documents = folder / "docs.jsonl"
    with documents.open("w", encoding="utf-8") as file:
        size_bytes = 0
        for document in sorted(made.documents, key=lambda d: rank(0, d.id)):
            if size_bytes < text_bytes and is_normalized("NFC", document.text):
                size_bytes += len(document.text.encode())
                row = {"id": document.id, "text": document.text, "domain": document.domain}
                file.write(json.dumps(row | {"split": "test"}) + "\n")
    model = {"model": str(made.folder.resolve()), "dtype": "float32"}
    content = {
        "name": "bench",
        "run_dir": str(folder / "run"),
        "sources": {"bench": model},
        "target": model,
        "corpus": {"inputs": [{"path": str(documents)}], "splits": ["test"]},
        "plan": {"max_tokens": 512, "shard_tokens": 16_384},
        "extract": {"engine": "transformers", "device": "cpu", "top_k": top_k},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    for stage in ("corpus", "build"), ("extract", "plan"), ("extract", "run"):
        command = [sys.executable, "-m", "logitfuse", *stage, str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    run = load_run(str(path))
    plan = open_plan(run)
    reader = StoreReader.open(open_location(run.store_url("bench")))
    return [(reader.read(shard.index), plan.segments(shard)) for shard in plan.shards]


def stored_run(folder: Path, pair: Pair, bigrams: Bigrams, shards: Sequence[Sequence[str]]) -> Path:
    """A run whose source store is complete, its rows bigrams; returns the run file."""
    refs = {"one": pair.source, "target": pair.target}
    for name, tokenizer in refs.items():
        tokenizer.save_pretrained(folder / name)
    models = {name: {"model": str(folder / name)} for name in refs}
    content = {
        "name": "bench",
        "run_dir": str(folder / "run"),
        "sources": {"one": models["one"]},
        "target": models["target"],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    segments = as_segments([text for shard in shards for text in shard])
    stops = np.cumsum([len(shard) for shard in shards])
    parts = [segments[stop - len(shard) : stop] for stop, shard in zip(stops, shards, strict=True)]
    counted = [
        (part, {n: sum(len(e.token_ids) for e in t.encode(part)) for n, t in refs.items()})
        for part in parts
    ]
    plan = write_plan(
        open_location(folder / "run/plan"),
        counted,
        corpus_fingerprint="c",
        request_fingerprint="r",
        tokenizers={name: tokenizer.fingerprint for name, tokenizer in refs.items()},
        settings={},
    )
    manifest = Manifest(
        kind="source",
        source="one",
        model=ModelIdentity(
            name=models["one"]["model"],
            model_fingerprint="m",
            tokenizer_fingerprint=pair.source.fingerprint,
            vocab_size=pair.source.vocab_size,
        ),
        corpus_fingerprint="c",
        plan_fingerprint=plan.fingerprint,
        top_k=NUM_ENTRIES,
        vocabulary_fingerprint=pair.source.vocabulary.fingerprint,
    )
    location = open_location(folder / "run/stores/one")
    writer = StoreWriter.open(location, manifest, pair.source.vocabulary)
    for shard in plan.shards:
        arrays = bigrams.rows(pair.source.encode(plan.segments(shard)))
        numbers = np.arange(shard.start, shard.stop, dtype="<i8")
        writer.write(shard, arrays | {"segment_ids": numbers})
    return path
