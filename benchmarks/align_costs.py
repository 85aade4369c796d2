"""What the vocabulary maps take for two large vocabularies, how fast text is counted, and the memory
of `align run`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from align.chain.continuation import PairCounts, first_tokens
from align.chain.first_token import piece_table
from align.chain.trie import TargetTrie
from align.counts.kept_counts import COUNTS_FILE
from align.prepare.checked import check_alignment
from align.prepare.counting import count_once, shards_to_count
from align.prepare.prepare import count_continuations, count_matches
from benchmarks.align_pairs import (
    PRIOR,
    Bigrams,
    Pair,
    as_segments,
    cut,
    library_texts,
    site_texts,
    stored_run,
    text_of,
    trained,
)
from launch.signals import StopFlag
from store_schema.config import load_run

LARGE = {"qwen": 151_643, "llama3": 128_000}
"""Source and target of the vocabulary maps."""
LARGE_TEXT_BYTES = 90_000_000
MEMORY_VOCAB_SIZE = 8_192
MEMORY_SHARDS = (4, 16)
MEMORY_SEGMENT_TOKENS, MEMORY_SHARD_SEGMENTS = 1_024, 32


def measure_maps(folder: Path) -> dict[str, float]:
    """Seconds of the vocabulary maps between 152k and 128k ids.

    Of `bytes`: what every worker does at each start, counts of continuations being there (pieces,
    weights, trie); counting is measured by `measure_counting`. Of `mined`: the nearest spellings.
    """
    made = {}
    for half, (family, vocab_size) in enumerate(LARGE.items()):

        def texts(half: int = half) -> list[str]:
            foreign = [text_of(kind, 1_500_000, held_out=False) for kind in ("cjk", "emoji")]
            return [*site_texts(LARGE_TEXT_BYTES, half), *foreign]

        made[family] = trained(folder, family, vocab_size, texts)
    source, target = made.values()
    pair = Pair(source, target, ())
    start = time.perf_counter()
    pieces = piece_table(source.vocabulary, target)
    counts = PairCounts(source.vocab_size, target.vocab_size)
    counts.continuation(first_tokens(pieces), PRIOR)
    TargetTrie.of(target.vocabulary)
    seconds = {"bytes": time.perf_counter() - start}
    start = time.perf_counter()
    pair.nearest()
    seconds["mined"] = time.perf_counter() - start
    shared = len(set(source.vocabulary.tokens) & set(target.vocabulary.tokens))
    print(
        f"vocabulary maps {source.vocab_size:,} x {target.vocab_size:,} ({shared:,} tokens in both): "
        f"bytes {seconds['bytes']:.1f} s (without counting text), mined {seconds['mined']:.1f} s"
    )
    return seconds


def stored_runs(folder: Path, counts: Sequence[int]) -> Iterator[Path]:
    """Run files of source stores with so many shards of one size, one after the other."""
    training = [t for kind in ("code", "prose") for t in library_texts(kind, 1_500_000)]
    source, target = (
        trained(folder, family, MEMORY_VOCAB_SIZE, partial(list, training))
        for family in ("llama3", "llama2")
    )
    pair = Pair(source, target, ())
    bigrams = Bigrams.of(source.encode(as_segments(training)), source.vocab_size)
    text = "\n".join(t for kind in ("code", "prose") for t in library_texts(kind, 10**8))
    pieces = cut(text, target, MEMORY_SEGMENT_TOKENS)
    size = MEMORY_SHARD_SEGMENTS
    shards = [pieces[i : i + size] for i in range(0, len(pieces) - size + 1, size)]
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            yield stored_run(Path(name), pair, bigrams, shards[:count])


def measure_counting(folder: Path) -> dict[str, float]:
    """Target tokens a second that are counted, with all it takes: reading and tokenising too."""
    found = {}
    for run_file in stored_runs(folder, MEMORY_SHARDS[-1:]):
        for method, made in (("bytes", count_continuations), ("stats", count_matches)):
            checked = check_alignment(load_run(str(run_file), [f"align.method={method}"]), "one")
            checked.open_store()
            total = sum(shard.num_tokens["target"] for shard in shards_to_count(checked))
            for _ in range(2):  # the first compiles
                checked.location.delete(COUNTS_FILE)
                start = time.perf_counter()
                count_once(checked, made(checked)[1], StopFlag())
                found[method] = total / (time.perf_counter() - start)
    print(
        f"counting training text, once for each source ({MEMORY_VOCAB_SIZE:,} x "
        f"{MEMORY_VOCAB_SIZE:,} ids): bytes {found['bytes']:,.0f}, stats {found['stats']:,.0f} "
        "target tokens/s"
    )
    return found


def measure_memory(folder: Path) -> dict[str, int]:
    """Peak resident bytes of `align run` on few and on many shards of one size."""
    found = {}
    for count, run_file in zip(MEMORY_SHARDS, stored_runs(folder, MEMORY_SHARDS), strict=True):
        command = [sys.executable, "-m", "benchmarks.align_costs", str(run_file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[str(count)] = int(done.stdout.splitlines()[-1])
    return found


def align_and_tell_memory(run_file: str) -> int:
    """`align run` in this process; its peak resident bytes (Linux)."""
    from align.cli import align

    try:
        align.main(["run", run_file])
    except SystemExit as ended:  # as commands do
        if ended.code:
            raise
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    print(align_and_tell_memory(sys.argv[1]))
