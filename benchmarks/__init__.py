"""Measurements, each run from the repository: `python -m benchmarks.NAME`, or `make bench-...`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
