"""`make bench-align`: speed of alignment, and what is left of a source's knowledge after it.

Four parts: speed beside the plain published FuseLLM alignment (`align_speed`), coverage between all
families of tokenizers (`align_coverage`), mass and score of aligned rows of a real model
(`align_pools`), and what large vocabularies and long stores cost (`align_costs`).

    python -m benchmarks.bench_align --quick     # speed, linearity and pools on little text
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core is what is measured

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.align_costs import MEMORY_SHARDS, measure_counting, measure_maps, measure_memory
from benchmarks.align_coverage import measure_coverage, show_coverage
from benchmarks.align_pools import measure_pools, pools_summary, show_pools
from benchmarks.align_speed import measure_speed, show_speed


@click.command()
@click.option("--quick", is_flag=True, help="Speed, linearity and pools on little text.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench", show_default=True)
def main(quick: bool, out: Path) -> None:
    """Measure, print tables, and one JSON object as the last line."""
    folder = out / "align"
    speed = measure_speed(folder, quick=quick)
    show_speed(speed)
    summary: dict[str, Any] = {
        "tokens_per_s": speed["tokens_per_s"],
        "speedup_fusellm": {size: one["speedup"] for size, one in speed["fusellm"].items()},
        "linearity": speed["linearity"],
        "speed": speed,
    }
    if not quick:
        shares, left_out = measure_coverage(folder)
        show_coverage(shares, left_out)
        summary |= {"coverage": shares, "coverage_left_out": left_out}
    pools = measure_pools(folder, quick=quick)
    show_pools(pools)
    summary |= pools_summary(pools)
    if not quick:
        summary["vocab_map_seconds"] = measure_maps(folder)
        summary["counting_tokens_per_s"] = measure_counting(folder)
        memory = measure_memory(folder)
        few, many = (memory[str(count)] for count in MEMORY_SHARDS)
        print(
            f"peak memory of align run: {few / 1e6:,.0f} MB on {MEMORY_SHARDS[0]} shards, "
            f"{many / 1e6:,.0f} MB on {MEMORY_SHARDS[1]}, ratio {many / few:.3f}"
        )
        summary |= {"peak_rss_bytes": memory, "memory_ratio": many / few}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
