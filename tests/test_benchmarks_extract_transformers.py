"""The benchmark of the transformers engine runs where only torch and transformers are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MISSING = (
    "zarr", "numcodecs", "pcodec", "google_crc32c", "vllm", "pydantic", "pyarrow", "numba", "click"
)  # fmt: skip

BLOCKED = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_it_runs_and_ends_with_one_json_line() -> None:
    options = "--hidden 64 --layers 1 --intermediate 64 --vocab 5000 --tokens 40 --segments 3"
    options += " --rounds 1 --top-k 8 --dtype bfloat16 --head-rows 32"
    script = "benchmarks.extract_transformers"
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, ",".join(MISSING), script, *options.split()],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["max_error_nats"] < 1e-5
    assert found["tokens_per_s_engine"] > 0
    assert found["ratio_forward"] == 1.0
    assert found["ratio_engine"] > 0
