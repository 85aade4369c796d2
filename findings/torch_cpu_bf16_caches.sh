#!/usr/bin/env bash
# Does a CPU training in bfloat16 stay at the memory of its first steps, whatever the texts' lengths are?
#
# Best guess beforehand: yes. Every step frees what it took, and shorter batches fit where longer were.
# Seen with torch 2.13.0 (CPU): under bfloat16 autocast memory grows with every length that was not met
# before. PyTorch and oneDNN below it each keep up to 1,024 prepared operations
# (LRU_CACHE_CAPACITY, ONEDNN_PRIMITIVE_CACHE_CAPACITY), each of a shape, and something of each stays in
# memory: here 725 MB in 120 steps, 350 to 410 with one of the two caches made small, 21 with both, and 343
# in float32. A training of 135M parameters on texts of many lengths grew from 5.0 to 9 GB in 157 steps
# this way, and stayed at 4.9 with both at 16, at no loss of speed.
# Exits non-zero when this is no longer so. On a CPU without bfloat16 units it says so and proves nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install "torch==2.13.0" "numpy==2.3.5"
cat > "$work/grow.py" <<'PY'
import random
import sys

import torch

PAGE = 4096


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


torch.manual_seed(0)
torch.set_num_threads(2)
layers = []
for _ in range(6):
    layers += [torch.nn.Linear(512, 1536), torch.nn.GELU(), torch.nn.Linear(1536, 512)]
model = torch.nn.Sequential(*layers)
lengths = list(range(400, 1000, 3))
random.Random(0).shuffle(lengths)


def step(rows: int) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[1] == "bfloat16"):
        loss = model(torch.randn(2, rows, 512)).float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


for rows in (1000, 700, 400, 1000):
    step(rows)
before = resident()
for rows in lengths[:120]:
    step(rows)
print(round((resident() - before) / 1e6))
PY
run() { env "${@:2}" "$work/venv/bin/python" "$work/grow.py" "$1"; }
"$work/venv/bin/python" -c "import torch; print('torch', torch.__version__)"
if ! "$work/venv/bin/python" -c "import torch, sys; sys.exit(not torch.ops.mkldnn._is_mkldnn_bf16_supported())"; then
    echo "this CPU has no units for bfloat16: nothing to see"
    exit 0
fi
default=$(run bfloat16 A=)
one=$(run bfloat16 LRU_CACHE_CAPACITY=16)
other=$(run bfloat16 ONEDNN_PRIMITIVE_CACHE_CAPACITY=16)
both=$(run bfloat16 LRU_CACHE_CAPACITY=16 ONEDNN_PRIMITIVE_CACHE_CAPACITY=16)
single=$(run float32 A=)
echo "MB grown in 120 steps of as many lengths: bfloat16 $default; one cache small $one; the other $other; both $both; float32 $single"
[ "$default" -gt 150 ] && [ "$both" -lt $((default / 3)) ]
