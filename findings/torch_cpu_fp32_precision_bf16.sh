#!/usr/bin/env bash
# May a CPU with AVX-512 BF16 multiply float32 numbers that came from bf16 on its bf16 units, with float32 results?
#
# Best guess beforehand: yes, torch.backends.mkldnn.matmul.fp32_precision = "bf16" (torch 2.9 and later) asks oneDNN
# for it, and a product then takes about half the time.
# Seen with torch 2.13.0 (oneDNN 3.12.0) on a CPU with AVX-512 BF16 and without AMX (AMD EPYC, Zen 4): the setting
# arrives (ONEDNN_VERBOSE shows attr-fpmath:bf16), but oneDNN's float32 kernel runs (brg_matmul:avx512_core), without
# a warning, and takes twice the time of the one for bf16. That one (brg_matmul:avx512_core_bf16) runs only where both
# factors and the result are bf16, and the result is then rounded to bf16; torch.mm(..., out_dtype=torch.float32),
# which is what is wanted, is refused on CPUs.
# Exits non-zero when this is no longer so. On a CPU with AMX, or without AVX-512 BF16, it says so and proves nothing.
set -euo pipefail
flags=$(grep -m1 '^flags' /proc/cpuinfo 2>/dev/null || true)
if [[ " $flags " != *" avx512_bf16 "* || " $flags " == *" amx_bf16 "* ]]; then
    echo "this CPU has AMX, or no AVX-512 BF16: nothing to see"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --quiet --disable-pip-version-check install "torch==2.13.0" "numpy==2.3.5"
cat > "$work/multiply.py" <<'PY'
import sys
import time

import torch

hidden, weight = torch.randn(256, 640).bfloat16(), torch.randn(16384, 640).bfloat16()
if sys.argv[1] == "refused":
    try:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    except RuntimeError as error:
        sys.exit(str(error).strip().split("\n")[0][:80])
    sys.exit("it is not refused")
if sys.argv[1] == "float32":
    torch.backends.mkldnn.matmul.fp32_precision = sys.argv[2]
    hidden, weight = hidden.float(), weight.float()
took = []
for _ in range(7):
    start = time.perf_counter()
    hidden @ weight.t()
    took.append(time.perf_counter() - start)
print(f"took {1e3 * min(took):.0f} ms at best")
PY
multiply() { ONEDNN_VERBOSE=1 "$work/venv/bin/python" "$work/multiply.py" "$@"; }
kernel() { grep ',exec,cpu,matmul,' | tail -1 | cut -d, -f7; }
"$work/venv/bin/python" -c "import torch; print('torch', torch.__version__)"
plain=$(multiply float32 ieee)
asked=$(multiply float32 bf16)
native=$(multiply bf16)
refused=$(multiply refused 2>&1 || true)
grep -E '^onednn_verbose,v1,info,(oneDNN|cpu,isa)' <<< "$native"
echo "float32 factors:                 $(grep '^took' <<< "$plain")"
echo "float32 factors, asked for bf16: $(grep '^took' <<< "$asked"), $(kernel <<< "$asked")"
echo "bf16 factors and results:        $(grep '^took' <<< "$native"), $(kernel <<< "$native")"
echo "bf16 factors, float32 results:   ${refused##*$'\n'}"
grep -q 'attr-fpmath:bf16' <<< "$asked"
[ "$(kernel <<< "$asked")" = brg_matmul:avx512_core ]
[ "$(kernel <<< "$native")" = brg_matmul:avx512_core_bf16 ]
grep -q "Could not run 'aten::mm.dtype'" <<< "$refused"
