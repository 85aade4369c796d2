"""What the vocabulary maps take for two large vocabularies, and the memory of `align run`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from align_pairs import (
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

from align.continuation import PairCounts, first_tokens
from align.first_token import piece_table
from align.trie import TargetTrie

LARGE = {"qwen": 151_643, "llama3": 128_000}
"""Source and target of the vocabulary maps."""
LARGE_TEXT_BYTES = 90_000_000
MEMORY_VOCAB_SIZE = 8_192
MEMORY_SHARDS = (4, 16)
MEMORY_SEGMENT_TOKENS, MEMORY_SHARD_SEGMENTS = 1_024, 32


def measure_maps(folder: Path) -> dict[str, float]:
    """Seconds of the vocabulary maps between 152k and 128k ids."""
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
        f"bytes {seconds['bytes']:.1f} s, mined {seconds['mined']:.1f} s"
    )
    return seconds


def measure_memory(folder: Path) -> dict[str, int]:
    """Peak resident bytes of `align run` on few and on many shards of one size."""
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
    found = {}
    for count in MEMORY_SHARDS:
        with tempfile.TemporaryDirectory() as name:
            run_file = stored_run(Path(name), pair, bigrams, shards[:count])
            command = [sys.executable, __file__, str(run_file)]
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
