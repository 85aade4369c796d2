"""How fast planning reads text, beside the plain tokenizers' own `encode_batch` of the same texts.

    python -m benchmarks.real_plan --models FOLDER... --texts FILE...

Folders hold a tokenizer.json (a model beside it is not needed). A file of JSON lines gives the
`text` of each, any other file is one document. Opening tokenizers is not counted on either side.

Both sides take turns in one process with the same threads; shown are medians of the rounds. Rates
are tokens of all models over seconds for all models. The first round warms the tokenizers' caches
of words and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from tokenizers import Tokenizer

from extract.corpus.collected import DOCUMENT_SCHEMA
from extract.plan.cutting import cut_corpus
from store_schema.config import ModelRef
from store_schema.text.tokenizer import SegmentTokenizer

ROUNDS = 5
MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class PlanSpeed:
    """Medians over the rounds.

    Args:
        plan_tokens_per_s: Ratio of planning's tokens/s to the plain tokenizers'.
        planned: Tokens/s of planning: tokenised, cut, proved and measured.
        plain: Tokens/s of `encode_batch`.
        segments: That the texts were cut into.
        size_bytes: Of the texts.
    """

    plan_tokens_per_s: float
    planned: float
    plain: float
    segments: int
    size_bytes: int


def plan_speed(
    folders: Mapping[str, Path],
    texts: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
    rounds: int = ROUNDS,
) -> PlanSpeed:
    """Plan texts and tokenise them plainly, in turns.

    Args:
        folders: With tokenizer.json, by model name.
        texts: Documents, none empty.
        max_tokens: Of a segment.
        rounds: That count.
    """
    plain = {name: Tokenizer.from_file(f"{path}/tokenizer.json") for name, path in folders.items()}
    ours = {
        name: SegmentTokenizer.load(ModelRef(model=str(path)), name=name)
        for name, path in folders.items()
    }
    columns = [[str(i) for i in range(len(texts))], ["d"] * len(texts), ["train"] * len(texts)]
    columns += [[None] * len(texts), list(texts), *[[None] * len(texts)] * 2]  # type: ignore[list-item]
    table = pa.table(columns, schema=DOCUMENT_SCHEMA)
    rates: list[tuple[float, float]] = []
    segments = 0
    for _ in range(rounds + 1):
        start = time.perf_counter()
        tokens = sum(len(e) for t in plain.values() for e in t.encode_batch(list(texts)))
        plainly = tokens / (time.perf_counter() - start)
        start = time.perf_counter()
        cuts = cut_corpus(table, ours, max_tokens, drop_unreadable=False).cuts
        seconds = time.perf_counter() - start
        planned = sum(sum(cut.num_tokens) for document in cuts for cut in document) / seconds
        rates.append((planned, plainly))
        segments = sum(map(len, cuts))
    del rates[0]
    return PlanSpeed(
        plan_tokens_per_s=statistics.median(planned / plainly for planned, plainly in rates),
        planned=statistics.median(planned for planned, _ in rates),
        plain=statistics.median(plainly for _, plainly in rates),
        segments=segments,
        size_bytes=sum(len(text.encode()) for text in texts),
    )


def read_texts(files: Sequence[Path]) -> list[str]:
    """Documents of text files and of JSON lines."""
    texts: list[str] = []
    for path in files:
        content = path.read_bytes().decode()  # line ends are content
        if path.suffix == ".jsonl":
            texts += [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
        else:
            texts.append(content)
    return [text for text in texts if text]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--texts", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    folders = {path.name: path for path in given.models}
    speed = plan_speed(
        folders, read_texts(given.texts), max_tokens=given.max_tokens, rounds=given.rounds
    )
    print(f"{speed.size_bytes:,} bytes, {speed.segments:,} segments, {', '.join(folders)}")
    print(f"planning {speed.planned:,.0f} tokens/s, encode_batch alone {speed.plain:,.0f}")
    print(json.dumps(asdict(speed)))


if __name__ == "__main__":
    main()
